"""A plain Celery client, which knows nothing of hortator: its messages run, and it reads our results."""

import json
from typing import Any

import celery
import pytest
from celery.exceptions import TaskRevokedError

from hortator.producer.errors import JobFailed
from hortator.producer.names import Names
from hortator.producer.redis_store import RedisStore
from hortator.producer.rules import Rules
from hortator.producer.schema import Failure, State
from hortator.producer.store import Lease, Outcome, ReleaseReason
from tests.producer.rig import LEASE_S, MODEL, NAMESPACE, RedisRig, done, job, prompt_of, result


@pytest.fixture
def app(redis_rig: RedisRig) -> Any:
    app = celery.Celery("plain", broker=redis_rig.url, backend=redis_rig.url, set_as_current=False)
    app.conf.broker_transport_options = {"global_keyprefix": NAMESPACE}
    app.conf.result_backend_transport_options = {"global_keyprefix": NAMESPACE}
    yield app
    app.close()


def test_a_plain_send_task_is_claimed_and_its_result_is_read(redis_rig: RedisRig, app: Any) -> None:
    answer = app.send_task("llm.generate", kwargs={"prompt": "hi"}, queue=MODEL)
    [claimed] = redis_rig.claim().jobs
    assert claimed.lease == Lease(answer.id, 1)
    assert prompt_of(claimed.message) == "hi"
    redis_rig.store.commit([done(claimed.lease, "hello")])
    got = answer.get(timeout=5)
    assert got["text"] == "hello"
    assert got["id"] == answer.id
    assert got["usage"] == result().usage.model_dump()
    assert (answer.state, answer.successful()) == ("SUCCESS", True)
    assert answer.date_done is not None


@pytest.mark.parametrize("priority", [0, 3, 6, 9])
def test_celerys_priority_steps_are_served(redis_rig: RedisRig, app: Any, priority: int) -> None:
    app.conf.broker_transport_options = {"global_keyprefix": NAMESPACE, "queue_order_strategy": "priority"}
    app.send_task("llm.generate", args=["hi"], queue=MODEL, priority=priority)
    assert redis_rig.redis.llen(redis_rig.names.queue(MODEL, priority)) == 1
    assert [prompt_of(one.message) for one in redis_rig.claim().jobs] == ["hi"]


def test_an_own_job_is_a_celery_task_to_celery(redis_rig: RedisRig, app: Any) -> None:
    [receipt] = redis_rig.store.enqueue([job()])
    answer = app.AsyncResult(receipt.job_id)
    assert answer.state == "PENDING"
    redis_rig.store.commit([done(redis_rig.claim_one(), "text")])
    assert answer.get(timeout=5)["text"] == "text"


def test_a_running_job_is_started_to_celery_and_pending_again_when_it_goes_back(redis_rig: RedisRig, app: Any) -> None:
    answer = app.send_task("llm.generate", args=["hi"], queue=MODEL)
    lease = redis_rig.claim_one(owner="a group")
    assert answer.state == "STARTED"
    assert answer.info == {"hostname": "a_group"}
    redis_rig.store.release([lease], reason=ReleaseReason.DRAINED)
    assert answer.state == "PENDING"
    redis_rig.store.release([redis_rig.claim_one()], reason=ReleaseReason.CRASHED)
    assert answer.state == "PENDING"
    redis_rig.store.commit([done(redis_rig.claim_one(), "text")])
    assert (answer.state, answer.get(timeout=5)["text"]) == ("SUCCESS", "text")


def test_a_failure_is_raised_by_get(redis_rig: RedisRig, app: Any) -> None:
    [job_id] = redis_rig.enqueue("x")
    failure = Failure(code="prompt_too_long", message='limit is "2048" tokens')
    redis_rig.store.commit([Outcome(redis_rig.claim_one(), State.FAILED, failure=failure)])
    answer = app.AsyncResult(job_id)
    with pytest.raises(JobFailed, match='prompt_too_long: limit is "2048" tokens'):
        answer.get(timeout=5)
    assert answer.state == "FAILURE"


@pytest.mark.parametrize("how", ["cancelled while queued", "cancelled while running", "expired"])
def test_a_cancelled_or_expired_job_is_revoked_to_celery(redis_rig: RedisRig, app: Any, how: str) -> None:
    [job_id] = redis_rig.enqueue("x", deadline_s=0.05 if how == "expired" else 60)
    answer = app.AsyncResult(job_id)
    if how == "cancelled while running":
        lease = redis_rig.claim_one()
        redis_rig.store.cancel([job_id])
        redis_rig.store.commit([Outcome(lease, State.CANCELLED)])
    elif how == "expired":
        redis_rig.wait(0.1)
        redis_rig.store.sweep()
    else:
        redis_rig.store.cancel([job_id])
    with pytest.raises(TaskRevokedError):
        answer.get(timeout=5)
    assert answer.state == "REVOKED"


def test_celery_hears_of_the_result_without_polling(redis_rig: RedisRig, app: Any) -> None:
    """get() subscribes, and is woken by the PUBLISH of a commit that comes later."""
    import threading

    answer = app.send_task("llm.generate", args=["hi"], queue=MODEL)
    lease = redis_rig.claim_one()
    timer = threading.Timer(0.2, lambda: redis_rig.another().commit([done(lease)]))
    timer.start()
    assert answer.get(timeout=5)["text"] == "done"
    timer.join()


def test_a_malformed_task_fails_for_its_sender_too(redis_rig: RedisRig, app: Any) -> None:
    app.conf.task_serializer = "pickle"
    answer = app.send_task("llm.generate", args=["hi"], queue=MODEL)
    assert redis_rig.claim().jobs == ()
    with pytest.raises(JobFailed, match="content type is not application/json"):
        answer.get(timeout=5)


def test_own_headers_travel(redis_rig: RedisRig, app: Any) -> None:
    app.send_task("llm.generate", args=["hi"], queue=MODEL, headers={"traceparent": "00-abc"})
    [claimed] = redis_rig.claim().jobs
    assert json.loads(claimed.message)["headers"]["traceparent"] == "00-abc"


def test_without_a_namespace_celery_needs_no_options(redis_rig: RedisRig) -> None:
    app = celery.Celery("bare", broker=redis_rig.url, backend=redis_rig.url, set_as_current=False)
    with app, RedisStore(redis_rig.url, rules=Rules(), timeout_s=5) as store:
        answer = app.send_task("llm.generate", args=["hi"], queue=MODEL)
        assert store.names.namespace == Names().namespace == ""
        [claimed] = store.claim(MODEL, owner="a", limit=5, lease_s=LEASE_S, idle=True).jobs
        store.commit([done(claimed.lease)])
        assert answer.get(timeout=5)["text"] == "done"

"""A leader is a real Celery worker: everything here is asked by stock Celery, of real processes, on a real Redis."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis
from celery.exceptions import TaskRevokedError

from hortator.producer.embedded import EmbeddedRedis
from hortator.producer.schema import State
from tests.workers.messages import message
from tests.workers.real_worker import QUEUE, REPOSITORY, TOKEN_S, Client, Worker, wait_for

SECOND = int(1 / TOKEN_S)  # tokens that take about a second


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture(scope="module")
def worker(server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One worker for all tests that leave it alive; events are on."""
    with Worker(server.url, tmp_path_factory.mktemp("worker"), "-E") as worker:
        yield worker.ready()
        assert worker.process.poll() is None, worker.output()
        assert "Traceback" not in worker.output(), worker.output()


@pytest.fixture(scope="module")
def client(server: EmbeddedRedis) -> Iterator[Client]:
    yield Client(server.url)
    gc.collect()  # an AsyncResult unsubscribes when it is collected: while Redis is still there


@pytest.fixture
def own_redis() -> Iterator[EmbeddedRedis]:
    """A Redis of the test's own, to be mistreated."""
    with EmbeddedRedis() as server:
        yield server


def said(worker: Worker) -> str:
    """What its group says of itself."""
    return next(beat.state for queue in worker.store.queues() for beat in queue.groups)


def push(server: EmbeddedRedis, *prompts: str, tokens: int = 5) -> list[str]:
    """What any program can do that knows Redis only."""
    ids = [str(uuid.uuid4()) for _ in prompts]
    with redis.Redis.from_url(server.url) as raw:
        for job_id, prompt in zip(ids, prompts, strict=True):
            raw.lpush(QUEUE, message(job_id, prompt=prompt, max_tokens=tokens))
    return ids


# ---- results


def test_a_stock_client_gets_its_result(worker: Worker, client: Client) -> None:
    result = client.send("hello", tokens=7).get(timeout=10)
    assert (result["text"], result["finish_reason"]) == ("hellohe", "length")
    assert result["usage"] == {"prompt_tokens": 5, "completion_tokens": 7}


def test_a_failure_reaches_the_stock_client_in_readable_words(worker: Worker, client: Client) -> None:
    with pytest.raises(Exception, match="the limit is 4095"):
        client.send("x" * 5000).get(timeout=10)


def test_a_mistyped_keyword_reaches_the_stock_client_with_the_one_that_was_meant(
    worker: Worker, client: Client
) -> None:
    result = client.app.send_task("llm.generate", kwargs={"prompt": "x", "max_token": 5}, queue=QUEUE)
    with pytest.raises(Exception, match="bad_request: max_token: there is no such keyword; did you mean max_tokens"):
        result.get(timeout=20)
    [status] = worker.store.statuses([result.id])
    assert status is not None
    assert status.failure is not None
    assert status.failure.code == "bad_request"


def test_many_jobs_come_back_right(worker: Worker, client: Client) -> None:
    prompts = [f"number {number}" for number in range(60)]
    results = [client.send(prompt, tokens=len(prompt)) for prompt in prompts]
    assert [result.get(timeout=20)["text"] for result in results] == prompts


def test_only_the_models_own_queue_is_used(worker: Worker, server: EmbeddedRedis) -> None:
    with redis.Redis.from_url(server.url) as raw:
        keys = {key.decode() for key in raw.keys("*")}
    assert not keys & {"celery", "unacked", "unacked_index", "_kombu.binding.celery"}


# ---- inspect


def test_inspect_tells_what_is_in_flight(worker: Worker, client: Client) -> None:
    assert client.inspect(worker, "ping") == {"ok": "pong"}
    result = client.send(tokens=SECOND)
    worker.running(result.id)
    assert client.active(worker) == {result.id}
    (request,) = client.inspect(worker, "active")
    assert request["name"] == "llm.generate"
    assert abs(time.time() - request["time_start"]) < 10
    assert client.inspect(worker, "reserved") == []
    assert client.inspect(worker, "query_task", [result.id])[result.id][0] == "active"
    pool = client.inspect(worker, "stats")["pool"]
    assert (pool["state"], pool["running"], pool["max-concurrency"]) == ("ready", 1, 16)
    assert [queue["name"] for queue in client.inspect(worker, "active_queues")] == [QUEUE]
    result.get(timeout=10)
    wait_for("nothing active", lambda: client.active(worker) == set())


def test_inspect_works_without_a_model(worker: Worker, server: EmbeddedRedis) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("HORTATOR_")}
    answer = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "hortator.workers", "inspect", "ping", "-d", worker.name],
        env=env | {"HORTATOR_REDIS_URL": server.url},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "pong" in answer.stdout


def test_a_worker_refuses_to_consume_another_queue(worker: Worker, client: Client) -> None:
    (reply,) = client.app.control.add_consumer("other", destination=[worker.name], reply=True, timeout=3)
    assert "ok" not in reply[worker.name]
    assert client.send().get(timeout=10)["text"] == "hello"


def test_a_queue_can_be_left_and_joined_again(worker: Worker, client: Client) -> None:
    client.app.control.cancel_consumer(QUEUE, destination=[worker.name], reply=True, timeout=3)
    result = client.send()
    time.sleep(0.3)
    assert worker.status(result.id) is None
    wait_for("draining in status", lambda: said(worker) == "draining")
    client.app.control.add_consumer(QUEUE, destination=[worker.name], reply=True, timeout=3)
    assert result.get(timeout=10)["text"] == "hello"
    wait_for("ready in status", lambda: said(worker) == "ready")


def test_resume_rejoins_a_queue_that_celery_was_told_to_leave(worker: Worker, client: Client) -> None:
    client.app.control.cancel_consumer(QUEUE, destination=[worker.name], reply=True, timeout=3)
    result = client.send()
    wait_for("draining", lambda: client.inspect(worker, "stats")["pool"]["state"] == "draining")
    client.app.control.broadcast("group_resume", destination=[worker.name], reply=True, timeout=3)
    assert result.get(timeout=10)["text"] == "hello"


# ---- revoke, expires, time limit


def test_revoke_with_terminate_ends_a_prompt_in_flight(worker: Worker, client: Client) -> None:
    result = client.send(tokens=30 * SECOND)
    worker.running(result.id)
    client.app.control.revoke(result.id, terminate=True)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=3)
    assert result.state == "REVOKED"
    assert worker.state(result.id) is State.CANCELLED
    assert client.active(worker) == set()


def test_revoke_reaches_a_prompt_that_still_waits(worker: Worker, client: Client) -> None:
    blockers = [client.send(tokens=30 * SECOND) for _ in range(20)]
    worker.running(*[blocker.id for blocker in blockers[:16]])
    waiting = client.send()
    client.app.control.revoke(waiting.id)
    time.sleep(0.2)
    client.app.control.revoke([blocker.id for blocker in blockers], terminate=True)
    with pytest.raises(TaskRevokedError):
        waiting.get(timeout=10)
    assert {status.state for status in worker.terminal(*[b.id for b in blockers])} == {State.CANCELLED}


def test_a_job_that_expired_is_not_started(worker: Worker, client: Client) -> None:
    result = client.send(expires=datetime.now(UTC) - timedelta(seconds=5))
    with pytest.raises(TaskRevokedError, match="before it was started"):
        result.get(timeout=5)
    assert worker.state(result.id) is State.EXPIRED


def test_a_time_limit_ends_the_prompt(worker: Worker, client: Client) -> None:
    result = client.send(tokens=30 * SECOND, time_limit=1)
    with pytest.raises(Exception, match="time limit of 1 s"):
        result.get(timeout=5)


# ---- events


def test_a_stock_receiver_sees_the_life_of_every_prompt(worker: Worker, client: Client) -> None:
    seen: list[dict[str, object]] = []
    with client.app.connection_for_read() as connection:
        receiver = client.app.events.Receiver(connection, handlers={"*": seen.append})
        thread = threading.Thread(target=receiver.capture)
        thread.start()
        wait_for("a heartbeat", lambda: seen)
        good, bad = client.send(), client.send("x" * 5000)
        gone = client.send(tokens=30 * SECOND)
        worker.running(gone.id)
        client.app.control.revoke(gone.id, terminate=True)

        def lives() -> bool:
            return all(
                [event["type"] for event in seen if event.get("uuid") == result.id] == types
                for result, types in [
                    (good, ["task-received", "task-started", "task-succeeded"]),
                    (bad, ["task-received", "task-failed"]),
                    (gone, ["task-received", "task-started", "task-revoked"]),
                ]
            ) and any(event["type"] == "worker-heartbeat" for event in seen)

        wait_for("all events", lives, 8)
        receiver.should_stop = True  # seen at the next heartbeat
        thread.join(10)
    assert "hello" not in str(seen), "a prompt or an answer is in an event"


# ---- bad bytes

CORPUS = [
    b"", b"{", b"\xff\xfe\x00", b"null", b"[]", b"NaN", b"[" * 5000, b'{"headers": 1}', b"\x80\x04cos\nsystem\n.",
    message("no/such id", prompt="x"), message("bad-task", prompt="x", headers={"task": "os.system"}),
    message("bad-body", prompt="x").replace(b"base64", b"base65"), message("bad-json", prompt="x", max_tokens=-1),
    message("bad-eta", prompt="x", headers={"eta": "2099-01-01T00:00:00"}),
    message("bad-expires", prompt="x", headers={"expires": "soon"}),
    message("bad-stamps", prompt="x", headers={"stamps": 5, "stamped_headers": 5}),
    message("bad-stamp", prompt="x", headers={"stamped_headers": [[1]]}),
    message("null-like", prompt="x", headers={"expires": 0}), message("bad-args", 1, 2, 3),
    message("bad-type", prompt=["x"]),
]  # fmt: skip


def test_bad_bytes_end_in_the_dead_letters_and_never_end_the_worker(
    worker: Worker, client: Client, server: EmbeddedRedis
) -> None:
    before = len(worker.store.dead_letters(limit=1000))
    with redis.Redis.from_url(server.url) as raw:
        for bad in CORPUS:
            raw.lpush(QUEUE, bad)
    assert client.send().get(timeout=10)["text"] == "hello"
    wait_for("all letters", lambda: len(worker.store.dead_letters(limit=1000)) == before + len(CORPUS))
    strange = {"bad-stamps": "TypeError", "bad-stamp": "TypeError", "null-like": "AttributeError"}
    for job_id in ("bad-task", "bad-body", "bad-json", "bad-eta", "bad-expires", "bad-args", "bad-type", *strange):
        status = worker.status(job_id)
        assert status is not None, job_id
        assert status.state is State.FAILED, job_id
        assert status.failure is not None
        assert status.failure.message, job_id
    refused = worker.status("bad-expires")
    assert refused is not None
    assert "invalid expires value" in str(refused.failure)
    for job_id, error in strange.items():
        status = worker.status(job_id)
        assert status is not None
        assert f"a Celery header has a wrong type ({error})" in str(status.failure)
        assert f"a Celery header of job {job_id} has a wrong type: {error}\n" in worker.output()
    assert "Traceback" not in worker.output()


# ---- connections


@pytest.mark.parametrize("noise", ["null", "[]", "1", '{"properties": []}', '{"properties": {}, "body": 5}'])
def test_what_anybody_publishes_to_remote_control_never_ends_the_worker(
    noise: str, worker: Worker, server: EmbeddedRedis
) -> None:
    with redis.Redis.from_url(server.url) as connection:
        assert connection.publish("/0.celery.pidbox", noise)
    [job_id] = push(server, "still here")
    assert worker.terminal(job_id)[0].state is State.SUCCEEDED


def test_an_answer_that_nobody_foresaw_is_an_outage_and_no_end(own_redis: EmbeddedRedis, tmp_path: Path) -> None:
    """Somebody's key stands where the queue is: nothing can be claimed until it is gone."""
    with Worker(own_redis.url, tmp_path).ready() as worker, redis.Redis.from_url(own_redis.url) as connection:
        connection.set(QUEUE, "somebody's")
        wait_for("the leader notices", lambda: b"refused a call" in worker.log.read_bytes())
        connection.delete(QUEUE)
        [job_id] = push(own_redis, "after it")
        assert worker.terminal(job_id)[0].state is State.SUCCEEDED
        assert worker.process.poll() is None


def test_nothing_runs_twice_when_all_connections_are_killed(own_redis: EmbeddedRedis, tmp_path: Path) -> None:
    with Worker(own_redis.url, tmp_path) as worker:
        ids = push(own_redis, *["hello"] * 8, tokens=3 * SECOND)
        worker.ready().running(*ids)
        with redis.Redis.from_url(own_redis.url) as raw:
            for kind in ("normal", "pubsub"):
                raw.client_kill_filter(_type=kind, skipme=True)
        client = Client(own_redis.url)
        wait_for("an answer after the reconnect", lambda: client.answers(worker))
        assert client.active(worker) == set(ids)
        statuses = worker.terminal(*ids)
        assert [status.state for status in statuses] == [State.SUCCEEDED] * 8
        assert [status.attempt for status in statuses] == [1] * 8
        wait_for("nothing active", lambda: client.active(worker) == set())


def test_results_survive_a_redis_that_dies_and_comes_back(own_redis: EmbeddedRedis, tmp_path: Path) -> None:
    with Worker(own_redis.url, tmp_path) as worker:
        worker.ready()
        ids = push(own_redis, *["hello"] * 8, tokens=2 * SECOND)
        worker.running(*ids)
        time.sleep(1.1)  # appendfsync everysec
        own_redis.kill()
        wait_for("the front to notice", lambda: "Redis does not answer" in worker.output(), 1.0)
        time.sleep(1.5)
        assert worker.process.poll() is None, worker.output()
        own_redis.start()
        statuses = worker.terminal(*ids)
        assert [status.state for status in statuses] == [State.SUCCEEDED] * 8
        worker.terminal(*push(own_redis, "hello"))
        wait_for("an answer after the reconnect", lambda: Client(own_redis.url).answers(worker))
        assert "Redis is back" in worker.output()


def test_a_worker_waits_for_a_redis_that_is_not_there_yet(own_redis: EmbeddedRedis, tmp_path: Path) -> None:
    own_redis.kill()
    with Worker(own_redis.url, tmp_path) as worker:
        wait_for("a clear line", lambda: "cannot connect to" in worker.output())
        assert worker.process.poll() is None
        own_redis.start()
        worker.ready().terminal(*push(own_redis, "hello"))


# ---- the end


def test_sigterm_finishes_what_runs_and_takes_nothing_new(server: EmbeddedRedis, tmp_path: Path) -> None:
    client = Client(server.url)
    with Worker(server.url, tmp_path, queue="t1", model="t1") as worker:
        worker.ready()
        running = client.send(tokens=SECOND, queue="t1")
        worker.running(running.id)
        worker.process.send_signal(signal.SIGTERM)
        late = client.send(queue="t1")
        assert worker.process.wait(10) == 0
        assert running.get(timeout=1)["usage"]["completion_tokens"] == SECOND
        assert worker.status(late.id) is None


def test_the_second_sigterm_hands_back_at_once_and_charges_nothing(server: EmbeddedRedis, tmp_path: Path) -> None:
    client = Client(server.url)
    with Worker(server.url, tmp_path, queue="t2", model="t2") as worker:
        worker.ready()
        ids = [client.send(tokens=30 * SECOND, queue="t2").id for _ in range(4)]
        worker.running(*ids)
        worker.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert {worker.state(job_id) for job_id in ids} == {State.RUNNING}
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(5) == 0
        assert {worker.state(job_id) for job_id in ids} == {State.QUEUED}
        again = worker.store.claim("t2", owner="other", limit=9, lease_s=60, idle=False)
        assert {claimed.lease.job_id for claimed in again.jobs} == set(ids)
        assert all(claimed.journal for claimed in again.jobs)


def test_what_does_not_finish_in_the_grace_is_handed_back(server: EmbeddedRedis, tmp_path: Path) -> None:
    client = Client(server.url)
    with Worker(server.url, tmp_path, queue="t3", model="t3", grace_s=0.5) as worker:
        worker.ready()
        result = client.send(tokens=30 * SECOND, queue="t3")
        worker.running(result.id)
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(5) == 0
        assert worker.state(result.id) is State.QUEUED


def test_control_shutdown_finishes_what_runs(server: EmbeddedRedis, tmp_path: Path) -> None:
    client = Client(server.url)
    with Worker(server.url, tmp_path, queue="t4", model="t4") as worker:
        worker.ready()
        result = client.send(tokens=SECOND, queue="t4")
        worker.running(result.id)
        client.app.control.shutdown(destination=[worker.name])
        assert worker.process.wait(10) == 0
        assert result.get(timeout=1)["usage"]["completion_tokens"] == SECOND


def test_a_hangup_finishes_what_runs_and_starts_anew_in_the_same_process(server: EmbeddedRedis, tmp_path: Path) -> None:
    """Celery's own way executes the path of its `__main__`, which then cannot find its package."""
    client = Client(server.url)
    with Worker(server.url, tmp_path, queue="t5", model="t5") as worker:
        worker.ready()
        running = client.send(tokens=SECOND, queue="t5")
        worker.running(running.id)
        worker.process.send_signal(signal.SIGHUP)
        wait_for("another life", lambda: worker.output().count("is ready after") == 2)
        assert running.get(timeout=1)["usage"]["completion_tokens"] == SECOND
        assert client.send(queue="t5").get(timeout=10)["text"] == "hello"
        assert worker.process.poll() is None
        assert "Traceback" not in worker.output()


# ---- refusals at the start


@pytest.mark.parametrize(
    ("queue", "settings", "says"),
    [
        ("other", {}, "this worker's model is served on the queue 'm'"),
        (QUEUE, {"model": None, "engine": "paged"}, "model_path is not set"),
        (QUEUE, {"max_num_seqs": -1}, "max_num_seqs: Input should be greater than or equal to 1"),
        (QUEUE, {"namespace": "no-end"}, "namespace 'no-end'"),
        (QUEUE, {"redis_url": "http://127.0.0.1"}, "redis"),
        (QUEUE, {"engine": "no_such_module:make"}, "no_such_module"),
    ],
)
def test_a_worker_that_cannot_work_says_why_and_exits(
    server: EmbeddedRedis, tmp_path: Path, queue: str, settings: dict[str, object], says: str
) -> None:
    with Worker(server.url, tmp_path, queue=queue, **settings) as worker:
        assert worker.process.wait(15) != 0, worker.output()
        assert says in worker.output()


def test_the_queue_need_not_be_named(server: EmbeddedRedis, tmp_path: Path) -> None:
    with Worker(server.url, tmp_path, queue=None, model="t5") as worker:
        worker.ready()
        assert Client(server.url).send(queue="t5").get(timeout=10)["text"] == "hello"


def test_a_redis_that_evicts_is_refused(tmp_path: Path) -> None:
    with EmbeddedRedis() as server:
        with redis.Redis.from_url(server.url) as raw:
            raw.config_set("maxmemory-policy", "allkeys-lru")
        with Worker(server.url, tmp_path) as worker:
            assert worker.process.wait(15) != 0
            assert "allkeys-lru" in worker.output()


def test_a_namespace_is_celerys_global_keyprefix(server: EmbeddedRedis, tmp_path: Path) -> None:
    with Worker(server.url, tmp_path, queue="t6", model="t6", namespace="fleet2:") as worker:
        worker.ready()
        client = Client(server.url, "fleet2:")
        assert client.send(queue="t6").get(timeout=10)["text"] == "hello"
        assert client.inspect(worker, "ping") == {"ok": "pong"}
        with redis.Redis.from_url(server.url) as raw:
            assert not raw.exists("t6")


def test_the_front_never_imports_torch(worker: Worker) -> None:
    maps = Path(f"/proc/{worker.process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert str(REPOSITORY) in maps

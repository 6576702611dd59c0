"""The pool, without processes: Celery's view of what the front does."""

import signal
from typing import Any

import pytest
from celery.worker import state as worker_state

from hortator.producer.schema import State
from hortator.workers import commands
from hortator.workers.claimer import NO_ROOM
from hortator.workers.engine.step import Finish
from hortator.workers.pool import EnginePool
from hortator.workers.request import PromptRequest
from tests.workers.leader import MODEL, Leader
from tests.workers.messages import message


class FakeApp:
    def __init__(self, leader: Leader) -> None:
        self.settings = leader.settings


class Request(PromptRequest):
    """A request without a consumer."""

    def __init__(self, job_id: str, claimed: Any, envelope: Any) -> None:
        self.id, self.name = job_id, "llm.generate"
        self.claimed, self.envelope = claimed, envelope
        self.events: list[str] = []

    @property
    def _watched(self) -> bool:
        return True

    def send_event(self, type: str, **fields: Any) -> None:
        self.events.append(type)


class Pool(EnginePool):
    """A pool around a leader of the tests; its requests are made by hand."""

    def __init__(self, leader: Leader) -> None:
        super().__init__(leader.settings.max_num_seqs, app=FakeApp(leader))
        self.front, self._group = leader.front, leader.group
        leader.front._watcher = self
        self.made: dict[str, Request] = {}
        self.consumed_by(self.make)

    def make(self, received: Any) -> None:
        request = Request(received.headers["id"], received.claimed, received.envelope)
        self.made[request.id] = request
        worker_state.task_reserved(request)
        self.run(request)


@pytest.fixture
def leader() -> Leader:
    return Leader()


@pytest.fixture
def pool(leader: Leader, monkeypatch: pytest.MonkeyPatch) -> Pool:
    worker_state.reset_state()
    monkeypatch.setattr(worker_state, "should_stop", None)
    return Pool(leader)


def send(leader: Leader, pool: Pool, job_id: str = "id-1", **kwargs: Any) -> Request:
    leader.store.push(MODEL, message(job_id, **({"prompt": "hi"} | kwargs)))
    leader.clock.now += 0.1
    pool.turn()
    return pool.made[job_id]


def test_a_prompt_is_active_from_its_admission_to_its_commit(leader: Leader, pool: Pool) -> None:
    request = send(leader, pool)
    assert request in worker_state.active_requests
    leader.step("a", finish=Finish.LENGTH)
    assert request not in worker_state.active_requests
    assert worker_state.requests == {}
    assert request.events == ["task-started", "task-succeeded"]
    assert "id-1" in worker_state.successful_requests


def test_a_prompt_stays_active_while_redis_has_not_taken_its_result(leader: Leader, pool: Pool) -> None:
    request = send(leader, pool)
    leader.redis.away = True
    leader.step("a", finish=Finish.LENGTH)
    assert request in worker_state.active_requests
    assert request.events == ["task-started"]


def test_a_fenced_result_is_announced_to_nobody(leader: Leader, pool: Pool) -> None:
    request = send(leader, pool)
    leader.redis.away = True
    leader.step("a", finish=Finish.LENGTH)
    leader.clock.now += 7
    leader.store.sweep()
    leader.redis.away = False
    pool.turn()
    assert request.events == ["task-started"]
    assert request not in worker_state.active_requests


def test_a_failed_prompt_is_announced_as_failed(leader: Leader, pool: Pool) -> None:
    assert send(leader, pool, prompt="x" * 99).events == ["task-failed"]


def test_a_prompt_that_goes_back_is_announced_as_requeued(leader: Leader, pool: Pool) -> None:
    request = send(leader, pool)
    leader.front.hand_back()
    pool.turn()
    assert request.events == ["task-started", "task-rejected"]
    assert worker_state.requests == {}


def test_after_a_reconnect_celery_knows_again_what_runs(leader: Leader, pool: Pool) -> None:
    request = send(leader, pool)
    worker_state.reset_state()
    pool.flush()
    assert worker_state.requests == {"id-1": request}
    assert request in worker_state.active_requests
    assert request in worker_state.reserved_requests


def test_a_reject_with_requeue_is_a_hand_back(leader: Leader, pool: Pool) -> None:
    send(leader, pool)
    lease = leader.front._live["id-1"].lease
    pool.reject(lease, requeue=True)
    pool.front.drain()
    pool.turn()
    assert leader.status().state is State.QUEUED
    assert leader.store.claim(MODEL, owner="x", limit=1, lease_s=9, idle=False).jobs[0].lease.job_id == "id-1"


def test_a_message_that_celery_takes_but_drops_does_not_vanish(leader: Leader, pool: Pool) -> None:
    pool.consumed_by(lambda _: None)
    leader.store.push(MODEL, message("id-1", prompt="hi"))
    leader.clock.now += 0.1
    pool.turn()
    assert leader.status().state is State.FAILED
    assert leader.store.dead_letters()[0].job_id == "id-1"


def test_a_message_on_which_celery_stumbles_ends_nothing_else(leader: Leader, pool: Pool) -> None:
    def stumble(_: Any) -> None:
        raise TypeError("unhashable")

    pool.consumed_by(stumble)
    leader.store.push(MODEL, message("id-1", prompt="hi"))
    leader.clock.now += 0.1
    pool.turn()
    assert leader.status().state is State.FAILED


def test_without_a_consumer_nothing_is_claimed(leader: Leader, pool: Pool) -> None:
    pool.consumed_by(None)
    leader.enqueue()
    leader.clock.now += 0.1
    pool.turn()
    assert leader.status().state is State.QUEUED


def test_who_left_the_queue_says_so_while_what_runs_goes_on(leader: Leader, pool: Pool) -> None:
    send(leader, pool)
    pool.left_queue(lambda: None)
    assert (leader.front.state, leader.front.room()) == ("draining", NO_ROOM)
    leader.step("a", finish=Finish.LENGTH)
    assert leader.status().state is State.SUCCEEDED
    pool.joined_queue()
    assert leader.front.state == "ready"


def test_resume_takes_back_also_what_celery_was_told(pool: Pool) -> None:
    pool.left_queue(pool.joined_queue)
    pool.resume()
    assert pool.front.state == "ready"


def test_a_consumer_that_a_reconnect_replaces_is_no_draining(leader: Leader, pool: Pool) -> None:
    pool.consumed_by(None)
    assert leader.front.state == "ready"


def test_a_fatal_front_ends_the_worker(leader: Leader, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_state, "should_stop", None)
    leader.front.fatal = "no such model"
    pool.turn()
    assert worker_state.should_stop == 1


def test_the_first_signal_is_celerys_and_the_second_ends_the_waiting(
    leader: Leader, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_state, "should_stop", None)
    passed_on: list[int] = []
    handle = pool._on_signal(lambda number, frame: passed_on.append(number))
    handle(signal.SIGTERM, None)
    assert (passed_on, pool._now) == ([signal.SIGTERM], False)
    assert leader.front.state == "stopping"
    handle(signal.SIGTERM, None)
    assert (passed_on, pool._now) == ([signal.SIGTERM], True)


def test_the_pool_runs_nothing_but_prompts(pool: Pool) -> None:
    with pytest.raises(NotImplementedError):
        pool.apply_async(print)


def test_a_stop_after_a_restart_wins(pool: Pool) -> None:
    commands.restart(pool)
    assert pool.again
    commands.stop(pool)
    assert not pool.again


def test_a_signal_after_a_restart_wins(pool: Pool) -> None:
    commands.restart(pool)
    pool._on_signal(lambda *_: None)(signal.SIGTERM, None)
    assert not pool.again


def test_a_signal_after_a_hangup_wins(pool: Pool) -> None:
    pool._on_hangup(signal.SIGHUP, None)
    pool._on_signal(lambda *_: None)(signal.SIGTERM, None)
    pool.turn()
    assert not pool.again


def test_a_restart_does_not_call_back_who_stops_already(pool: Pool) -> None:
    commands.stop(pool)
    commands.restart(pool)
    assert not pool.again

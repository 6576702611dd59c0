"""Celery ends a task: the job ends through the front, or not at all."""

from typing import Any

import pytest
from celery import states
from celery.exceptions import TaskRevokedError, TimeLimitExceeded

from hortator.producer.schema import Failure, State
from hortator.workers.backend import StoreBackend


class FakeFront:
    def __init__(self, *, here: bool) -> None:
        self.here = here
        self.ended: list[tuple[str, State, Failure]] = []
        self.elsewhere: list[str] = []

    def end(self, job_id: str, state: State, failure: Failure) -> bool:
        self.ended.append((job_id, state, failure))
        return self.here

    def cancel_elsewhere(self, job_id: str) -> None:
        self.elsewhere.append(job_id)


class FakeApp:
    front: Any = None


def backend(front: FakeFront | None) -> Any:
    bare = StoreBackend.__new__(StoreBackend)
    bare.app = FakeApp()
    bare.app.front = front
    return bare


def test_a_revoked_task_is_a_cancelled_job() -> None:
    front = FakeFront(here=True)
    backend(front).mark_as_revoked("id-1", "terminated")
    assert [(job_id, state) for job_id, state, _ in front.ended] == [("id-1", State.CANCELLED)]
    assert front.elsewhere == []


def test_a_task_whose_expires_passed_is_an_expired_job() -> None:
    front = FakeFront(here=True)
    backend(front).store_result("id-1", TaskRevokedError("expired"), states.REVOKED)
    assert front.ended[0][1] is State.EXPIRED


def test_a_failure_that_celery_found_is_a_failed_job_with_its_words() -> None:
    front = FakeFront(here=True)
    backend(front).mark_as_failure("id-1", TimeLimitExceeded(5))
    job_id, state, failure = front.ended[0]
    assert (job_id, state) == ("id-1", State.FAILED)
    assert "TimeLimitExceeded" in failure.message


def test_a_revoked_task_that_is_not_here_is_cancelled_in_the_store() -> None:
    front = FakeFront(here=False)
    backend(front).mark_as_revoked("id-1", "revoked")
    assert front.elsewhere == ["id-1"]


@pytest.mark.parametrize("state", [states.STARTED, states.RETRY, states.RECEIVED, states.PENDING])
def test_states_on_the_way_are_not_written(state: str) -> None:
    front = FakeFront(here=True)
    backend(front).store_result("id-1", None, state)
    assert front.ended == []


def test_a_process_without_a_front_writes_nothing() -> None:
    backend(None).store_result("id-1", {"text": "forged"}, states.SUCCESS)

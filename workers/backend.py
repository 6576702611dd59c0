"""Celery's result backend: it reads what any Celery reads, and writes only through the front, fenced by the lease."""

import logging
from typing import Any

from celery import states
from celery.backends.redis import RedisBackend

from hortator.producer.schema import Failure, State

logger = logging.getLogger("hortator.front")


class StoreBackend(RedisBackend):  # type: ignore[misc]
    """Where Celery itself ends a task (revoked, expired, unknown), the store ends the job.

    Outcomes of the engine do not come this way: the front commits a whole step's at once.  STARTED is written by the
    store's claim.  Nothing is ever written over a terminal state, because the store's commit refuses that.
    """

    def store_result(
        self, task_id: str, result: Any, state: str, traceback: str | None = None, request: Any = None, **_: Any
    ) -> Any:
        """End the job if `state` is terminal; other states are the store's own business."""
        front = getattr(self.app, "front", None)
        if front is None or state not in states.READY_STATES:
            return result
        if not front.end(task_id, *_ending(state, result)) and state == states.REVOKED:
            front.cancel_elsewhere(task_id)
        return result


def _ending(state: str, result: Any) -> tuple[State, Failure]:
    if state != states.REVOKED:
        return State.FAILED, Failure(code="failed", message=f"{type(result).__name__}: {result}")
    if str(result) == "expired":
        return State.EXPIRED, Failure(code="expired", message="the task's `expires` passed before it was started")
    return State.CANCELLED, Failure(code="cancelled", message="the task was revoked")

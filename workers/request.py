"""A prompt in flight, as Celery sees it: what `inspect`, `revoke`, events and signals talk about.

The engine does the work, and the front decides how it ends; a request only mirrors that, truthfully.
"""

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery import signals
from celery.exceptions import TaskRevokedError
from celery.utils.log import get_logger
from celery.worker import state as worker_state
from celery.worker.request import Request

from hortator.producer.schema import State
from hortator.producer.store import Outcome, Verdict

if TYPE_CHECKING:
    from .pool import EnginePool
    from .transport import ClaimedMessage

logger = get_logger("hortator.front")


class PromptRequest(Request):  # type: ignore[misc]
    """Shows as active from its admission until the store has its outcome."""

    consumer: Any = None  # for its event dispatcher, which a reconnect replaces
    claimed: Any = None
    envelope: Any = None

    def execute_using_pool(self, pool: "EnginePool", **_: Any) -> None:
        if self.revoked():
            raise TaskRevokedError(self.id)
        pool.run(self)

    def accepted(self) -> None:
        """The engine has it."""
        self.worker_pid = os.getpid()
        self.time_start = time.time()
        worker_state.task_accepted(self)
        if self._watched:
            self.send_event("task-started")

    def finished(self, outcome: Outcome, verdict: Verdict) -> None:
        """The store has its outcome."""
        self.acknowledged = True  # the commit was the ack
        succeeded = outcome.state is State.SUCCEEDED and verdict is Verdict.COMMITTED
        worker_state.task_ready(self, successful=succeeded)
        if verdict is Verdict.FENCED or self._already_revoked:
            return
        if succeeded:
            self._announce_success(outcome)
        else:
            self._announce_end(outcome)

    def left(self) -> None:
        """It went back to the queue, or to another leader."""
        self.acknowledged = True
        worker_state.task_ready(self)
        if self._watched:
            self.send_event("task-rejected", requeue=True)

    def send_event(self, type: str, **fields: Any) -> None:
        dispatcher = self.consumer.event_dispatcher
        if dispatcher and dispatcher.enabled:
            dispatcher.send(type, uuid=self.id, **fields)

    @property
    def _watched(self) -> bool:
        dispatcher = self.consumer.event_dispatcher
        return bool(dispatcher and dispatcher.enabled and (not dispatcher.groups or "task" in dispatcher.groups))

    @property
    def _runtime(self) -> float:
        return time.time() - self.time_start if self.time_start else 0.0

    def _announce_success(self, outcome: Outcome) -> None:
        if signals.task_success.receivers:
            signals.task_success.send(sender=self.task, result=outcome.result)
        if self._watched:
            tokens = outcome.result.usage.completion_tokens if outcome.result else 0
            self.send_event("task-succeeded", result=f"{tokens} tokens", runtime=self._runtime)

    def _announce_end(self, outcome: Outcome) -> None:
        failure = outcome.failure
        reason = f"{failure.code}: {failure.message}" if failure else outcome.state.value
        if outcome.state is State.FAILED:
            if signals.task_failure.receivers:
                signals.task_failure.send(sender=self.task, task_id=self.id, exception=RuntimeError(reason))
            if self._watched:
                self.send_event("task-failed", exception=reason, traceback="")
            return
        expired = outcome.state is State.EXPIRED
        if signals.task_revoked.receivers:
            signals.task_revoked.send(
                sender=self.task, request=self._context, terminated=not expired, signum=None, expired=expired
            )
        if self._watched:
            self.send_event("task-revoked", terminated=not expired, signum=None, expired=expired)


def strategy(task: Any, app: Any, consumer: Any) -> Callable[..., None]:
    """What the consumer does with a message of our task: Celery's default, less what prompts do not have."""
    hostname, connection_errors = consumer.hostname, consumer.connection_errors
    revoked = consumer.controller.state.revoked
    handle = consumer.on_task_request

    def receive(message: "ClaimedMessage", body: Any, ack: Any, reject: Any, callbacks: Any) -> None:
        request = PromptRequest(
            message, on_ack=ack, on_reject=reject, app=app, hostname=hostname, eventer=None, task=task,
            connection_errors=connection_errors, body=message.payload, headers=message.headers, decoded=True,
        )  # fmt: skip
        request.consumer = consumer
        request.claimed, request.envelope = message.claimed, message.envelope
        if (request.expires or request.id in revoked) and request.revoked():
            return
        logger.debug("job %s attempt %d is claimed", request.id, message.claimed.lease.attempt)
        if signals.task_received.receivers:
            signals.task_received.send(sender=consumer, request=request)
        if request._watched:
            _announce_receipt(request)
        worker_state.task_reserved(request)
        for callback in callbacks or ():
            callback(request)
        handle(request)

    return receive


def _announce_receipt(request: PromptRequest) -> None:
    request.send_event(
        "task-received", name=request.name, args=request.argsrepr, kwargs=request.kwargsrepr,
        root_id=request.root_id, parent_id=request.parent_id, retries=request.request_dict.get("retries", 0),
        eta=None, expires=request.expires and request.expires.isoformat(),
    )  # fmt: skip

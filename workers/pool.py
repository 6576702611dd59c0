"""The Celery pool whose worker is the model group: no thread and no process per prompt.

It lends the front Celery's event loop, mirrors what becomes of every job in Celery's requests, and stands in for the
task queue (transport.Claims).
"""

import logging
import math
import os
import select
import signal
import time
from collections.abc import Callable
from typing import Any, cast

from celery.concurrency.base import BasePool
from celery.exceptions import WorkerShutdown
from celery.platforms import EX_FAILURE
from celery.worker import state as worker_state

from hortator.producer.errors import HortatorError
from hortator.producer.store import Claimed, Lease, Outcome, Verdict
from hortator.topology.vitals import Vitals
from hortator.variables import strange_to_worker

from .collector import spare_what_is_loaded
from .request import PromptRequest
from .settings import WorkerSettings
from .transport import ClaimedMessage

logger = logging.getLogger("hortator.front")

HAND_IN = 16  # jobs that the engine gets at a time
LAST_WORDS_S = 3.0  # at the end of the grace: time to tell the store what goes back


class EnginePool(BasePool):  # type: ignore[misc]
    """One model group."""

    uses_semaphore = False
    body_can_be_buffer = False
    task_join_will_block = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings: WorkerSettings = self.app.settings
        self.queue = self.settings.queue
        self.limit = self.settings.max_num_seqs
        self.front: Any = None
        self._requests: dict[str, PromptRequest] = {}
        self._deliver: Callable[[ClaimedMessage], None] | None = None
        self._rejoin: Callable[[], None] | None = None  # while Celery was told to leave the queue
        self._hub: Any = None
        self._timer: Any = None
        self._timer_at = 0.0
        self._stopping = False
        self._num_signals = 0
        self._hung_up = False
        self.again = False  # once all has ended, start anew in the same process
        self._now = False  # do not wait for what runs
        self._hand_back_at = math.inf  # a drained group's patience

    # ---- Celery's pool interface

    def on_start(self) -> None:
        """Start the group and, while its ranks load, everything that the front needs."""
        for said in strange_to_worker(os.environ):
            logger.warning("%s", said)
        self._watch_signals()
        try:
            self._group = self.app.make_group()
            self._group.start()
            try:
                self.front = self.app.make_front(self._group, watcher=self)
            except BaseException:
                self._group.close()
                raise
        except HortatorError as error:
            logger.critical("%s", error.message)
            raise WorkerShutdown(EX_FAILURE) from error

    def register_with_event_loop(self, loop: Any) -> None:
        """Called again after every reconnect of the broker."""
        if self._hub is None:
            spare_what_is_loaded()
        self._hub = loop
        loop.add_reader(self._group.fileno(), self._on_readable)
        self._on_timer()

    def run(self, request: PromptRequest) -> None:
        """A request of the consumer goes to the engine."""
        self._requests[request.id] = request
        if self.front.admit(request.claimed, request.envelope):
            request.accepted()
        request.claimed = request.envelope = None  # the prompt may be large, and is in the engine now

    def on_apply(self, target: Any, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("this pool runs prompts only")

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        """A revoked prompt is ended through the backend; there is no process to kill."""

    def flush(self) -> None:
        """The broker connection was lost, and Celery forgot what it had reserved; the engine still runs it."""
        for request in self._requests.values():
            worker_state.requests[request.id] = request
            worker_state.reserved_requests.add(request)
            worker_state.active_requests.add(request)

    def on_close(self) -> None:
        self.front.stop(again=self.again)

    def on_stop(self) -> None:
        """Finish what runs within the grace, hand the rest back.  Celery's loop has ended, so this runs its own."""
        if self._stopping:
            self._now = True
            return
        self._stopping = True
        front = self.front
        front.stop(again=self.again)
        front.tick()  # says so even if nothing runs: ranks take a moment to end
        num_running = front.num_live
        if num_running:
            logger.info("draining: %d jobs run, up to %g s", num_running, self.settings.grace_s)
        until = time.monotonic() + self.settings.grace_s
        while front.num_live and not self._now and time.monotonic() < until:
            self.run_for(0.05)
        num_back = front.num_live
        front.hand_back()
        until = time.monotonic() + LAST_WORDS_S
        while front.busy and time.monotonic() < until:
            self.run_for(0.02)
        if num_running:
            logger.info("drained: %d jobs handed back", num_back)
        self._group.close()
        front.leave()

    def drain(self) -> None:
        """Claim nothing more, and when the grace is over hand back what still runs; the group stays up, idle."""
        self.front.drain()
        self._hand_back_at = time.monotonic() + self.settings.grace_s

    def resume(self) -> None:
        """Claim again, whichever way the group was told to claim nothing."""
        self._hand_back_at = math.inf
        self.front.resume()
        if self._rejoin is not None:
            self._rejoin()

    def left_queue(self, rejoin: Callable[[], None]) -> None:
        """Celery was told to consume nothing (`cancel_consumer`); a consumer that a reconnect replaces is no such
        word."""
        self._rejoin = rejoin
        self.front.consume(False)

    def joined_queue(self) -> None:
        """Celery consumes again."""
        self._rejoin = None
        self.front.consume(True)

    def on_terminate(self) -> None:
        """A cold shutdown."""
        self._now = True
        self.on_stop()

    def _get_info(self) -> dict[str, Any]:
        front = self.front
        return {
            **super()._get_info(),
            "group": self.settings.group,
            "model": self.queue,
            "state": front.state,
            "epoch": self._group.epoch,
            "running": front.num_live,
            "capacity": front.capacity,
            **front.details(),
        }

    @property
    def members(self) -> dict[int, Vitals]:
        """The ranks, on whatever hosts they are."""
        return dict(self._group.members)

    # ---- the loop

    def turn(self) -> None:
        """One round: what the group reports, what is due, what can be claimed, and what must be told."""
        front = self.front
        if self._hung_up:
            self._hung_up = False
            self._start_again()
        front.on_events(self._group.poll())
        front.tick()
        if time.monotonic() >= self._hand_back_at:
            self._hand_back_at = math.inf
            front.hand_back()
        front.flush()  # results first: somebody waits for them, while the engine has a few jobs in reserve
        if self._deliver is not None:
            for index, claimed in enumerate(front.take()):
                self._hand_in(claimed)
                if index % HAND_IN == HAND_IN - 1:
                    front.submit()  # the engine begins with these while the others are prepared
            front.flush()
        if front.fatal is not None and worker_state.should_stop is None:
            logger.critical("%s", front.fatal)
            worker_state.should_stop = EX_FAILURE

    def run_for(self, seconds: float) -> None:
        """Turn without Celery's loop, while it waits for the broker or has ended."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            select.select([self._group.fileno()], [], [], min(left, self.front.wake_in()))
            self.turn()

    def _on_readable(self) -> None:
        self.turn()
        if time.monotonic() + self.front.wake_in() < self._timer_at:
            self._schedule()

    def _on_timer(self) -> None:
        try:
            if not self.front.wake_in():  # else a report has brought a turn meanwhile
                self.turn()
        finally:  # Celery logs what a timer raises and goes on; so must we
            self._schedule()

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        delay = self.front.wake_in()
        self._timer_at = time.monotonic() + delay
        self._timer = self._hub.call_later(delay, self._on_timer)

    def _hand_in(self, claimed: Claimed) -> None:
        envelope = self.front.open(claimed)
        if envelope is None or self._deliver is None:
            return
        reason = "Celery did not accept the message"
        try:
            self._deliver(ClaimedMessage(claimed, envelope))
        except Exception as error:
            # Headers are bytes from outside: whatever Celery makes of them must not end the worker, nor fill its log.
            kind = type(error).__name__
            logger.error("a Celery header of job %s has a wrong type: %s", claimed.lease.job_id, kind)
            logger.debug("where Celery met it", exc_info=True)
            reason = f"a Celery header has a wrong type ({kind}): send it without headers of your own"
        self.front.refuse(claimed.lease, reason)  # unless it was accepted

    # ---- the task queue, for the transport

    def consumed_by(self, deliver: Callable[[ClaimedMessage], None] | None) -> None:
        self._deliver = deliver

    def ack(self, lease: Lease) -> None:
        """Nothing to do: a commit is the ack."""

    def reject(self, lease: Lease, *, requeue: bool) -> None:
        if requeue:
            self.front.hand_back([lease], reason="rejected")
        else:
            self.front.refuse(lease, "the message was rejected")

    def refuse(self, message: ClaimedMessage, reason: str) -> None:
        """Celery cannot make a request of it."""
        self.front.refuse(cast(Lease, message.delivery_tag), reason)

    # ---- front.Watcher

    def ended(self, outcome: Outcome, verdict: Verdict) -> None:
        request = self._requests.pop(outcome.lease.job_id, None)
        if request is not None:
            request.finished(outcome, verdict)

    def gone(self, lease: Lease, reason: str) -> None:
        request = self._requests.pop(lease.job_id, None)
        if request is not None:
            request.left()

    # ---- signals

    def _watch_signals(self) -> None:
        """The first SIGTERM or SIGINT is Celery's warm shutdown; the second, or SIGQUIT, hands back at once.  SIGHUP
        starts anew wherever Celery would; its own way forgets the `-m` of `python -m celery`, and so dies of it."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, self._on_signal(signal.getsignal(number)))
        if callable(signal.getsignal(signal.SIGHUP)):  # else the terminal's end is ours
            signal.signal(signal.SIGHUP, self._on_hangup)

    def _on_hangup(self, number: int, frame: Any) -> None:
        """The next turn obeys: what it logs must not be logged in the middle of another line."""
        self._hung_up = True

    def _start_again(self) -> None:
        from .commands import restart  # which needs this module

        restart(self)

    def _on_signal(self, celerys: Any) -> Callable[[int, Any], None]:
        def handle(number: int, frame: Any) -> None:
            self._num_signals += 1
            self.again = self._hung_up = False
            if self.front is not None:
                self.front.stop()
            if self._num_signals == 1 and number != signal.SIGQUIT and callable(celerys):
                celerys(number, frame)
                return
            self._now = True
            worker_state.should_stop = worker_state.should_stop or 0

        return handle

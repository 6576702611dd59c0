"""Celery's consumer blueprint for a leader: while the broker is away, the front goes on."""

import logging
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from celery.exceptions import CPendingDeprecationWarning, InvalidTaskError, WorkerShutdown, WorkerTerminate
from celery.platforms import EX_FAILURE
from celery.worker import control
from celery.worker.consumer import Consumer
from celery.worker.state import maybe_shutdown
from kombu.exceptions import OperationalError

from hortator.producer.schema import TASK_NAME

logger = logging.getLogger("hortator.front")

RETRY_EVERY_S = 0.5


class LeaderConsumer(Consumer):  # type: ignore[misc]
    """Connects with the pool's claims as task queue.

    Without mingle (it stops the start, and every reconnect, for a second) and gossip (nobody listens to it): the store
    knows what is cancelled, and which groups live.
    """

    def __init__(self, *args: Any, worker_options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        options = dict(worker_options or {}, without_mingle=True, without_gossip=True)
        super().__init__(*args, worker_options=options, **kwargs)

    def start(self) -> None:
        """What Celery gives up (it has no file descriptors left) is a failure, and its exit code says so."""
        try:
            super().start()
        except WorkerTerminate as end:
            if end.__cause__ is None:
                raise
            logger.critical("%s: raise the limit (ulimit -n)", end.__cause__)
            raise WorkerShutdown(EX_FAILURE) from end

    def ensure_connected(self, conn: Any) -> Any:
        """Like the base class's, but it never sleeps: leases are renewed and results kept in the meantime."""
        conn.transport.claims = self.pool
        failures = 0
        while True:
            maybe_shutdown()
            try:
                conn.ensure_connection(max_retries=0)  # connect() would sleep for 2 s
            except (*conn.connection_errors, *conn.channel_errors, OperationalError) as error:
                if failures == 0:
                    logger.error("cannot connect to %s: %s; trying again", conn.as_uri(), error)
                failures += 1
                conn.collect()
                conn.transport.claims = self.pool
                self.pool.run_for(RETRY_EVERY_S)
            else:
                self.first_connection_attempt = False
                return conn

    def create_task_handler(self, *_: Any) -> Callable[[Any], None]:
        """Claimed messages are known to be ours and decoded: no promises around acks that a lease makes needless."""
        receive = self.strategies[TASK_NAME]

        def on_task_received(message: Any) -> None:
            try:
                receive(message, None, message.ack_log_error, message.reject_log_error, self.on_task_message)
            except InvalidTaskError as error:
                self.on_invalid_task(None, message, error)

        return on_task_received

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Without the advice on a setting that a leader does not need: its prompts go on, their leases are renewed."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CPendingDeprecationWarning)
            super().on_connection_error_after_connected(exc)

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Cannot happen to claimed messages; whatever it is must not be acked as if it were done."""
        logger.error("a message cannot be decoded: %s", type(exc).__name__)
        message.reject()

    def on_unknown_message(self, body: Any, message: Any) -> None:
        message.reject()

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Celery found the headers wrong (an `expires` that is no date, say)."""
        self.pool.refuse(message, str(exc))

    def add_task_queue(self, queue: str, *args: Any, **options: Any) -> None:
        if queue == self.pool.queue:  # others are refused by the command below
            super().add_task_queue(queue, *args, **options)
            self.pool.joined_queue()

    def cancel_task_queue(self, queue: str) -> None:
        super().cancel_task_queue(queue)
        if queue == self.pool.queue:
            self.pool.left_queue(partial(self.call_soon, self.add_task_queue, queue))


@control.control_command(  # type: ignore[untyped-decorator]
    args=[("queue", str), ("exchange", str), ("exchange_type", str), ("routing_key", str)],
    signature="<queue> [exchange [type [routing_key]]]",
)
def add_consumer(
    state: Any, queue: str, exchange: Any = None, exchange_type: Any = None, routing_key: Any = None, **options: Any
) -> dict[str, str]:
    """Tell worker(s) to consume from task queue by name.  A leader serves its model's queue only, and says so."""
    own = getattr(state.consumer.pool, "queue", queue)
    if queue != own:
        return {"error": f"this worker serves the queue {own!r} only"}
    state.consumer.call_soon(state.consumer.add_task_queue, queue, exchange, exchange_type, routing_key, **options)
    return {"ok": f"add consumer {queue}"}

"""The kombu transport of a leader: Redis as any Celery knows it, but for the task queue.

Remote control, events and replies stay byte for byte what stock clients speak.  The task queue is not popped by kombu:
`claim` hands in jobs that the store has already leased, so nothing is ever between "popped" and "recorded", nothing is
kept in `unacked`, and nothing is restored while it runs.  Acks and rejects go by lease, not by channel, and so survive
a reconnect.  In a process without claims (inspect, control, AsyncResult) this is the stock transport.
"""

import logging
from collections.abc import Callable
from typing import Any, Protocol

from kombu.exceptions import ChannelError, DecodeError
from kombu.message import Message
from kombu.transport import redis, virtual
from redis.backoff import NoBackoff
from redis.retry import Retry

from hortator.producer.store import Claimed, Lease

from .envelope import Envelope

logger = logging.getLogger("hortator.front")

REDACTED = "(redacted)"


class Claims(Protocol):
    """Where the messages of the task queue come from, and where their acks go."""

    @property
    def queue(self) -> str:
        """The one queue that is consumed by claiming."""

    def consumed_by(self, deliver: "Callable[[ClaimedMessage], None] | None") -> None:
        """Start, or with None stop, handing in messages."""

    def ack(self, lease: Lease) -> None:
        """Celery is done with the message."""

    def reject(self, lease: Lease, *, requeue: bool) -> None:
        """Celery does not want the message: back to the queue, or to the dead letters."""


class ClaimedMessage(Message):  # type: ignore[misc]
    """A message that is leased already and decoded already.  Its delivery tag is the lease."""

    def __init__(self, claimed: Claimed, envelope: Envelope, *, channel: Any = None) -> None:
        properties = envelope.properties
        super().__init__(
            body=b"",
            delivery_tag=claimed.lease,
            content_type="application/json",
            content_encoding="utf-8",
            delivery_info=properties.get("delivery_info"),
            properties=properties,
            channel=channel,
        )
        self.claimed = claimed
        self.envelope = envelope
        # Celery shows arguments in events, logs and `inspect`; a prompt is nobody's business there.
        self.headers = envelope.headers | {"argsrepr": REDACTED, "kwargsrepr": REDACTED, "id": claimed.lease.job_id}
        self._decoded_cache: Any = ([], {}, {})


class QoS(virtual.QoS):  # type: ignore[misc]
    """Messages of this transport are leased in the store; there is nothing to remember and nothing to restore."""

    restore_at_shutdown = False

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Leases expire in the store."""


class Channel(redis.Channel):  # type: ignore[misc]
    """A stock channel, but for the queue of its transport's claims."""

    QoS = QoS

    def __init__(self, connection: "Transport", **kwargs: Any) -> None:
        # A message may be acked when its channel is long closed, so the channel keeps the claims itself.
        self._claims: Any = connection.claims
        self._claim_tags: set[str] = set()
        super().__init__(connection, **kwargs)

    def basic_consume(self, queue: str, no_ack: bool, callback: Any, consumer_tag: str, **kwargs: Any) -> None:
        if self._claims is None or no_ack or queue in self._fanout_queues:
            super().basic_consume(queue, no_ack, callback, consumer_tag, **kwargs)
            return
        if queue != self._claims.queue:
            raise ChannelError(f"this worker serves the queue {self._claims.queue!r} only, not {queue!r}")
        self._claim_tags.add(consumer_tag)

        def deliver(message: ClaimedMessage) -> None:
            message.channel = self
            callback(message)

        self._claims.consumed_by(deliver)

    def basic_cancel(self, consumer_tag: str) -> Any:
        if consumer_tag not in self._claim_tags:
            return super().basic_cancel(consumer_tag)
        self._claim_tags.discard(consumer_tag)
        self._claims.consumed_by(None)
        return None

    def basic_ack(self, delivery_tag: Any, multiple: bool = False) -> None:
        if isinstance(delivery_tag, Lease):
            self._claims.ack(delivery_tag)
        else:
            super().basic_ack(delivery_tag, multiple=multiple)

    def basic_reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        if isinstance(delivery_tag, Lease):
            self._claims.reject(delivery_tag, requeue=requeue)
        else:
            super().basic_reject(delivery_tag, requeue=requeue)

    def message_to_python(self, raw_message: Any) -> Any:
        if isinstance(raw_message, ClaimedMessage):
            return raw_message
        return super().message_to_python(raw_message)

    def _connparams(self, asynchronous: bool = False) -> Any:
        """redis-py would wait and retry for seconds inside one call; the front must go on meanwhile."""
        return super()._connparams(asynchronous=asynchronous) | {"retry": Retry(NoBackoff(), 0)}

    def close(self) -> None:
        if self._claim_tags:
            self._claim_tags.clear()
            self._claims.consumed_by(None)
        super().close()


class Transport(redis.Transport):  # type: ignore[misc]
    """Redis, with the task queue claimed."""

    Channel = Channel
    claims: Claims | None = None  # set by the leader's consumer before it connects

    def _deliver(self, message: Any, queue: str) -> None:
        """Anybody can publish anything to the channels of remote control; it must not end the worker."""
        try:
            super()._deliver(message, queue)
        except (TypeError, KeyError, ValueError, AttributeError, DecodeError) as error:
            logger.warning("a message of remote control cannot be read and is dropped: %s", type(error).__name__)

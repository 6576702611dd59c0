"""The transport without a server: what is claimed, and what stays stock."""

from typing import Any

import pytest
from kombu.exceptions import ChannelError

from hortator.producer.store import Claimed, Lease
from hortator.workers import transport
from hortator.workers.envelope import open_envelope
from tests.workers.messages import message

LEASE = Lease("id-1", 1)


class FakeClaims:
    queue = "m"

    def __init__(self) -> None:
        self.deliver: Any = None
        self.acked: list[Lease] = []
        self.rejected: list[tuple[Lease, bool]] = []

    def consumed_by(self, deliver: Any) -> None:
        self.deliver = deliver

    def ack(self, lease: Lease) -> None:
        self.acked.append(lease)

    def reject(self, lease: Lease, *, requeue: bool) -> None:
        self.rejected.append((lease, requeue))


@pytest.fixture
def claims() -> FakeClaims:
    return FakeClaims()


@pytest.fixture
def channel(claims: FakeClaims) -> Any:
    """A channel that never met a server; only the base class's constructor does."""
    bare = transport.Channel.__new__(transport.Channel)
    bare._claims, bare._claim_tags = claims, set()
    bare._fanout_queues, bare._active_queues, bare._consumers, bare._tag_to_queue = {}, [], set(), {}
    bare.no_ack_consumers = set()
    return bare


def claimed(**kwargs: Any) -> transport.ClaimedMessage:
    raw = message("id-1", prompt="secret", **kwargs)
    return transport.ClaimedMessage(Claimed(LEASE, raw, "default", 0, None), open_envelope(raw))


def test_the_task_queue_is_handed_in_and_never_polled(channel: Any, claims: FakeClaims) -> None:
    seen: list[Any] = []
    channel.basic_consume("m", False, seen.append, "tag")
    claims.deliver(claimed())
    assert [received.headers["id"] for received in seen] == ["id-1"]
    assert channel._active_queues == []


def test_another_task_queue_is_refused(channel: Any) -> None:
    with pytest.raises(ChannelError, match="serves the queue 'm' only"):
        channel.basic_consume("other", False, print, "tag")


def test_a_cancelled_consumer_gets_nothing_more(channel: Any, claims: FakeClaims) -> None:
    channel.basic_consume("m", False, print, "tag")
    channel.basic_cancel("tag")
    assert claims.deliver is None


def test_ack_and_reject_go_by_lease(channel: Any, claims: FakeClaims) -> None:
    for act in ("ack", "reject", "requeue"):
        received = claimed()
        received.channel = channel
        getattr(received, act)()
    assert claims.acked == [LEASE]
    assert claims.rejected == [(LEASE, False), (LEASE, True)]


def test_a_message_shows_nothing_of_its_prompt_to_celery() -> None:
    received = claimed(headers={"argsrepr": "('secret',)", "kwargsrepr": "{'prompt': 'secret'}"})
    assert "secret" not in repr((received.headers, received.payload, received.body))


def test_the_lease_is_what_counts_and_not_the_id_that_a_message_claims_for_itself() -> None:
    raw = message("another", prompt="x")
    received = transport.ClaimedMessage(Claimed(LEASE, raw, "default", 0, None), open_envelope(raw))
    assert received.headers["id"] == "id-1"


def test_nothing_is_remembered_or_restored_by_the_channels_qos() -> None:
    assert transport.Channel.QoS.restore_at_shutdown is False
    assert "restore_visible" in vars(transport.QoS)


def test_stock_clients_and_this_transport_share_their_wire() -> None:
    assert transport.Transport.driver_type == "redis"
    assert transport.Channel.keyprefix_fanout == "/{db}."

"""Control frames: what is sealed arrives, and nothing else does."""

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hortator.topology.errors import BadFrame
from hortator.topology.frames import MAX_PAYLOAD_BYTES, Frame, Framer, Kind

KEY = bytes(range(32))
payloads = st.dictionaries(
    st.text(max_size=8), st.one_of(st.integers(), st.text(max_size=20), st.booleans(), st.none()), max_size=4
)


def pair(*, key: bytes = KEY, epoch: int = 1, front_epoch: int = 1) -> tuple[Framer, Framer]:
    return Framer(KEY, epoch=front_epoch, front=True), Framer(key, epoch=epoch, front=False)


@given(
    st.lists(st.tuples(st.sampled_from(Kind), st.integers(0, 0xFFFF), payloads), min_size=1, max_size=5),
    st.integers(1, 40),
)
def test_frames_arrive_as_sent_however_the_stream_is_cut(
    frames: list[tuple[Kind, int, dict[str, object]]], chunk: int
) -> None:
    front, rank = pair()
    stream = b"".join(rank.seal(kind, rank=number, payload=payload) for kind, number, payload in frames)
    arrived = [frame for start in range(0, len(stream), chunk) for frame in front.feed(stream[start : start + chunk])]
    assert arrived == [Frame(kind, number, payload) for kind, number, payload in frames]


@given(st.data())
def test_a_frame_with_one_wrong_byte_is_never_accepted(data: st.DataObject) -> None:
    front, rank = pair()
    sealed = bytearray(rank.seal(Kind.HELLO, rank=1, payload={"pid": 7}))
    position = data.draw(st.integers(0, len(sealed) - 1))
    sealed[position] ^= data.draw(st.integers(1, 255))
    try:
        accepted = list(front.feed(bytes(sealed)))
    except BadFrame:
        accepted = []
    assert accepted == []


@given(st.data())
def test_half_a_frame_yields_nothing(data: st.DataObject) -> None:
    front, rank = pair()
    sealed = rank.seal(Kind.BEAT, rank=1)
    assert list(front.feed(sealed[: data.draw(st.integers(0, len(sealed) - 1))])) == []


@given(st.binary(min_size=4, max_size=64).filter(lambda data: data[:4] != b"HRTC"))
def test_garbage_is_refused_at_its_first_bytes(garbage: bytes) -> None:
    front, _ = pair()
    with pytest.raises(BadFrame):
        list(front.feed(garbage))


def test_another_key_is_refused() -> None:
    front, stranger = pair(key=bytes(32))
    with pytest.raises(BadFrame, match="wrong HMAC"):
        list(front.feed(stranger.seal(Kind.HELLO, rank=0)))


def test_a_frame_of_another_epoch_is_refused() -> None:
    front, old = pair(front_epoch=2)
    with pytest.raises(BadFrame, match="epoch 1, not 2"):
        list(front.feed(old.seal(Kind.HELLO, rank=0)))


def test_the_same_frame_is_not_accepted_twice() -> None:
    front, rank = pair()
    sealed = rank.seal(Kind.WAKE, rank=0)
    assert len(list(front.feed(sealed))) == 1
    with pytest.raises(BadFrame, match="wrong HMAC"):
        list(front.feed(sealed))


def test_a_frame_is_not_accepted_by_its_sender() -> None:
    front, _ = pair()
    with pytest.raises(BadFrame, match="wrong HMAC"):
        list(front.feed(front.seal(Kind.STOP, rank=0)))


def test_a_frame_recorded_on_one_connection_is_refused_on_another() -> None:
    front, rank = pair()
    rank.rekey(b"one")
    front.rekey(b"other")
    with pytest.raises(BadFrame, match="wrong HMAC"):
        list(front.feed(rank.seal(Kind.HELLO, rank=0)))


def test_a_large_announced_size_is_refused_before_it_is_stored() -> None:
    front, _ = pair()
    header = struct.pack("!4sBBHII", b"HRTC", 1, Kind.HELLO, 0, 1, MAX_PAYLOAD_BYTES + 1)
    with pytest.raises(BadFrame, match="allowed"):
        list(front.feed(header))


def test_a_large_payload_is_refused_by_its_sender() -> None:
    with pytest.raises(ValueError, match="limit"):
        pair()[1].seal(Kind.HELLO, rank=0, payload={"x": "y" * MAX_PAYLOAD_BYTES})


@pytest.mark.parametrize("body", [b"[1]", b"nonsense", b"\xff", b"[" * 100_000])
def test_a_payload_that_is_no_object_is_refused(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    front, rank = pair()
    monkeypatch.setattr(json, "dumps", lambda *a, **k: body.decode("latin-1"))
    sealed = rank.seal(Kind.BEAT, rank=0)
    with pytest.raises(BadFrame):
        list(front.feed(sealed))


def test_a_key_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match="31 bytes"):
        Framer(bytes(31), epoch=1, front=True)


@given(st.binary(max_size=200))
def test_what_is_veiled_is_read_by_the_other_end_of_this_connection_only(data: bytes) -> None:
    (front, rank), (_, stranger) = pair(), pair()
    for framer, nonce in ((front, b"this"), (rank, b"this"), (stranger, b"other")):
        framer.rekey(nonce * 4)
    veiled = front.veil(data)
    assert rank.veil(veiled) == data
    assert len(data) < 8 or (veiled != data and stranger.veil(veiled) != data)

"""The pipe between front and rank 0."""

import socket
import struct
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hortator.workers.engine.step import (
    EngineStats,
    Fault,
    Finish,
    Request,
    SamplingParams,
    StepOutput,
    Structure,
    StructureKind,
    Token,
)
from hortator.workers.pipe import (
    MAX_MESSAGE_BYTES,
    TOKENS_PER_MESSAGE,
    Gain,
    Message,
    Pipe,
    PipeBroken,
    Report,
    read_report,
    read_submission,
    report,
    submissions,
)

pairs = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.floats(-50, 0)), max_size=3).map(tuple)
token_ids = st.lists(st.integers(0, 2**31 - 1), max_size=20).map(tuple)
samplings = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 10**6),
    temperature=st.floats(0, 100),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 2**31 - 1),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 2**64 - 1),
    stop_token_ids=token_ids,
    ignore_eos=st.booleans(),
    logprobs=st.booleans(),
    top_logprobs=st.integers(0, 20),
    repetition_penalty=st.floats(0.1, 10),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=pairs,
    min_tokens=st.integers(0, 99),
    structure=st.none() | st.builds(Structure, st.sampled_from(StructureKind), st.text()),
)
requests = st.builds(Request, handle=st.integers(0, 2**40), prompt=token_ids, sampling=samplings, generated=token_ids)
outputs = st.builds(
    StepOutput,
    tokens=st.lists(
        st.builds(Token, st.integers(0, 3), st.integers(0, 2**31 - 1), st.none(), st.just(()))
        | st.builds(Token, st.integers(4, 7), st.integers(0, 2**31 - 1), st.floats(-50, 0), pairs),
        max_size=9,
    ).map(tuple),
    finished=st.lists(st.tuples(st.integers(0, 99), st.sampled_from(Finish)), max_size=3).map(tuple),
    faults=st.lists(st.builds(Fault, st.integers(0, 99), st.text(), st.text()), max_size=3).map(tuple),
)
STATS = EngineStats(running=1, waiting=2, free_blocks=3, total_blocks=4, preemptions=5)


@pytest.fixture
def ends() -> Iterator[tuple[Pipe, socket.socket]]:
    """A pipe and the bare socket at its other end."""
    ours, theirs = socket.socketpair()
    pipe = Pipe(ours)
    yield pipe, theirs
    pipe.close()
    theirs.close()


def carry(message: Message) -> Message:
    """Once through a real pipe."""
    left, right = (Pipe(sock) for sock in socket.socketpair())
    try:
        left.send(message)
        (arrived,) = right.receive()
        return arrived
    finally:
        left.close()
        right.close()


@given(st.lists(requests, max_size=4), st.lists(st.integers(0, 2**40), max_size=4))
def test_submissions_arrive_as_sent(admit: list[Request], cancel: list[int]) -> None:
    arrived = [read_submission(carry(message)) for message in submissions(admit, cancel)]
    assert [request for some, _ in arrived for request in some] == admit
    assert [handle for _, some in arrived for handle in some] == cancel


@given(st.integers(0, 2**40), outputs, st.integers(0, 2**40), st.booleans())
def test_reports_arrive_as_sent_request_by_request(step: int, output: StepOutput, taken: int, idle: bool) -> None:
    arrived = read_report(carry(report(step, output, STATS, taken=taken, idle=idle)))
    assert (arrived.step, arrived.stats, arrived.taken, arrived.idle) == (step, STATS, taken, idle)
    assert (arrived.finished, arrived.faults) == (output.finished, output.faults)
    for handle in range(8):
        assert tokens_of(handle, arrived) == [token for token in output.tokens if token.handle == handle]
    assert len({gain.handle for gain in arrived.gains}) == len(arrived.gains)


def tokens_of(handle: int, arrived: Report) -> list[Token]:
    [gain] = [gain for gain in arrived.gains if gain.handle == handle] or [Gain(handle, ())]
    scores = zip(gain.logprobs, gain.tops, strict=True) if gain.logprobs else [(None, ())] * len(gain.token_ids)
    return [Token(handle, token_id, *score) for token_id, score in zip(gain.token_ids, scores, strict=True)]


def test_very_long_prompts_travel_in_several_messages_and_cancels_come_last() -> None:
    long = tuple(range(TOKENS_PER_MESSAGE))
    admit = [Request(handle, long, SamplingParams(max_tokens=1)) for handle in (1, 2)]
    messages = list(submissions(admit, [1]))
    assert [len(message["admit"]) for message in messages] == [1, 1, 0]
    assert [message.get("cancel", []) for message in messages] == [[], [], [1]]


def test_a_message_in_pieces_waits_for_its_end(ends: tuple[Pipe, socket.socket]) -> None:
    pipe, other = ends
    frame = struct.pack("<I", 7) + b'{"a":1}'
    for byte in frame[:-1]:
        other.sendall(bytes([byte]))
        assert pipe.receive() == []
    other.sendall(frame[-1:] + frame)
    assert pipe.receive() == [{"a": 1}, {"a": 1}]


def test_a_reader_that_does_not_read_never_blocks_the_writer(ends: tuple[Pipe, socket.socket]) -> None:
    pipe, other = ends
    started = time.monotonic()
    for _ in range(50):
        pipe.send({"x": "y" * 100_000})
    assert time.monotonic() - started < 2.0
    assert pipe.unsent
    reader = Pipe(other)
    arrived: list[Message] = []
    while len(arrived) < 50:
        arrived += reader.receive()
        pipe.flush()
    assert not pipe.unsent
    assert all(len(message["x"]) == 100_000 for message in arrived)


def test_what_waits_for_the_reader_is_bounded() -> None:
    ours, theirs = socket.socketpair()
    pipe = Pipe(ours, max_unsent_bytes=1 << 20)
    with theirs, pytest.raises(PipeBroken, match="unread"):
        pipe.send({"x": "y" * (3 << 20)})
    pipe.close()


def test_the_end_is_told_only_after_the_last_whole_message(ends: tuple[Pipe, socket.socket]) -> None:
    pipe, other = ends
    other.sendall(struct.pack("<I", 2) + b"{}" + struct.pack("<I", 100) + b"{")
    other.close()
    assert pipe.receive() == [{}]
    with pytest.raises(PipeBroken, match="gone"):
        pipe.receive()


def test_writing_to_nobody_is_an_error(ends: tuple[Pipe, socket.socket]) -> None:
    pipe, other = ends
    other.close()
    with pytest.raises(PipeBroken, match="gone"):
        pipe.send({})


@pytest.mark.parametrize("body", [b"nonsense", b"[1]", b"\xff\xff", b"[" * 200_000])
def test_nonsense_is_an_error(ends: tuple[Pipe, socket.socket], body: bytes) -> None:
    pipe, other = ends
    other.sendall(struct.pack("<I", len(body)) + body)
    with pytest.raises(PipeBroken, match="a message is not"):
        pipe.receive()


def test_a_size_beyond_the_bound_is_refused_before_anything_is_stored(ends: tuple[Pipe, socket.socket]) -> None:
    pipe, other = ends
    other.sendall(struct.pack("<I", MAX_MESSAGE_BYTES + 1))
    with pytest.raises(PipeBroken, match="limit"):
        pipe.receive()

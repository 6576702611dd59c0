"""The pipe between front and rank 0: length-prefixed JSON both ways, one message per engine step.

Neither end ever blocks on it.  What the other end does not take is kept, up to a bound; the front has leases to renew
and rank 0 has peers that wait, and both must go on while the other one is busy.
"""

import json
import socket
import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

from hortator.producer.errors import GroupFailed

from .engine.step import (
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

MAX_MESSAGE_BYTES = 256 << 20
MAX_UNSENT_BYTES = 256 << 20
TOKENS_PER_MESSAGE = 1_000_000
"""`submissions` starts another message here, so that no honest message comes near the bound."""

_LENGTH = struct.Struct("<I")
_CHUNK_BYTES = 1 << 18
_MAX_READ_BYTES = 16 << 20
_encode = json.JSONEncoder(separators=(",", ":")).encode
_sampling = attrgetter(*SamplingParams.__dataclass_fields__)
_stats = attrgetter(*EngineStats.__dataclass_fields__)
_order = attrgetter("priority", "deadline_ms", "salt")

Message = dict[str, Any]


class PipeBroken(GroupFailed):
    """The other end is gone, does not read, or talks nonsense."""


class Pipe:
    """One end.  Register `fileno()` for reading, and for writing while `unsent`."""

    def __init__(self, sock: socket.socket, *, max_unsent_bytes: int = MAX_UNSENT_BYTES) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._max_unsent_bytes = max_unsent_bytes
        self._unsent = bytearray()
        self._received = bytearray()
        self._ended = False

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def unsent(self) -> bool:
        """Bytes wait for the other end; call `flush` when the socket is writable."""
        return bool(self._unsent)

    def send(self, message: Message) -> None:
        """Queue one message and write what the socket takes.  Raises PipeBroken."""
        body = _encode(message).encode()
        self._unsent += _LENGTH.pack(len(body)) + body
        self.flush()
        if len(self._unsent) > self._max_unsent_bytes:
            raise PipeBroken(f"the other end of the pipe left {len(self._unsent)} bytes unread")

    def flush(self) -> None:
        """Write what the socket takes.  Raises PipeBroken."""
        try:
            while self._unsent:
                del self._unsent[: self._sock.send(memoryview(self._unsent)[:_CHUNK_BYTES])]
        except BlockingIOError:
            return
        except OSError as error:
            raise PipeBroken(f"the other end of the pipe is gone: {error}") from None

    def receive(self) -> list[Message]:
        """The messages that have come; PipeBroken once the end has been reached and all whole messages returned."""
        self._read()
        messages = list(self._messages())
        if self._ended and not messages:
            raise PipeBroken("the other end of the pipe is gone")
        return messages

    def close(self) -> None:
        self._sock.close()

    def _read(self) -> None:
        budget = _MAX_READ_BYTES
        try:
            while budget > 0 and not self._ended:
                data = self._sock.recv(_CHUNK_BYTES)
                self._received += data
                budget -= len(data)
                self._ended = not data
        except BlockingIOError:
            return
        except OSError:
            self._ended = True

    def _messages(self) -> Iterator[Message]:
        start = 0
        while len(self._received) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._received, start)
            if length > MAX_MESSAGE_BYTES:
                raise PipeBroken(f"a message of {length} bytes was announced: the limit is {MAX_MESSAGE_BYTES}")
            end = start + _LENGTH.size + length
            if end > len(self._received):
                break
            yield _parse(self._received[start + _LENGTH.size : end])
            start = end
        del self._received[:start]


def _parse(body: bytearray) -> Message:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise PipeBroken(f"a message is not JSON: {error}") from None
    if not isinstance(message, dict):
        raise PipeBroken("a message is not an object")
    return message


# --- front -> rank 0: admissions and cancels, in the order in which they were submitted


def submissions(admit: Sequence[Request], cancel: Sequence[int]) -> Iterator[Message]:
    """One message, or several when the prompts are very long."""
    batch: list[list[Any]] = []
    num_tokens = 0
    for request in admit:
        batch.append(pack_request(request))
        num_tokens += len(request.prompt) + len(request.generated)
        if num_tokens >= TOKENS_PER_MESSAGE:
            yield {"admit": batch}
            batch, num_tokens = [], 0
    if batch or cancel:
        yield {"admit": batch, "cancel": list(cancel)}


def read_submission(message: Message) -> tuple[list[Request], list[int]]:
    """The inverse of one message of `submissions`."""
    return [unpack_request(item) for item in message.get("admit", ())], list(message.get("cancel", ()))


def pack_request(request: Request) -> list[Any]:
    return [request.handle, request.prompt, request.generated, pack_sampling(request.sampling), _order(request)]


def pack_sampling(sampling: SamplingParams) -> list[Any]:
    """The fields in order, all JSON-ready."""
    *plain, structure = _sampling(sampling)
    return [*plain, structure and [structure.kind, structure.definition]]


def unpack_request(item: list[Any]) -> Request:
    handle, prompt, generated, sampling, order = item
    return Request(handle, tuple(prompt), unpack_sampling(sampling), tuple(generated), *order)


def unpack_sampling(values: list[Any]) -> SamplingParams:
    sampling = dict(zip(SamplingParams.__dataclass_fields__, values, strict=True))
    sampling["stop_token_ids"] = tuple(sampling["stop_token_ids"])
    sampling["logit_bias"] = _pairs(sampling["logit_bias"])
    if sampling["structure"]:
        kind, definition = sampling["structure"]
        sampling["structure"] = Structure(StructureKind(kind), definition)
    return SamplingParams(**sampling)


def _pairs(values: Sequence[Sequence[Any]]) -> tuple[tuple[int, float], ...]:
    return tuple((token_id, value) for token_id, value in values)


# --- rank 0 -> front: what a step gave, or several


class Gain(NamedTuple):
    """What one request got, in order.  Of scores, as in Token, there are as many or none."""

    handle: int
    token_ids: Sequence[int]
    logprobs: Sequence[float | None] = ()
    tops: Sequence[tuple[tuple[int, float], ...]] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """Up to this step, since the last report.  `taken`: how many admissions and cancels this and earlier plans were
    made of; `idle`: of these nothing is left in the ranks."""

    step: int
    gains: tuple[Gain, ...]
    finished: tuple[tuple[int, Finish], ...]
    faults: tuple[Fault, ...]
    stats: EngineStats
    taken: int
    idle: bool


def report(step: int, output: StepOutput, stats: EngineStats, *, taken: int, idle: bool) -> Message:
    """Everything that the front learns of these steps."""
    message: Message = {
        "step": step,
        "stats": _stats(stats),
        "taken": taken,
        "idle": idle,
    }
    if output.tokens:
        message["gains"] = _gains(output.tokens)
    if output.finished:
        message["finished"] = output.finished
    if output.faults:
        message["faults"] = [(fault.handle, fault.code, fault.message) for fault in output.faults]
    return message


def _gains(tokens: Sequence[Token]) -> list[list[Any]]:
    """Gains, as lists; most tokens have no scores."""
    grouped: defaultdict[int, list[Token]] = defaultdict(list)
    for token in tokens:
        grouped[token.handle].append(token)
    gains: list[list[Any]] = []
    for handle, of in grouped.items():
        gains.append([handle, [token.token_id for token in of]])
        if of[0].logprob is not None or of[0].top:
            gains[-1] += [token.logprob for token in of], [token.top for token in of]
    return gains


def read_report(message: Message) -> Report:
    """What `report` was told of, request by request."""
    return Report(
        step=message["step"],
        gains=tuple(_gain(*item) for item in message.get("gains", ())),
        finished=tuple((handle, Finish(finish)) for handle, finish in message.get("finished", ())),
        faults=tuple(Fault(*item) for item in message.get("faults", ())),
        stats=EngineStats(*message["stats"]),
        taken=message["taken"],
        idle=message["idle"],
    )


def _gain(handle: int, token_ids: list[int], logprobs: Sequence[float] = (), tops: Sequence[Any] = ()) -> Gain:
    return Gain(handle, token_ids, logprobs, tuple(map(_pairs, tops)) if tops else ())

"""The lock-step channel: how the leader's step plan reaches every rank, and how ranks notice that they disagree.

A plan is one frame of bytes:

    offset  size  field (little-endian)
    0       4     magic "HRTP"
    4       2     version
    6       2     flags; PARK: no step, wait on the control connection until WAKE
    8       4     epoch
    12      8     step
    20      4     length of the payload
    24      8     digest of what the leader derived from this plan
    32      4     CRC-32 of the payload
    36      4     CRC-32 of the header up to here
    40      4     length of the head (only if there is a payload)
    44      n     head: JSON, one row per admission without its tokens, and the cancelled handles
    44+n    4*k   the token ids of all admissions, int32

Most plans are a bare header.  A frame up to INLINE_BYTES is one broadcast of a tensor of that size; a longer one takes
a second broadcast.  Nothing is pickled, and lengths are checked before anything is allocated.

Why checksums beside the digest: it covers what is scheduled.  A seed or a temperature that came to a rank damaged would
only show in the tokens, and where that rank samples for all, in nothing else.  The header has its own because its
length decides what is received next.
"""

import json
import queue
import struct
import sys
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self
from zlib import crc32

from hortator.producer.errors import GroupFailed

from .engine.step import Request, StepPlan
from .pipe import pack_request, unpack_request

if TYPE_CHECKING:
    from torch import Tensor, device
    from torch.distributed import ProcessGroup

MAGIC = b"HRTP"
VERSION = 2
PARK = 1
INLINE_BYTES = 8192  # on gloo a broadcast costs the same from 32 bytes to 16 KiB
MAX_PLAN_BYTES = 64 << 20
PLAN_TOKENS = 1_000_000
"""`Inbox` leaves further admissions to the next plan beyond this many tokens: 4 MB."""

_FIELDS = struct.Struct("<4sHHIQIQI")
_CHECK = struct.Struct("<I")
_HEADER_BYTES = _FIELDS.size + _CHECK.size
_HEAD_LENGTH = struct.Struct("<I")
_DIGEST_MASK = (1 << 64) - 1


class LockstepError(GroupFailed):
    """A rank got a plan that cannot be, or derived something else from it than the leader."""


class CollectiveFailed(GroupFailed):
    """A broadcast failed, most likely because another rank is gone."""


@dataclass(frozen=True, slots=True)
class Header:
    """The fixed part of a plan's frame."""

    flags: int
    epoch: int
    step: int
    length: int
    digest: int
    checksum: int  # of the payload

    @property
    def park(self) -> bool:
        return bool(self.flags & PARK)

    @classmethod
    def read(cls, frame: bytes | memoryview) -> Self:
        """Raises LockstepError unless these bytes begin a plan of this version, as it was sent, and of a sane size."""
        if len(frame) < _HEADER_BYTES:
            raise LockstepError(f"a plan of {len(frame)} bytes has no header")
        magic, version, *rest = _FIELDS.unpack_from(frame)
        header = cls(*rest)
        if magic != MAGIC or version != VERSION:
            raise LockstepError(f"not a plan of version {VERSION}: magic {magic!r}, version {version}")
        if _CHECK.unpack_from(frame, _FIELDS.size) != (crc32(frame[: _FIELDS.size]),):
            raise LockstepError("the header of a plan was damaged on its way: its checksum is wrong")
        if header.length > MAX_PLAN_BYTES:
            raise LockstepError(f"a plan of {header.length} bytes: the limit is {MAX_PLAN_BYTES}")
        return header


def encode_plan(plan: StepPlan, *, epoch: int, digest: int) -> bytes:
    """The frame of one step."""
    payload = _payload(plan) if plan.admit or plan.cancel else b""
    if len(payload) > MAX_PLAN_BYTES:
        raise LockstepError(f"the plan of step {plan.step} has {len(payload)} bytes: the limit is {MAX_PLAN_BYTES}")
    return _header(0, epoch, plan.step, payload, digest) + payload


def encode_park(*, epoch: int, step: int) -> bytes:
    """The frame that sends the peers to the control connection; `step` is the one that will come next."""
    return _header(PARK, epoch, step, b"", 0)


def _header(flags: int, epoch: int, step: int, payload: bytes, digest: int) -> bytes:
    fields = _FIELDS.pack(MAGIC, VERSION, flags, epoch, step, len(payload), digest & _DIGEST_MASK, crc32(payload))
    return fields + _CHECK.pack(crc32(fields))


def decode_plan(frame: bytes) -> tuple[Header, StepPlan]:
    """The inverse of both.  Raises LockstepError for anything else."""
    header = Header.read(frame)
    payload = memoryview(frame)[_HEADER_BYTES:]
    if len(payload) != header.length:
        raise LockstepError(f"the plan of step {header.step} has {len(payload)} bytes, not {header.length}")
    if crc32(payload) != header.checksum:
        raise LockstepError(f"the plan of step {header.step} was damaged on its way: its checksum is wrong")
    if not header.length:
        return header, StepPlan(header.step)
    try:
        admit, cancel = _read_payload(payload)
    except (ValueError, TypeError, KeyError, struct.error, RecursionError) as error:
        raise LockstepError(f"the plan of step {header.step} cannot be read: {error}") from None
    return header, StepPlan(header.step, admit, cancel)


def _payload(plan: StepPlan) -> bytes:
    rows: list[list[Any]] = []
    tokens = array("i")
    for request in plan.admit:
        handle, prompt, generated, *rest = pack_request(request)
        rows.append([handle, len(prompt), len(generated), *rest])
        tokens += array("i", prompt)
        tokens += array("i", generated)
    if sys.byteorder == "big":
        tokens.byteswap()
    head = json.dumps([rows, plan.cancel], separators=(",", ":")).encode()
    return _HEAD_LENGTH.pack(len(head)) + head + tokens.tobytes()


def _read_payload(payload: memoryview) -> tuple[tuple[Request, ...], tuple[int, ...]]:
    (head_length,) = _HEAD_LENGTH.unpack_from(payload)
    start = _HEAD_LENGTH.size + head_length
    rows, cancel = json.loads(bytes(payload[_HEAD_LENGTH.size : start]))
    tokens = array("i")
    tokens.frombytes(payload[start:])
    if sys.byteorder == "big":
        tokens.byteswap()
    if sum(num_prompt + num_generated for _, num_prompt, num_generated, *_ in rows) != len(tokens):
        raise ValueError("its token counts do not add up")
    admit: list[Request] = []
    at = 0
    for handle, num_prompt, num_generated, *rest in rows:
        middle, end = at + num_prompt, at + num_prompt + num_generated
        admit.append(unpack_request([handle, tokens[at:middle], tokens[middle:end], *rest]))
        at = end
    return tuple(admit), tuple(cancel)


class Inbox:
    """What the front has submitted and no plan has carried yet, in order: a cancel never overtakes its admission."""

    def __init__(self) -> None:
        self._entries: deque[Request | int] = deque()
        self.num_taken = 0  # admissions and cancels that plans were made of, since the start

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, admit: Sequence[Request], cancel: Sequence[int]) -> None:
        self._entries.extend(admit)
        self._entries.extend(cancel)

    def take(self, step: int) -> StepPlan:
        """The next plan: as much as one plan should carry, at least one entry if there is any.

        A request that is cancelled before it has left never leaves, so a plan holds no handle twice.
        """
        admit: dict[int, Request] = {}
        cancel: list[int] = []
        num_tokens = 0
        while self._entries and num_tokens < PLAN_TOKENS:
            entry = self._entries.popleft()
            self.num_taken += 1
            if isinstance(entry, Request):
                admit[entry.handle] = entry
                num_tokens += len(entry.prompt) + len(entry.generated)
            elif admit.pop(entry, None) is None:
                cancel.append(entry)
        return StepPlan(step, tuple(admit.values()), tuple(cancel))


class Follower:
    """A peer's memory of where the group is; every method raises LockstepError naming rank and step."""

    def __init__(self, *, rank: int, epoch: int) -> None:
        self._rank = rank
        self._epoch = epoch
        self._next_step = 1

    def read(self, frame: bytes) -> tuple[Header, StepPlan]:
        """Decode the next plan and check that it is the next one."""
        try:
            header, plan = decode_plan(frame)
        except LockstepError as error:
            raise LockstepError(f"rank {self._rank} at step {self._next_step}: {error.message}") from None
        if header.epoch != self._epoch:
            raise LockstepError(f"rank {self._rank} is in epoch {self._epoch} and got a plan of epoch {header.epoch}")
        if header.step != self._next_step:
            raise LockstepError(f"rank {self._rank} expected step {self._next_step} and got step {header.step}")
        self._next_step += not header.park
        return header, plan

    def check(self, header: Header, digest: int) -> None:
        """Compare what this rank derived with what the leader did."""
        if digest & _DIGEST_MASK != header.digest:
            raise LockstepError(
                f"rank {self._rank} disagrees with the leader at step {header.step}: "
                f"digest {digest & _DIGEST_MASK:016x} instead of {header.digest:016x}"
            )


class Channel(Protocol):
    """Carries frames from the leader to all peers, in order."""

    def broadcast_plan(self, frame: bytes) -> None:
        """Leader: send to every peer.  Raises CollectiveFailed."""

    def wait(self) -> bytes:
        """Peer: the next frame.  Raises CollectiveFailed, or LockstepError for an announced size beyond the limit."""


class InProcessChannel:
    """Twin for threads of one process; a group of one rank uses it with no peer at all."""

    def __init__(self) -> None:
        self._peers: list[queue.SimpleQueue[bytes]] = []
        self._own: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def peer(self) -> "InProcessChannel":
        """The channel of one more peer."""
        peer = InProcessChannel()
        self._peers.append(peer._own)
        return peer

    def broadcast_plan(self, frame: bytes) -> None:
        for peer in self._peers:
            peer.put(frame)

    def wait(self) -> bytes:
        return self._own.get()


class DistributedChannel:
    """torch.distributed broadcasts on the group's own backend.  Rank 0 is the source.

    `ahead`: how many plans may be on their way while the leader goes on, CPU only.  gloo hands a broadcast over when
    the receiver is there, so a leader that waited for that would never be a step ahead of a pipeline's later stages.
    """

    def __init__(
        self, group: "ProcessGroup", device: "device", *, inline_bytes: int = INLINE_BYTES, ahead: int = 0
    ) -> None:
        self._group = group
        self._device = device
        self._inline_bytes = inline_bytes
        self._inline = self._buffer(inline_bytes)
        self._ahead = ahead if device.type == "cpu" else 0
        self._underway: deque[list[tuple[Any, Tensor]]] = deque()  # by plan; a tensor must live until it has gone

    def broadcast_plan(self, frame: bytes) -> None:
        inline, rest = frame[: self._inline_bytes], frame[self._inline_bytes :]
        sends = [self._send(inline, self._buffer(self._inline_bytes) if self._ahead else self._inline)]
        if rest:
            sends.append(self._send(rest, self._buffer(len(rest))))
        self._underway.append(sends)
        while len(self._underway) > self._ahead:
            for work, _ in self._underway.popleft():
                self._finish(work)

    def wait(self) -> bytes:
        host, tensor = self._inline
        self._broadcast(tensor)
        inline = self._bytes(host, tensor)
        size = _HEADER_BYTES + Header.read(inline).length
        if size <= self._inline_bytes:
            return inline[:size]
        host, tensor = self._buffer(size - self._inline_bytes)
        self._broadcast(tensor)
        return inline + self._bytes(host, tensor)

    def _buffer(self, size: int) -> "tuple[Tensor, Tensor]":
        """A host tensor and the one that travels; the same on CPU."""
        import torch

        host = torch.zeros(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        return host, host.to(self._device)

    def _send(self, part: bytes, buffer: "tuple[Tensor, Tensor]") -> "tuple[Any, Tensor]":
        """What to wait for, and what must live until then."""
        host, tensor = buffer
        _view(host)[: len(part)] = part
        return self._start(self._to_device(host, tensor)), tensor

    def _to_device(self, host: "Tensor", tensor: "Tensor") -> "Tensor":
        return tensor if host is tensor else tensor.copy_(host)  # blocking: the next plan reuses the host's buffer

    def _bytes(self, host: "Tensor", tensor: "Tensor") -> bytes:
        if host is not tensor:
            host.copy_(tensor)
        return host.numpy().tobytes()

    def _broadcast(self, tensor: "Tensor") -> None:
        self._finish(self._start(tensor))

    def _start(self, tensor: "Tensor") -> Any:
        """torch.distributed's Work; None if the broadcast is done."""
        import torch.distributed as dist

        with _naming_the_failure():
            return dist.broadcast(tensor, src=0, group=self._group, async_op=self._ahead > 0)

    def _finish(self, work: Any) -> None:
        if work is not None:
            with _naming_the_failure():
                work.wait()


@contextmanager
def _naming_the_failure() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise CollectiveFailed(f"the plan's broadcast failed: {str(error).splitlines()[0]}") from error


def _view(tensor: "Tensor") -> memoryview:
    """The bytes of a host tensor, in place."""
    return memoryview(tensor.numpy())  # type: ignore[arg-type]

"""What travels between the ranks of a group in a step: hidden states from stage to stage, chosen tokens to everybody.

With one stage the first rank broadcasts its tokens.  With several, the first rank of the last stage samples, sends the
tokens to every rank, and a report of log-probabilities and reasons to the leader alone.  Hidden states and tokens have
groups of their own: NCCL runs what shares a communicator in one order, and the directions would wait for each other.
"""

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .parallel import Ranks, broadcast_from_first

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_MAX_REPORT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Arrival:
    """A tensor that is there already, or on its way."""

    tensor: torch.Tensor
    work: Any = None  # torch.distributed.Work

    def wait(self) -> torch.Tensor:
        """The tensor; on CUDA it is the current stream that waits."""
        if self.work is not None:
            self.work.wait()
        return self.tensor


class Link(Protocol):
    """A rank's place in the flow of one step.  Every rank makes the same calls for the same step, in order."""

    @property
    def staged(self) -> bool:
        """Several stages work on different steps at once."""

    @property
    def first(self) -> bool:
        """This rank's input is token ids, not hidden states of the stage before."""

    def receive(self, num_tokens: int) -> torch.Tensor:
        """Hidden states [tokens, hidden size] of the stage before."""

    def send(self, hidden: torch.Tensor) -> None:
        """Hand hidden states to the stage behind, if there is one."""

    def share(self, ids: torch.Tensor | None, count: int) -> Arrival:
        """The sampling rank's int64 ids [count], on all ranks."""

    def report(self, report: Any) -> Any:
        """The sampling rank's JSON-ready report on the leader (read it with `read_report`); None on other ranks."""

    def read_report(self, report: Any) -> Any:
        """What `report` gave, once the step's ids have come."""


class OneStage:
    """No pipeline: all ranks hold all layers, and the leader samples."""

    staged = False
    first = True

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def receive(self, num_tokens: int) -> torch.Tensor:
        raise NotImplementedError("the only stage reads token ids")

    def send(self, hidden: torch.Tensor) -> None:
        """There is nobody behind."""

    def share(self, ids: torch.Tensor | None, count: int) -> Arrival:
        if ids is None:
            ids = torch.empty(count, dtype=torch.int64, device=self._ranks.device)
        return Arrival(broadcast_from_first(ids, self._ranks))

    def report(self, report: Any) -> Any:
        return report

    def read_report(self, report: Any) -> Any:
        return report


class Stages:
    """One stage of several.  Sends never wait for the receiver: it may be steps behind.

    What is sent is a copy, and so is what the sampling rank keeps of its ids: the next step may be computed into the
    same memory (a CUDA graph's always is) before the one before has gone, or landed.
    """

    staged = True

    def __init__(self, ranks: Ranks, *, hidden_size: int, dtype: torch.dtype) -> None:
        from torch import distributed

        self._dist = distributed
        self._ranks = ranks
        self._hidden_size, self._dtype = hidden_size, dtype
        self._sampler = ranks.world_size - ranks.tp_size
        self._hidden_group: ProcessGroup = distributed.new_group()
        self._token_group: ProcessGroup = distributed.new_group()
        self._report_group: ProcessGroup = distributed.new_group()
        self._sending: deque[tuple[Any, torch.Tensor]] = deque()  # a tensor must live until it is sent
        self._max_sending = 4 * ranks.world_size * ranks.pp_size
        self._connect()

    @property
    def first(self) -> bool:
        return self._ranks.pp_rank == 0

    def receive(self, num_tokens: int) -> torch.Tensor:
        hidden = torch.empty((num_tokens, self._hidden_size), dtype=self._dtype, device=self._ranks.device)
        self._dist.recv(hidden, src=self._ranks.rank - self._ranks.tp_size, group=self._hidden_group)
        return hidden

    def send(self, hidden: torch.Tensor) -> None:
        if self._ranks.pp_rank < self._ranks.pp_size - 1:
            self._send(_copy(hidden), [self._ranks.rank + self._ranks.tp_size], self._hidden_group)

    def share(self, ids: torch.Tensor | None, count: int) -> Arrival:
        if ids is None:
            return self._expect(torch.empty(count, dtype=torch.int64, device=self._ranks.device))
        ids = _copy(ids)
        others = [rank for rank in range(self._ranks.world_size) if rank != self._sampler]
        self._send(ids, others, self._token_group)
        return Arrival(ids)

    def report(self, report: Any) -> Any:
        """Its length, then its bytes: they go by the host, for which the leader has to wait anyway."""
        if self._ranks.rank == self._sampler:
            body = torch.frombuffer(bytearray(json.dumps(report).encode()), dtype=torch.uint8)
            for part in (torch.tensor([len(body)]), body):
                self._send(part.to(self._ranks.device), [0], self._report_group)
        return self._ranks.rank == 0

    def read_report(self, report: Any) -> Any:
        """Both parts are received here, for steps in flight must not mix theirs."""
        if not report:
            return None
        length = int(self._receive_report(1, torch.int64).item())
        if not 0 < length <= _MAX_REPORT_BYTES:
            raise RuntimeError(f"the sampling rank announced a report of {length} bytes")
        return json.loads(self._receive_report(length, torch.uint8).cpu().numpy().tobytes())

    def _connect(self) -> None:
        """Send something along every route.  NCCL connects two ranks at their first message, for which both hosts have
        to be there: in the middle of steps one of them may be waiting for the other elsewhere."""
        groups = {"hidden": self._hidden_group, "tokens": self._token_group, "report": self._report_group}
        nothing = torch.zeros(1, dtype=torch.uint8, device=self._ranks.device)
        for name, source, target in routes(self._ranks):
            if self._ranks.rank == source:
                self._dist.send(nothing, dst=target, group=groups[name])
            elif self._ranks.rank == target:
                self._dist.recv(nothing, src=source, group=groups[name])

    def _receive_report(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty(size, dtype=dtype, device=self._ranks.device)
        self._dist.recv(tensor, src=self._sampler, group=self._report_group)
        return tensor

    def _expect(self, tensor: torch.Tensor) -> Arrival:
        return Arrival(tensor, self._dist.irecv(tensor, src=self._sampler, group=self._token_group))

    def _send(self, tensor: torch.Tensor, to: Sequence[int], group: "ProcessGroup") -> None:
        for rank in to:
            self._sending.append((self._dist.isend(tensor, dst=rank, group=group), tensor))
        while len(self._sending) > self._max_sending:  # of steps that have long landed
            self._sending.popleft()[0].wait()


def routes(ranks: Ranks) -> list[tuple[str, int, int]]:
    """What travels from which rank to which one; in the same order on every rank, so that all can go through it."""
    last = ranks.world_size - ranks.tp_size  # the last stage's first rank, which samples
    return [
        *(("hidden", rank, rank + ranks.tp_size) for rank in range(last)),
        *(("tokens", last, rank) for rank in range(ranks.world_size) if rank != last),
        ("report", last, 0),
    ]


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def make_link(ranks: Ranks, *, hidden_size: int, dtype: torch.dtype) -> Link:
    """Collective: every rank of the group makes its link."""
    return Stages(ranks, hidden_size=hidden_size, dtype=dtype) if ranks.pp_size > 1 else OneStage(ranks)

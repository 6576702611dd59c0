"""From a batch to chosen tokens: this rank's part of one step.  Steps run in the order in which they are launched.

`launch` returns as soon as the device has its work; `Flight.land` waits for the outcome.  On a CPU the work is done
when `launch` returns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from . import sampler
from .attention import Paged, Pulse
from .kvcache import PagedCache
from .model import LoadedModel
from .parallel import Ranks
from .pipeline import Arrival, make_link
from .scheduler import Batch, Row


@dataclass(frozen=True, slots=True)
class Choice:
    """What a step chose, one entry for each row that samples, in the batch's order."""

    ids: list[int]
    logprobs: list[float]  # only on the first rank, and only if a row asked; of all rows then


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was launched."""

    ids: Arrival
    logprobs: Arrival | None
    done: torch.cuda.Event | None  # the tensors are on the host then

    def land(self) -> Choice:
        """Wait for the step."""
        if self.done is not None:
            self.done.synchronize()
        return Choice(self.ids.wait().tolist(), [] if self.logprobs is None else self.logprobs.wait().tolist())


class Runner:
    """One rank's device."""

    def __init__(self, model: LoadedModel, cache: PagedCache, ranks: Ranks) -> None:
        self._model = model
        self._cache = cache
        self._device = ranks.device
        hf = model.config.hf
        self._link = make_link(ranks, hidden_size=hf.hidden_size, dtype=model.config.dtype)
        self._newest: torch.Tensor | None = None  # ids chosen by the step before, on the device
        self._index: dict[int, int] = {}  # handle -> its place among them
        self._progress_per_step = hf.num_hidden_layers + 2
        self.pulse = Pulse()

    def begin_step(self) -> None:
        """Every step counts the same on every rank; within it, a rank is as far as its layers are in the model."""
        steps = self.pulse.count // self._progress_per_step + 1
        self.pulse.count = steps * self._progress_per_step

    @property
    def speculates(self) -> bool:
        """Decodes can be launched before their newest token is known to the host."""
        return self._device.type == "cuda" and not self._link.staged

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Flight:
        """Compute the rows and choose the tokens of those that sample."""
        rows = in_attention_order(batch)
        if batch.fresh_blocks:
            self._cache.forget(self._indices(batch.fresh_blocks))
        positions = self._indices([position for row in rows for position in range(row.start, row.context)])
        self.pulse.count += self._model.stage.start
        inputs = self._tokens(rows) if self._link.first else self._link.receive(len(positions))
        hidden = self._model.hidden(inputs, positions, self._paged(rows))
        self._link.send(hidden)
        return self._choose(hidden, rows, [row for row in batch.rows if row.samples])

    def _tokens(self, rows: Sequence[Row]) -> torch.Tensor:
        """The ids that are fed; those which only the device knows are filled in there."""
        ids = self._indices([token for row in rows for token in ((0,) if row.pending else row.tokens)])
        if not any(row.pending for row in rows):
            return ids
        assert self._newest is not None
        pending = [index for index, row in enumerate(rows) if row.pending]  # single tokens come first
        sources = [self._index[rows[index].sequence.handle] for index in pending]
        # A row that could not be chosen has -1 here; its request ends, and what follows it is thrown away.
        return ids.index_copy_(0, self._indices(pending), self._newest[self._indices(sources)].clamp(min=0))

    def _choose(self, hidden: torch.Tensor, rows: list[Row], sampling: list[Row]) -> Flight:
        """One rank chooses; the others take its word, for their logits need not be equal bit by bit."""
        if not sampling:
            return Flight(Arrival(torch.empty(0, dtype=torch.int64)), None, None)
        ids, scores = None, None
        wants_scores = any(row.sequence.request.sampling.logprobs for row in sampling)
        if self._model.head is not None:
            last = {id(row): end - 1 for row, end in zip(rows, accumulate(row.count for row in rows), strict=True)}
            logits = self._model.logits(hidden[self._indices([last[id(row)] for row in sampling])])
            ids = sampler.choose(logits, [sampler.Draw(r.sequence.request.sampling, r.position) for r in sampling])
            scores = sampler.logprobs(logits, ids.clamp(min=0)) if wants_scores else None
        arrival = self._link.share(ids, len(sampling))
        reported = self._link.report(scores, len(sampling)) if wants_scores else None
        if self._device.type != "cuda" or self._link.staged:
            return Flight(arrival, reported, None)
        self._newest = arrival.tensor
        self._index = {row.sequence.handle: index for index, row in enumerate(sampling)}
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        flight = Flight(_to_host(arrival), reported and _to_host(reported), done)
        done.record()
        return flight

    def _paged(self, rows: list[Row]) -> Paged:
        num_decodes = sum(row.count == 1 for row in rows)
        return Paged(
            cache=self._cache,
            decodes=tuple(rows[:num_decodes]),
            chunks=tuple(rows[num_decodes:]),
            slots=self._indices(np.concatenate([self._slots(row) for row in rows])),
            dtype=self._model.config.dtype,
            pulse=self.pulse,
        )

    def _slots(self, row: Row) -> np.ndarray:
        """Where the row's tokens go in the cache."""
        size = self._cache.block_size
        if row.count == 1:
            return np.array([row.sequence.blocks[row.start // size] * size + row.start % size])
        at = np.arange(row.start, row.context)
        return np.frombuffer(row.sequence.blocks, dtype=np.int32)[at // size].astype(np.int64) * size + at % size

    def _indices(self, values: Sequence[int] | np.ndarray) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int64).to(self._device, non_blocking=True)


def in_attention_order(batch: Batch) -> list[Row]:
    """Single tokens first, shortest context first, as attention.Paged wants them."""
    return sorted(batch.rows, key=lambda row: (row.count > 1, row.context if row.count == 1 else 0))


def _to_host(arrival: Arrival) -> Arrival:
    return Arrival(arrival.tensor.to("cpu", non_blocking=True))

"""From a batch to chosen tokens: this rank's part of one step.  Steps run in the order in which they are launched.

`launch` returns as soon as the device has its work; `Flight.land` waits for the outcome.  On a CPU the work is done
when `launch` returns.
"""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from .attention import Paged, Pulse
from .kvcache import PagedCache, slots_of
from .model import LoadedModel
from .parallel import Ranks
from .pipeline import Arrival, Link, make_link
from .sampler import Draw, Sampler, Score, fault_of, scores
from .scheduler import Batch, Row
from .step import Fault
from .structure import Grammars
from .threads import Threads


@dataclass(frozen=True, slots=True)
class Choice:
    """What a step chose, one id for each row that samples, in the batch's order; negative ones are sampler's marks."""

    ids: list[int]
    report: dict[str, Any] | None  # on the leader, if a row asked for log-probabilities or has a structure

    def of(self, rows: Sequence[Row]) -> Iterator[tuple[Row, int, Score | None]]:
        """Each row that sampled with its token and, on the leader, its score."""
        found = self.report["scores"] if self.report else [None] * len(rows)
        for row, token, score in zip(rows, self.ids, found, strict=True):
            yield row, token, score and Score(score[0], tuple((t, p) for t, p in score[1]))

    def fault(self, handle: int, mark: int, *, context: int) -> Fault:
        """Why this request cannot go on."""
        reasons = self.report["reasons"] if self.report else {}
        return fault_of(handle, mark, reasons.get(str(handle)), context=context)


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was launched."""

    link: Link
    ids: Arrival
    report: Any
    done: torch.cuda.Event | None  # the ids are on the host then

    def land(self) -> Choice:
        """Wait for the step."""
        if self.done is not None:
            self.done.synchronize()
        return Choice(self.ids.wait().tolist(), self.link.read_report(self.report))


class Runner:
    """What every kind of device has in common: a place in the group, a sampler, a sign of life."""

    speculates = False
    """Decodes can be launched before their newest token is known to the host."""

    def __init__(self, model: LoadedModel, ranks: Ranks, grammars: Grammars | None) -> None:
        hf = model.config.hf
        self._model = model
        self._device = ranks.device
        self._link = make_link(ranks, hidden_size=hf.hidden_size, dtype=model.config.dtype)
        self._sampler = Sampler(grammars)
        self._progress_per_step = hf.num_hidden_layers + 2
        self.pulse = Pulse()

    def launch(self, batch: Batch) -> Flight:
        """Compute the rows and choose the tokens of those that sample."""
        raise NotImplementedError

    def free(self) -> None:
        """Give back the memory that is kept for steps to come, after one that had too little."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def begin_step(self) -> None:
        """Every step counts the same on every rank; within it, a rank is as far as its layers are in the model."""
        steps = self.pulse.count // self._progress_per_step + 1
        self.pulse.count = steps * self._progress_per_step

    def _report(self, sampling: list[Row], logits: torch.Tensor | None, ids: torch.Tensor | None) -> Any:
        """What the leader must know beyond the ids; every rank knows whether there is anything."""
        params = [row.sequence.request.sampling for row in sampling]
        if not any(p.logprobs or p.structure for p in params):
            return None
        said = None
        if logits is not None and ids is not None:
            found = scores(logits, ids, draws_of(sampling))
            reasons = {str(handle): reason for handle, reason in self._sampler.take_reasons().items()}
            said = {"scores": [score and (score.logprob, score.top) for score in found], "reasons": reasons}
        return self._link.report(said)


class TorchRunner(Runner):
    """Any device, through transformers' own modules."""

    def __init__(
        self, model: LoadedModel, ranks: Ranks, *, num_blocks: int, block_size: int, grammars: Grammars | None = None
    ) -> None:
        super().__init__(model, ranks, grammars)
        shape = model.config.cache_shape(ranks)
        self._cache = PagedCache(shape, num_blocks=num_blocks, block_size=block_size, device=ranks.device)
        self.threads = Threads.found(model.body) if ranks.device.type == "cpu" else None

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Flight:
        """Compute the rows and choose the tokens of those that sample."""
        if self.threads:
            self.threads.use(batch.num_tokens)
        rows = in_attention_order(batch)
        if batch.fresh_blocks:
            self._cache.forget(self._indices(batch.fresh_blocks))
        positions = self._indices([position for row in rows for position in range(row.start, row.context)])
        self.pulse.count += self._model.stage.start
        if self._link.first:
            inputs = self._indices([token for row in rows for token in row.tokens])
        else:
            inputs = self._link.receive(len(positions))
        hidden = self._model.hidden(inputs, positions, self._paged(rows))
        self._link.send(hidden)
        return self._choose(hidden, rows, [row for row in batch.rows if row.samples])

    def free(self) -> None:
        self._cache.shrink()
        super().free()

    def _choose(self, hidden: torch.Tensor, rows: list[Row], sampling: list[Row]) -> Flight:
        """One rank chooses; the others take its word, for their logits need not be equal bit by bit."""
        if not sampling:
            return Flight(self._link, Arrival(torch.empty(0, dtype=torch.int64)), None, None)
        ids = logits = None
        if self._model.head is not None:
            last = {id(row): end - 1 for row, end in zip(rows, accumulate(row.count for row in rows), strict=True)}
            logits = self._model.logits(hidden[self._indices([last[id(row)] for row in sampling])])
            ids = self._sampler.choose(logits, draws_of(sampling))
        report = self._report(sampling, logits, ids)
        return Flight(self._link, self._link.share(ids, len(sampling)), report, None)

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
        blocks = np.frombuffer(row.sequence.blocks, dtype=np.int32)
        return slots_of(blocks, np.arange(row.start, row.context), self._cache.block_size)

    def _indices(self, values: Sequence[int] | np.ndarray) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int64).to(self._device, non_blocking=True)


def in_attention_order(batch: Batch) -> list[Row]:
    """Single tokens first, shortest context first, as attention.Paged wants them."""
    return sorted(batch.rows, key=lambda row: (row.count > 1, row.context if row.count == 1 else 0))


def draws_of(rows: Sequence[Row]) -> list[Draw]:
    """How the next token of each row is chosen."""
    return [Draw.of(row.sequence, ahead=row.position - row.sequence.num_generated) for row in rows]

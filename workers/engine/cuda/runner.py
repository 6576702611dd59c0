"""Steps on a CUDA device: decode steps are CUDA graphs over a ladder of batch sizes, all others are launched piecemeal.

The host never waits for the step that it launches: what a decode feeds is the token that the step before chose, taken
from where that step left it.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hortator.workers.engine.engine import Limits
from hortator.workers.engine.kvcache import Ints
from hortator.workers.engine.model import LoadedModel
from hortator.workers.engine.parallel import Ranks
from hortator.workers.engine.pipeline import Arrival
from hortator.workers.engine.runner import Flight, Runner, draws_of
from hortator.workers.engine.scheduler import Batch, Row
from hortator.workers.engine.shortage import memory_for
from hortator.workers.engine.structure import Grammars

from .batch import Attended, Chunks, Decodes, Packed, aligned, chunk_arrays, decode_arrays, packed_to_device
from .body import FusedBody, Operations

_COLUMNS = 6  # per row in a graph's inputs: id, source, position, slot, context, first page
_UNKNOWN = np.zeros(1, np.int32)
_PROGRAMS = 512  # that a decode should have, so that every multiprocessor is busy


class CudaRunner(Runner):
    """The llama family on one device."""

    def __init__(
        self,
        model: LoadedModel,
        ranks: Ranks,
        limits: Limits,
        *,
        operations: Operations,
        grammars: Grammars | None = None,
    ) -> None:
        super().__init__(model, ranks, grammars)
        shape = model.config.cache_shape(ranks)
        self.speculates = not self._link.staged
        self._do = operations
        self._block_size = block_size = limits.block_size
        self._kv_heads = shape.num_kv_heads
        self._body = FusedBody(
            model,
            operations,
            num_heads=model.config.hf.num_attention_heads // ranks.tp_size,
            max_model_len=limits.max_model_len,
        )
        # One block more than the pool hands out takes what the rows write that fill a graph up to its size.
        self._cache = torch.zeros(
            (shape.num_layers, 2, limits.num_blocks + 1, shape.num_kv_heads, block_size, shape.head_dim),
            dtype=shape.dtype,
            device=ranks.device,
        )
        self._waste_slot = limits.num_blocks * block_size
        self._newest = torch.zeros(limits.max_num_seqs, dtype=torch.int64, device=ranks.device)
        self._index: dict[int, int] = {}  # handle -> its place in `newest`
        self._graphs: dict[int, Graph] = {}
        if ranks.device.type == "cuda":
            smaller = f"lower max_num_seqs={limits.max_num_seqs}, or kv_cache_bytes or gpu_memory_utilization"
            with memory_for("the CUDA graphs of decode steps", smaller):
                self._graphs = self._capture(limits.max_num_seqs, math.ceil(limits.max_model_len / block_size))

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Flight:
        sampling = [row for row in batch.rows if row.samples]
        self.pulse.count += self._model.stage.start
        if len(batch.rows) <= max(self._graphs, default=0) and all(row.count == 1 for row in batch.rows):
            hidden, logits, ids = self._replay(batch.rows, sampling)
        else:
            hidden, logits, ids = self._piecemeal(batch.rows, sampling)
        self.pulse.count += len(self._cache)
        self._link.send(hidden)
        return self._flight(sampling, logits, ids)

    def _piecemeal(self, rows: Sequence[Row], sampling: list[Row]) -> tuple[torch.Tensor, Any, Any]:
        kinds = [[row for row in rows if kind_of(row) == kind] for kind in range(3)]
        inputs, attended, last = self._arrange(kinds, sampling)
        if not self._link.first:
            inputs = self._link.receive(len(attended.positions))
        hidden = self._body(inputs, attended, self._cache)
        if self._model.head is None or not sampling:
            return hidden, None, None
        logits = self._model.logits(hidden[last])
        return hidden, logits, None

    def _arrange(self, kinds: list[list[Row]], sampling: list[Row]) -> tuple[torch.Tensor, Attended, torch.Tensor]:
        """Token ids, what they attend to, and the places of the rows that sample.  One copy to the device."""
        singles, beginnings, later = kinds
        there = Packed[torch.Tensor](*packed_to_device(self._pack(kinds, sampling), self._device))
        decodes = None
        if singles:
            decodes = Decodes(there.pages, there.page_starts, there.contexts, self._splits(len(singles)))
        chunks = []
        if beginnings:
            chunks.append(_chunks(beginnings, there.first_query_ends, there.first_key_ends, None))
        if later:
            slots = there.later_key_slots.long()  # once for all layers, as indexing wants them
            places = slots // self._block_size, slots % self._block_size
            chunks.append(_chunks(later, there.later_query_ends, there.later_key_ends, places))
        attended = Attended(there.positions, there.slots, len(singles), decodes, tuple(chunks))
        return resolve(there.ids, there.sources, self._newest), attended, there.last

    def _pack(self, kinds: list[list[Row]], sampling: list[Row]) -> Packed[Ints]:
        rows = [row for kind in kinds for row in kind]
        singles, beginnings, later = kinds
        ids = np.concatenate([np.frombuffer(row.tokens, np.int32) if row.tokens else _UNKNOWN for row in rows])
        sources = np.full(len(ids), -1, np.int32)
        sources[: len(singles)] = [self._source(row) for row in singles]
        ends = np.cumsum([row.count for row in rows])
        place = {id(row): end - 1 for row, end in zip(rows, ends, strict=True)}
        ones = decode_arrays(singles, self._block_size)
        first, second = (chunk_arrays(group, self._block_size) for group in (beginnings, later))
        return Packed(
            ids,
            sources,
            np.array([place[id(row)] for row in sampling], np.int32),
            np.concatenate((ones.positions, first.positions, second.positions)),
            np.concatenate((ones.slots, first.slots, second.slots)),
            *ones[2:],
            *first[2:],
            *second[2:],
        )

    def _source(self, row: Row) -> int:
        """Where the step before left the row's token, if only the device knows it."""
        return self._index[row.sequence.handle] if row.pending else -1

    def _replay(self, rows: Sequence[Row], sampling: list[Row]) -> tuple[torch.Tensor, Any, Any]:
        size = min(size for size in self._graphs if size >= len(rows))
        graph = self._graphs[size]
        positions, slots, contexts, starts, pages = decode_arrays(rows, self._block_size)
        table = np.zeros((_COLUMNS, aligned(size)), np.int32)
        table[1], table[3] = -1, self._waste_slot
        count = len(rows)
        table[0, :count] = [row.sequence.tokens[row.start] if not row.pending else 0 for row in rows]
        table[1, :count] = [self._source(row) for row in rows]
        table[2:, :count] = positions, slots, contexts, starts
        graph.load(table, pages, None if self._link.first else self._link.receive(count))
        graph.replay()
        logits, ids = graph.logits, graph.ids
        if logits is None or ids is None or not sampling:
            return graph.hidden[:count], None, None
        if len(sampling) == count:
            return graph.hidden[:count], logits[:count], ids[:count]
        places = packed_to_device([np.array([i for i, row in enumerate(rows) if row.samples], np.int32)], self._device)[
            0
        ]
        return graph.hidden[:count], logits[places], ids[places]

    def _flight(self, sampling: list[Row], logits: torch.Tensor | None, ids: torch.Tensor | None) -> Flight:
        """Choose, tell everybody, and let the ids travel to the host."""
        if not sampling:
            return Flight(self._link, Arrival(torch.empty(0, dtype=torch.int64)), None, None)
        if logits is not None:
            if not all(row.sequence.plain for row in sampling):
                ids = self._sampler.choose(logits, draws_of(sampling))
            elif ids is None:
                ids = self._do.greedy(logits)
        report = self._report(sampling, logits, ids)
        arrival = self._link.share(ids, len(sampling))
        self._remember(sampling, arrival.tensor)
        if self._link.staged or self._device.type != "cuda":
            return Flight(self._link, arrival, report, None)
        host = arrival.tensor.to("cpu", non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return Flight(self._link, Arrival(host), report, done)

    def _remember(self, sampling: list[Row], ids: torch.Tensor) -> None:
        if self.speculates:
            self._newest[: len(sampling)].copy_(ids)
            self._index = {row.sequence.handle: index for index, row in enumerate(sampling)}

    def _splits(self, num_rows: int) -> int:
        """Parts of one row's context: a power of two, so many that few rows fill the device as well."""
        wanted = _PROGRAMS // max(1, num_rows * self._kv_heads)
        return 1 << max(0, min(5, wanted.bit_length() - 1))

    @torch.inference_mode()
    def _capture(self, max_num_seqs: int, pages_per_row: int) -> "dict[int, Graph]":
        """The largest first: the smaller ones then live in its memory."""
        length = _COLUMNS * aligned(max_num_seqs) + max_num_seqs * pages_per_row
        inputs = torch.zeros(length, dtype=torch.int32, device=self._device)
        logits = hidden = None
        if self._model.head is not None:
            width = self._model.config.vocab_size
            logits = torch.empty((max_num_seqs, width), dtype=self._model.config.dtype, device=self._device)
        if not self._link.first:
            width = self._model.config.hf.hidden_size
            hidden = torch.zeros((max_num_seqs, width), dtype=self._model.config.dtype, device=self._device)
        pool = torch.cuda.graph_pool_handle()
        graphs = {}
        for size in reversed(ladder(max_num_seqs)):
            graph = Graph(self, size, inputs, hidden, logits)
            graph.capture(pool)
            graphs[size] = graph
        return graphs

    def forward(self, inputs: torch.Tensor, attended: Attended) -> torch.Tensor:
        """The layers, for a graph."""
        return self._body(inputs, attended, self._cache)


class Graph:
    """One size of decode step.  Its inputs begin at the same address as those of all other sizes."""

    def __init__(
        self,
        runner: CudaRunner,
        size: int,
        inputs: torch.Tensor,
        hidden: torch.Tensor | None,
        logits: torch.Tensor | None,
    ) -> None:
        self._runner = runner
        self._inputs = inputs
        self._received = None if hidden is None else hidden[:size]
        width = aligned(size)
        self._table = inputs[: _COLUMNS * width].view(_COLUMNS, width)[:, :size]
        self._pages = inputs[_COLUMNS * width :]
        self._splits = runner._splits(size)
        self._graph = torch.cuda.CUDAGraph()
        self.hidden = torch.empty(0)
        self.logits = None if logits is None else logits[:size]
        self.ids: torch.Tensor | None = None

    def load(self, table: np.ndarray, pages: np.ndarray, received: torch.Tensor | None) -> None:
        """Bring the inputs of the next replay to the device."""
        host = torch.empty(table.size + len(pages), dtype=torch.int32, pin_memory=True)
        np.concatenate((table.reshape(-1), pages), out=host.numpy())
        self._inputs[: len(host)].copy_(host, non_blocking=True)
        if received is not None and self._received is not None:
            self._received[: len(received)].copy_(received)

    def replay(self) -> None:
        self._graph.replay()

    def capture(self, pool: Any) -> None:
        """Run once for the compilers, then record."""
        self._table[1].fill_(-1)
        self._table[3].fill_(self._runner._waste_slot)
        self._table[4].zero_()
        self._run()
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph, pool=pool):
            self._run()

    def _run(self) -> None:
        runner, model = self._runner, self._runner._model
        ids, sources, positions, slots, contexts, starts = self._table
        decodes = Decodes(self._pages, starts, contexts, self._splits)
        inputs = self._received if self._received is not None else resolve(ids, sources, runner._newest)
        self.hidden = runner.forward(inputs, Attended(positions, slots, len(ids), decodes))
        if self.logits is not None and model.head is not None:
            weight: Any = model.head.weight
            torch.mm(self.hidden, weight.t(), out=self.logits)
            self.ids = runner._do.greedy(self.logits)


def _chunks(
    rows: Sequence[Row],
    query_ends: torch.Tensor,
    key_ends: torch.Tensor,
    key_places: tuple[torch.Tensor, torch.Tensor] | None,
) -> Chunks:
    return Chunks(
        sum(row.count for row in rows),
        query_ends,
        key_ends,
        max(row.count for row in rows),
        max(row.context for row in rows),
        key_places,
    )


def kind_of(row: Row) -> int:
    """0: one token, 1: the beginning of a prompt, 2: a part of one further on, which attends to what is cached."""
    return 0 if row.count == 1 else 2 if row.start else 1


def ladder(largest: int) -> list[int]:
    """Batch sizes for which there is a graph: a step is filled up to the next one."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, largest, 64)]
    return [size for size in steps if size < largest] + [largest]


def resolve(ids: torch.Tensor, sources: torch.Tensor, newest: torch.Tensor) -> torch.Tensor:
    """The ids [T], but where a source is given what is there in `newest`.

    A row that could not be chosen has a negative number there; its request ends, and what follows is thrown away.
    """
    return torch.where(sources >= 0, newest[sources.clamp(min=0)], ids).clamp_(min=0)

"""The paged engine: scheduler, model and sampler, one step at a time, the same on every rank.

apply    plan -> admission -> scheduler -> batch (and its digest)
execute  batch -> tensors -> layers -> logits and tokens on the first rank -> tokens on all -> scheduler
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import psutil
import torch

from hortator.producer.errors import ConfigError

from . import admission
from .attention import Paged, Pulse
from .blocks import BlockPool
from .kvcache import CacheShape, PagedCache
from .model import LoadedModel, ModelConfig, load_model, read_config
from .parallel import Ranks, agree_on_minimum, broadcast_from_first
from .sampler import PENDING, Draw, Sampler, Score, scores
from .scheduler import Batch, Row, Scheduler
from .step import EngineInfo, EngineStats, Fault, Finish, Request, StepOutput, StepPlan, Token
from .structure import Grammars

_CPU_FRACTION = 0.2  # of the host's available memory, shared by the ranks of this host
_CUDA_FRACTION = 0.9  # of what is free once the weights are loaded


class PagedEngine:
    """One rank's engine over a loaded model.  Implements step.Engine."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        ranks: Ranks,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        max_num_batched_tokens: int,
        grammars: Grammars | None = None,
    ) -> None:
        config = model.config
        pool = BlockPool(num_blocks, block_size=block_size)
        self._model = model
        self._ranks = ranks
        self._scheduler = Scheduler(pool, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
        self._cache = PagedCache(
            config.cache_shape(ranks), num_blocks=num_blocks, block_size=block_size, device=ranks.device
        )
        self._info = EngineInfo(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            vocab_size=config.vocab_size,
            kv_tokens=pool.num_tokens,
            eos_token_ids=config.eos_token_ids,
            details={
                "architecture": config.architecture,
                "dtype": str(config.dtype).removeprefix("torch."),
                "kv_bytes_per_rank": str(num_blocks * block_size * config.cache_shape(ranks).token_bytes),
            },
        )
        self._sampler = Sampler(grammars)
        self._pulse = Pulse()
        self._batch = Batch()
        self._digest = 0
        self._ended: list[tuple[int, Finish]] = []  # by apply, reported by execute
        self._faults: list[Fault] = []

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def idle(self) -> bool:
        return self._scheduler.idle

    @property
    def progress(self) -> int:
        """Grows with every step and every attention layer; read by the heartbeat thread."""
        return self._pulse.count

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            free_blocks=scheduler.pool.num_free,
            total_blocks=scheduler.pool.num_blocks,
            preemptions=scheduler.preemptions,
        )

    def apply(self, plan: StepPlan) -> int:
        """Cancels first, then admissions, then the schedule."""
        self._pulse.count += 1
        for handle in plan.cancel:
            self._scheduler.drop(handle)
        for request in plan.admit:
            self._admit(request)
        self._batch = self._scheduler.schedule()
        self._digest = self._batch.digest(self._digest)
        return self._digest

    def execute(self) -> StepOutput:
        """Compute the scheduled rows; also reports what `apply` refused or found complete."""
        batch, self._batch = self._batch, Batch()
        tokens = self._accept(batch, *self._compute(batch)) if batch.rows else []
        output = StepOutput(tuple(tokens), tuple(self._ended), tuple(self._faults))
        self._ended, self._faults = [], []
        if self._scheduler.idle:
            self._scheduler.pool.check_all_free()
        return output

    def _admit(self, request: Request) -> None:
        if request.handle in self._scheduler:
            self._scheduler.drop(request.handle)
            message = f"handle {request.handle} was admitted twice in one epoch"
            self._faults.append(Fault(request.handle, admission.BAD_REQUEST, message))
            return
        if fault := admission.refusal(request, self._info):
            self._faults.append(fault)
            return
        eos = () if request.sampling.ignore_eos else self._info.eos_token_ids
        stops = frozenset(request.sampling.stop_token_ids).union(eos)
        limit = admission.length_limit(request, self._info)
        if finish := self._scheduler.add(request, limit=limit, stops=stops):
            self._ended.append((request.handle, finish))

    @torch.inference_mode()
    def _compute(self, batch: Batch) -> tuple[list[int], list[Score | None]]:
        """Token ids of the rows that sample, and the scores that were asked for (first rank only)."""
        rows = _in_attention_order(batch)
        if batch.fresh_blocks:
            self._cache.forget(self._indices(batch.fresh_blocks))
        tokens = [token for row in rows for token in row.tokens]
        positions = [position for row in rows for position in range(row.start, row.context)]
        hidden = self._model.hidden(self._indices(tokens), self._indices(positions), self._paged(rows))
        return self._sample(hidden, rows, [row for row in batch.rows if row.samples])

    def _sample(
        self, hidden: torch.Tensor, rows: list[Row], sampling: list[Row]
    ) -> tuple[list[int], list[Score | None]]:
        """The first rank chooses; the others take its word, for their logits need not be equal bit by bit."""
        if not sampling:
            return [], []
        found: list[Score | None] = []
        tokens = torch.empty(len(sampling), dtype=torch.int64, device=self._ranks.device)
        if self._model.head is not None:
            last = {id(row): end - 1 for row, end in zip(rows, accumulate(row.count for row in rows), strict=True)}
            logits = self._model.logits(hidden[self._indices([last[id(row)] for row in sampling])])
            draws = [Draw.of(row.sequence) for row in sampling]
            tokens = self._sampler.choose(logits, draws)
            found = scores(logits, tokens, draws)
        return broadcast_from_first(tokens, self._ranks).tolist(), found

    def _accept(self, batch: Batch, ids: list[int], found: list[Score | None]) -> list[Token]:
        """Tell the scheduler what was computed, in its own order; a pending row is computed again in the next step."""
        chosen = iter(ids)
        scored = iter(found)
        tokens = []
        for row in batch.rows:
            if not row.samples:
                self._scheduler.advance(row, None)
                continue
            token, score = next(chosen), next(scored, None)
            if token < 0:
                self._fail(row, token)
                continue
            handle = row.sequence.handle
            tokens.append(Token(handle, token, score.logprob, score.top) if score else Token(handle, token))
            if finish := self._scheduler.advance(row, token):
                self._ended.append((handle, finish))
        return tokens

    def _fail(self, row: Row, mark: int) -> None:
        if mark == PENDING:
            return
        handle = row.sequence.handle
        self._scheduler.drop(handle)
        self._faults.append(self._sampler.fault(handle, mark, context=row.context))

    def _paged(self, rows: list[Row]) -> Paged:
        num_decodes = sum(row.count == 1 for row in rows)
        return Paged(
            cache=self._cache,
            decodes=tuple(rows[:num_decodes]),
            chunks=tuple(rows[num_decodes:]),
            slots=self._indices([slot for row in rows for slot in self._slots(row)]),
            dtype=self._model.config.dtype,
            pulse=self._pulse,
        )

    def _slots(self, row: Row) -> Iterator[int]:
        """Where the row's tokens go in the cache."""
        size, blocks = self._cache.block_size, row.sequence.blocks
        return (blocks[p // size] * size + p % size for p in range(row.start, row.context))

    def _indices(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._ranks.device)


def _in_attention_order(batch: Batch) -> list[Row]:
    """Single tokens first, shortest context first, as attention.Paged wants them."""
    return sorted(batch.rows, key=lambda row: (row.count > 1, row.context if row.count == 1 else 0))


def build_engine(
    *,
    model_path: Path,
    mesh: Ranks,
    dtype: str = "auto",
    max_num_seqs: int = 64,
    max_model_len: int | None = None,
    max_num_batched_tokens: int = 2048,
    block_size: int = 16,
    kv_cache_bytes: int | None = None,
) -> PagedEngine:
    """Load this rank's part of the model and size its KV pool.  Collective: all ranks of the group call it together.

    Raises ConfigError if the directory, the limits or the number of ranks cannot work.
    """
    if mesh.pp_size > 1:
        raise ConfigError(f"pipeline_parallel_size={mesh.pp_size} is not supported yet: use tensor_parallel_size")
    config = read_config(model_path, dtype=dtype)
    limit = _model_len(max_model_len, config)
    grammars = None
    if mesh.rank == 0:  # reads the tokenizer beside the weights
        grammars = Grammars.of(config.path, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids)
    model = load_model(config, mesh)
    if grammars is not None:
        grammars.wait()
    num_blocks = _num_blocks(config.cache_shape(mesh), mesh, kv_cache_bytes, block_size, max_num_seqs * limit)
    return PagedEngine(
        model,
        ranks=mesh,
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_model_len=limit,
        max_num_batched_tokens=max_num_batched_tokens,
        grammars=grammars,
    )


def _model_len(wanted: int | None, config: ModelConfig) -> int:
    if wanted is not None and wanted > config.max_model_len:
        raise ConfigError(
            f"max_model_len={wanted} is more than the {config.max_model_len} positions of {config.path}: lower it"
        )
    limit = wanted or config.max_model_len
    if limit < 2:
        raise ConfigError(f"max_model_len={limit} leaves no room for a prompt and one new token: raise it")
    return limit


def _num_blocks(shape: CacheShape, ranks: Ranks, kv_bytes: int | None, block_size: int, max_tokens: int) -> int:
    """Blocks in every rank's pool: what the poorest rank can afford, and no more than all sequences could need."""
    block_bytes = shape.token_bytes * block_size
    affordable = (kv_bytes or _spare_bytes(ranks)) // block_bytes
    blocks = agree_on_minimum(min(affordable, -(-max_tokens // block_size)), ranks)
    if blocks < 1:
        raise ConfigError(
            f"no room for a single KV block of {block_size} tokens ({block_bytes} bytes a rank): raise kv_cache_bytes, "
            f"or use more tensor parallel ranks"
        )
    return blocks


def _spare_bytes(ranks: Ranks) -> int:
    if ranks.device.type == "cuda":
        return int(torch.cuda.mem_get_info(ranks.device)[0] * _CUDA_FRACTION)
    # Ranks of one host cannot be told from those of others here, so all are taken to share this one.
    return int(psutil.virtual_memory().available * _CPU_FRACTION) // ranks.world_size

"""The paged engine: scheduler, model and sampler, one step at a time, the same on every rank.

apply    plan -> admission -> scheduler -> batch (and its digest)
execute  batch -> tensors -> layers -> logits and tokens on the first rank -> tokens on all -> scheduler
"""

from collections import deque
from pathlib import Path

import psutil
import torch

from hortator.producer.errors import ConfigError

from . import admission, sampler
from .blocks import BlockPool
from .kvcache import CacheShape
from .model import LoadedModel, ModelConfig, load_model, read_config
from .parallel import Ranks, agree_on_minimum
from .runner import Flight, Runner
from .sampler import Score
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
        prefix_cache: bool = True,
        grammars: Grammars | None = None,
    ) -> None:
        config = model.config
        pool = BlockPool(num_blocks, block_size=block_size)
        self._runner = Runner(model, ranks, num_blocks=num_blocks, block_size=block_size, grammars=grammars)
        self._depth = ranks.pp_size - 1 or int(self._runner.speculates)
        self._scheduler = Scheduler(
            pool,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            waves=ranks.pp_size,
            speculate=self._runner.speculates,
            prefix_cache=prefix_cache,
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
        self._flying: deque[tuple[Batch, Flight]] = deque()
        self._batch = Batch()
        self._digest = 0
        self._ended: list[tuple[int, Finish]] = []  # by apply, reported by execute
        self._faults: list[Fault] = []

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def idle(self) -> bool:
        return self._scheduler.idle and not self._flying

    @property
    def progress(self) -> int:
        """Grows with every step and every attention layer; read by the heartbeat thread."""
        return self._runner.pulse.count

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=scheduler.num_waiting,
            free_blocks=scheduler.pool.num_free,
            total_blocks=scheduler.pool.num_blocks,
            preemptions=scheduler.preemptions,
            prompt_tokens=scheduler.num_prompt_tokens,
            cached_tokens=scheduler.num_cached_tokens,
        )

    def apply(self, plan: StepPlan) -> int:
        """Cancels first, then admissions, then the schedule."""
        self._runner.begin_step()
        for handle in plan.cancel:
            self._scheduler.drop(handle)
        for request in plan.admit:
            self._admit(request)
        self._batch = self._scheduler.schedule()
        self._digest = self._batch.digest(self._digest)
        return self._digest

    def execute(self) -> StepOutput:
        """Launch the scheduled rows and report a step that is done: the same one, or where steps are in flight an
        earlier one.  Also reports what `apply` refused or found complete."""
        batch, self._batch = self._batch, Batch()
        if batch.rows:
            self._flying.append((batch, self._runner.launch(batch)))
        tokens: list[Token] = []
        if len(self._flying) > self._depth or (self._flying and not batch.rows):
            tokens = self._land()
        output = StepOutput(tuple(tokens), tuple(self._ended), tuple(self._faults))
        self._ended, self._faults = [], []
        if self.idle:
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

    def _land(self) -> list[Token]:
        """Take the outcome of the oldest step in flight, and tell the scheduler."""
        batch, flight = self._flying.popleft()
        choice = flight.land()
        tokens = []
        for row, token, score in choice.of([row for row in batch.rows if row.samples]):
            sequence = row.sequence
            if token == sampler.PENDING:
                self._scheduler.again(row)
            elif sequence.ended:
                self._scheduler.accept(row, token)
            elif token < 0:
                self._fail(row, choice.fault(sequence.handle, token, context=row.context))
            else:
                tokens.append(_token(sequence.handle, token, score))
                if finish := self._scheduler.accept(row, token):
                    self._ended.append((sequence.handle, finish))
        return tokens

    def _fail(self, row: Row, fault: Fault) -> None:
        self._scheduler.retract(row.sequence.handle)  # whoever shares its prefix must not meet what broke it
        self._scheduler.drop(row.sequence.handle)
        self._faults.append(fault)


def _token(handle: int, token: int, score: Score | None) -> Token:
    return Token(handle, token, score.logprob, score.top) if score else Token(handle, token)


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
    prefix_cache: bool = True,
) -> PagedEngine:
    """Load this rank's part of the model and size its KV pool.  Collective: all ranks of the group call it together.

    Raises ConfigError if the directory, the limits or the number of ranks cannot work.
    """
    config = read_config(model_path, dtype=dtype)
    limit = _model_len(max_model_len, config)
    grammars = None
    if mesh.pp_rank == mesh.pp_size - 1 and mesh.tp_rank == 0:  # the rank that samples
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
        prefix_cache=prefix_cache,
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

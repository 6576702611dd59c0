"""The paged engine: scheduler, model and sampler, one step at a time, the same on every rank.

apply    plan -> admission -> scheduler -> batch (and its digest)
execute  batch -> tensors -> layers -> logits and tokens on the last stage's first rank -> tokens on all -> scheduler
"""

import logging
from collections import deque
from dataclasses import dataclass

from hortator.producer.errors import BadRequest

from . import admission, sampler
from .blocks import BlockPool
from .model import ModelConfig
from .parallel import Ranks
from .rescue import Lost, rescue
from .runner import Flight, Runner
from .sampler import Score
from .scheduler import Batch, Row, Scheduler
from .shortage import lacking, memory_for
from .step import EngineInfo, EngineStats, Fault, Finish, Request, StepOutput, StepPlan, Token

_REMEDY = "lower max_num_batched_tokens, max_num_seqs, kv_cache_bytes or gpu_memory_utilization"

log = logging.getLogger("hortator.engine")


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine holds at a time; the same on all ranks.  Sizes in tokens."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_model_len: int
    max_num_batched_tokens: int
    prefix_cache: bool = True

    @property
    def kv_tokens(self) -> int:
        return self.num_blocks * self.block_size


class PagedEngine:
    """One rank's engine over a loaded model.  Implements step.Engine."""

    def __init__(self, config: ModelConfig, runner: Runner, *, ranks: Ranks, limits: Limits) -> None:
        self._runner = runner
        self._alone = ranks.world_size == 1
        self._depth = ranks.pp_size - 1 or int(runner.speculates)
        self._scheduler = Scheduler(
            BlockPool(limits.num_blocks, block_size=limits.block_size),
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            waves=ranks.pp_size,
            speculate=runner.speculates,
            prefix_cache=limits.prefix_cache,
        )
        self._info = EngineInfo(
            max_num_seqs=limits.max_num_seqs,
            max_model_len=limits.max_model_len,
            vocab_size=config.vocab_size,
            kv_tokens=limits.kv_tokens,
            eos_token_ids=config.eos_token_ids,
            details={
                "architecture": config.architecture,
                "dtype": str(config.dtype).removeprefix("torch."),
                "kv_bytes_per_rank": str(limits.kv_tokens * config.cache_shape(ranks).token_bytes),
            },
        )
        self._flying: deque[tuple[Batch, Flight]] = deque()
        self._batch = Batch()
        self._digest = 0
        self._shortages = 0
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
            shortages=self._shortages,
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
        earlier one.  Also reports what `apply` refused or found complete.

        A single rank that lacks memory computes the step in parts (rescue.py); one of several raises OutOfMemory.
        """
        batch, self._batch = self._batch, Batch()
        with memory_for(f"a step of {len(batch.rows)} rows and {batch.num_tokens} tokens", _REMEDY):
            tokens = self._launch(batch) if batch.rows else []
            if len(self._flying) > self._depth or (self._flying and not batch.rows):
                tokens += self._land()
        output = StepOutput(tuple(tokens), tuple(self._ended), tuple(self._faults))
        self._ended, self._faults = [], []
        if self.idle:
            self._scheduler.pool.check_all_free()
        return output

    def _admit(self, request: Request) -> None:
        if request.handle in self._scheduler:
            self._scheduler.drop(request.handle)
            message = f"handle {request.handle} was admitted twice in one epoch"
            self._faults.append(Fault(request.handle, BadRequest.code, message))
            return
        if fault := admission.refusal(request, self._info):
            self._faults.append(fault)
            return
        eos = () if request.sampling.ignore_eos else self._info.eos_token_ids
        stops = frozenset(request.sampling.stop_token_ids).union(eos)
        limit = admission.length_limit(request, self._info)
        if finish := self._scheduler.add(request, limit=limit, stops=stops):
            self._ended.append((request.handle, finish))

    def _launch(self, batch: Batch) -> list[Token]:
        """What had to be landed on the way: nothing, as long as there is memory."""
        try:
            self._flying.append((batch, self._runner.launch(batch)))
            return []
        except Exception as error:
            if not self._alone or lacking(error) is None:
                raise
        return self._rescue(batch)  # only here the error and all that its frames held is gone

    def _rescue(self, batch: Batch) -> list[Token]:
        self._shortages += 1
        if self._shortages & (self._shortages - 1) == 0:  # the first, second, fourth, ...
            log.warning("step no. %d that lacks memory is tried again in parts: %s", self._shortages, _REMEDY)
        tokens = []
        while self._flying:
            tokens += self._land()
        for outcome in rescue(batch, self._runner, self._scheduler):
            if isinstance(outcome, Lost):
                self._fail(outcome.row, outcome.fault)
            else:
                self._flying.append(outcome)
                tokens += self._land()
        return tokens

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
            elif not 0 <= token < self._info.vocab_size:
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

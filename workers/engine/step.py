"""The Engine seam: what a rank is told for a step, and what a step gives back.

All ranks of a group hold the same scheduler state, because they apply the same plans in the same order; a plan carries
inputs (admissions, cancels), never decisions that ranks can derive.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol


class Finish(StrEnum):
    """Why the engine itself ended a request."""

    STOP = "stop"  # end-of-sequence or one of stop_token_ids; that token is the last one reported
    LENGTH = "length"  # max_tokens or max_model_len


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request's tokens are chosen; `seed` is always set (the front derives it from the job's id)."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False

    @property
    def needs_history(self) -> bool:
        """What is chosen next depends on which tokens were chosen before, not only on how many."""
        return False


@dataclass(frozen=True, slots=True)
class Request:
    """One job as the engine sees it.  `generated` holds tokens accepted by earlier attempts (the journal): they are
    prefilled with the prompt, count against max_tokens, and are not reported again."""

    handle: int  # unique within the epoch
    prompt: tuple[int, ...]
    sampling: SamplingParams
    generated: tuple[int, ...] = ()
    priority: int = 1  # class: 0 is admitted most
    deadline_ms: int = 0  # on any clock that all requests of the group share; 0: none.  It only orders admissions
    salt: int = 0  # requests of different salts never share cached prefixes


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the leader broadcasts for one step."""

    step: int
    admit: tuple[Request, ...] = ()
    cancel: tuple[int, ...] = ()  # handles: cancelled, past deadline, lost, or ended by a stop string


@dataclass(frozen=True, slots=True)
class Token:
    """One accepted token; `logprob` (natural log, of the unmodified distribution) only if the request asked for it."""

    handle: int
    token_id: int
    logprob: float | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """One request that cannot go on; the others are not affected.  `code` is a code of producer.errors' tree."""

    handle: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step accepted, the same on every rank (logprobs and faults' texts: on the leader at least)."""

    tokens: tuple[Token, ...] = ()
    finished: tuple[tuple[int, Finish], ...] = ()
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges after a step."""

    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
    preemptions: int  # since start
    prompt_tokens: int = 0  # admitted since start, a preempted request's again
    cached_tokens: int = 0  # of these, found in the prefix cache


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the front needs to know before it claims jobs."""

    max_num_seqs: int
    max_model_len: int
    vocab_size: int
    kv_tokens: int  # tokens that the KV pool holds; prompt + max_tokens of one request must fit
    eos_token_ids: tuple[int, ...]
    details: dict[str, str] = field(default_factory=dict)


class Engine(Protocol):
    """Stepped in lock-step: apply the same plan on every rank, then execute.

    `apply` never raises for a bad request: the request becomes a fault of this step's output.
    """

    @property
    def info(self) -> EngineInfo:
        """Limits, fixed for the engine's life."""

    @property
    def idle(self) -> bool:
        """Nothing is running or waiting; derived, hence equal on all ranks."""

    def apply(self, plan: StepPlan) -> int:
        """Take admissions and cancels, schedule the step, and return a 64-bit digest of what was derived (scheduled
        rows, lengths, block tables).  Ranks whose digests differ have diverged."""

    def execute(self) -> StepOutput:
        """Run the scheduled rows and accept tokens.  Every rank returns the same tokens."""

    def stats(self) -> EngineStats:
        """Gauges, cheap."""

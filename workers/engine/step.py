"""The Engine seam: what a rank is told for a step, and what a step gives back.

All ranks of a group hold the same scheduler state, because they apply the same plans in the same order; a plan carries
inputs (admissions, cancels), never decisions that ranks can derive.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol

# Codes of faults that are the engine's own; all others are those of producer.errors.
BAD_LOGITS = "bad_logits"
OUT_OF_MEMORY = "out_of_memory"
_GREEDY_BELOW = 1e-5


class Finish(StrEnum):
    """Why the engine itself ended a request."""

    STOP = "stop"  # end-of-sequence or one of stop_token_ids; that token is the last one reported
    LENGTH = "length"  # max_tokens or max_model_len


class StructureKind(StrEnum):
    """In which language a structure is described."""

    JSON_SCHEMA = "json_schema"  # JSON text of a schema
    REGEX = "regex"  # the whole output matches it
    LARK = "lark"  # a grammar, of which `start` is the whole output
    CHOICE = "choice"  # JSON text of a list of strings, of which the output is one


@dataclass(frozen=True, slots=True)
class Structure:
    """What the output must be; `definition` is text, so that equal structures are equal everywhere."""

    kind: StructureKind
    definition: str


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
    top_logprobs: int = 0  # alternatives reported beside the chosen token
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0  # no end-of-sequence and no stop token before this many
    structure: Structure | None = None

    @property
    def greedy(self) -> bool:
        """Below a certain temperature dividing by it leaves one token anyway."""
        return self.temperature < _GREEDY_BELOW or self.top_k == 1

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def needs_history(self) -> bool:
        """The next token depends on which tokens came before, beyond what the model makes of them."""
        return self.penalises or self.structure is not None


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


class Token(NamedTuple):
    """One accepted token; `logprob` (natural log, of the unmodified distribution) only if the request asked for it, and
    `top` as many of the likeliest tokens, with theirs, as it asked for, the likeliest first."""

    handle: int
    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Fault:
    """One request that cannot go on; others are not affected.  `code` is one of producer.errors' or of the above."""

    handle: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step accepted, the same on every rank (logprobs and faults' texts: on the leader at least)."""

    tokens: tuple[Token, ...] = ()
    finished: tuple[tuple[int, Finish], ...] = ()
    faults: tuple[Fault, ...] = ()

    def __add__(self, later: "StepOutput") -> "StepOutput":
        """What both steps accepted, in order."""
        return StepOutput(self.tokens + later.tokens, self.finished + later.finished, self.faults + later.faults)


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
    shortages: int = 0  # steps, since start, that the device had no memory for and that were tried again in parts


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
        """Take admissions and cancels, schedule the step, and return a 63-bit digest of what was derived (scheduled
        rows, lengths, block tables).  Ranks whose digests differ have diverged."""

    def execute(self) -> StepOutput:
        """Run the scheduled rows and accept tokens.  Every rank returns the same tokens."""

    def stats(self) -> EngineStats:
        """Gauges, cheap."""

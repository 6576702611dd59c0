"""The wire: what travels between producers, Redis, workers and clients.

Everything here is frozen and versioned.  Readers ignore optional fields they do not know (a newer minor), and leave a
job with another major version on the queue for a worker that speaks it.
"""

import difflib
import json
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticSerializationError

SCHEMA_VERSION = 1
TASK_NAME = "llm.generate"

MAX_PROMPT_CHARS = 8_000_000
MAX_TOKENS = 1_000_000
MAX_STOPS = 16
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_STRUCTURE_CHARS = 65_536
MAX_CHOICES = 4096
MAX_N = 16
MAX_DEADLINE_S = 30 * 86_400

ModelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")]
JOB_ID = r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}"
JobId = Annotated[str, StringConstraints(pattern=f"^{JOB_ID}$")]
Tenant = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TopLogprobs = tuple[tuple[tuple[int, float], ...], ...]
"""For each token of an output the likeliest tokens, the likeliest first, as (token id, log-probability)."""


class Wire(BaseModel):
    """Base of everything on the wire."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Asked(Wire):
    """What producers write themselves.  A keyword that it has no field for is a typing error and refused, by name; from
    the wire (model_validate, model_validate_json) unknown fields are ignored, as they may be a newer minor's."""

    if not TYPE_CHECKING:  # for type checkers the fields are the signature

        def __init__(self, /, **data: Any) -> None:
            if unknown := list(_unknown_fields(type(self), data)):
                raise ValidationError.from_exception_data(type(self).__name__, unknown, hide_input=True)
            super().__init__(**data)

        # pydantic validates through a model's own constructor unless that is marked as no other than its own.
        __init__.__pydantic_base_init__ = True


def _unknown_fields(model: type[BaseModel], data: Mapping[str, Any], *where: str) -> Iterator[InitErrorDetails]:
    """Also those of a field that is given as a dict."""
    fields = model.model_fields  # pydantic looks for it anew each time
    for name, value in data.items():
        if name not in fields:
            error = PydanticCustomError("unknown_field", "{problem}", {"problem": _unknown(model, name)})
            yield InitErrorDetails(type=error, loc=(*where, name), input=None)
        elif isinstance(value, Mapping):
            inner = fields[name].annotation
            if isinstance(inner, type) and issubclass(inner, Asked):
                yield from _unknown_fields(inner, value, *where, name)


def _unknown(model: type[BaseModel], name: str) -> str:
    nearest = difflib.get_close_matches(name, model.model_fields, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(model.model_fields)}"
    return f"{model.__name__} has no field {name}: {hint}"


class State(StrEnum):
    """queued -> running -> one of the terminal four.  Terminal is written once."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def terminal(self) -> bool:
        return self not in (State.QUEUED, State.RUNNING)


class Priority(StrEnum):
    """Classes share a queue by weight; none starves.  The Celery priority steps are 0, 3 and 6."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BATCH = "batch"


class AnyJson(Asked):
    """Some JSON object."""

    type: Literal["json"] = "json"


class JsonSchema(Asked):
    """JSON text that is valid under a JSON schema; its properties come in the schema's order."""

    type: Literal["json_schema"] = "json_schema"
    json_schema: dict[str, Any]


class Regex(Asked):
    """Text that matches from its first to its last character (Rust's syntax; no look-around, no back-references)."""

    type: Literal["regex"] = "regex"
    pattern: Annotated[str, StringConstraints(min_length=1)]


class Grammar(Asked):
    """Text that a grammar's `start` derives; in EBNF as Lark writes it."""

    type: Literal["grammar"] = "grammar"
    grammar: Annotated[str, StringConstraints(min_length=1)]


class OneOf(Asked):
    """One of these texts."""

    type: Literal["choice"] = "choice"
    choices: tuple[Annotated[str, StringConstraints(min_length=1)], ...] = Field(min_length=1, max_length=MAX_CHOICES)


def _as_json(structure: Wire) -> str:
    """ValueError says what keeps it from being JSON that every reader takes."""
    try:
        text = json.dumps(structure.model_dump(mode="json"), ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise ValueError(f"a structure has half of a surrogate pair (U+{half:04X}), which is no text") from None
    except PydanticSerializationError as error:
        raise ValueError(f"a structure is no JSON: {error}") from None
    except (RecursionError, ValueError):  # whichever limit is met first
        raise ValueError("a structure is nested too deeply") from None
    try:
        json.dumps(structure.model_dump(), allow_nan=False, default=str)  # the JSON mode has made nulls of them
    except ValueError:
        raise ValueError("a structure has a number that JSON does not have: infinite or not a number") from None
    return text


def _bounded(structure: Wire) -> Wire:
    size = len(_as_json(structure))
    if size > MAX_STRUCTURE_CHARS:
        raise ValueError(f"a structure of {size} characters; the limit is {MAX_STRUCTURE_CHARS}")
    return structure


Structure = Annotated[
    AnyJson | JsonSchema | Regex | Grammar | OneOf, Field(discriminator="type"), AfterValidator(_bounded)
]


class Sampling(Asked):
    """How tokens are chosen.  The default is greedy: the same prompt gives the same text."""

    max_tokens: int = Field(default=256, ge=1, le=MAX_TOKENS)
    temperature: float = Field(default=0.0, ge=0.0, le=100.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0, lt=2**31, description="0: no limit")
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="None: derived from the job's id")
    stop: tuple[Annotated[str, StringConstraints(min_length=1, max_length=256)], ...] = Field(
        default=(), max_length=MAX_STOPS
    )
    stop_token_ids: tuple[TokenId, ...] = Field(default=(), max_length=64)
    ignore_eos: bool = False
    logprobs: bool = Field(default=False, description="report the log-probability of each chosen token")
    top_logprobs: int = Field(
        default=0, ge=0, le=MAX_TOP_LOGPROBS, description="with logprobs: also those of the likeliest tokens"
    )
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100.0, description="over prompt and output; 1: none")
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0, description="over the output")
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0, description="over the output")
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100.0, le=100.0)]] = Field(
        default_factory=dict, max_length=MAX_BIASES
    )
    min_tokens: int = Field(
        default=0, ge=0, le=MAX_TOKENS, description="no end of sequence, stop token or stop string before this many"
    )
    structure: Structure | None = None
    n: int = Field(default=1, ge=1, le=MAX_N, description="answers to the same prompt, each with a seed of its own")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) is more than max_tokens ({self.max_tokens})")
        return self


class Message(Asked):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str = Field(max_length=MAX_PROMPT_CHARS)


class Job(Asked):
    """One prompt with its sampling parameters.  Exactly one of prompt, token_ids, messages is given."""

    version: Literal[1] = 1
    model: ModelName
    prompt: Annotated[str, StringConstraints(min_length=1, max_length=MAX_PROMPT_CHARS)] | None = None
    token_ids: Annotated[tuple[TokenId, ...], Field(fail_fast=True)] | None = Field(
        default=None, min_length=1, max_length=MAX_TOKENS
    )
    messages: tuple[Message, ...] | None = Field(default=None, min_length=1, max_length=1024)
    sampling: Sampling = Sampling()
    priority: Priority = Priority.STANDARD
    deadline_s: float | None = Field(
        default=None, gt=0, le=MAX_DEADLINE_S, description="seconds from acceptance; None: the store's default, 7 days"
    )
    idempotency_key: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    tenant: Tenant = "default"
    metadata: dict[
        Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]
    ] = Field(default_factory=dict, max_length=16)

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        given = [name for name in ("prompt", "token_ids", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of prompt, token_ids, messages; got {given or 'none'}")
        return self


class FinishReason(StrEnum):
    """Why generation ended: an end-of-sequence, stop token or stop string; or max_tokens / the context's end."""

    STOP = "stop"
    LENGTH = "length"


class Usage(Wire):
    """Token counts; completion_tokens includes an end-of-sequence token if one was generated."""

    prompt_tokens: int
    completion_tokens: int


class Timings(Wire):
    """Milliseconds since 1970 on Redis's clock; None while the thing has not happened."""

    enqueued_ms: int | None = None
    claimed_ms: int | None = None
    first_token_ms: int | None = None
    finished_ms: int | None = None


class Choice(Wire):
    """One of the answers of a job that asked for several."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None = None
    top_logprobs: TopLogprobs | None = None


class Result(Wire):
    """The one visible result of a job.

    Of one that asked for n > 1, `choices` are the answers, the other fields are the first one's, the usage is of all.
    """

    version: Literal[1] = 1
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[float, ...] | None = None
    top_logprobs: TopLogprobs | None = None
    choices: tuple[Choice, ...] | None = None


class Failure(Wire):
    """Why a job ended without a result."""

    code: str
    message: str


class Status(Wire):
    """What a client sees of a job."""

    id: str
    model: str
    tenant: str
    state: State
    attempt: int = Field(description="0 while it was never claimed")
    num_tokens: int = Field(default=0, description="tokens accepted so far")
    timings: Timings = Timings()
    metadata: dict[str, str] = Field(default_factory=dict)
    result: Result | None = None
    failure: Failure | None = None


class Chunk(Wire):
    """Tokens `index .. index + len(token_ids)` of a job's output; `text` may be empty inside a character.

    Of a job that asked for n > 1, `choice` says to which answer they belong, and the index counts the tokens of all.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...] | None = None
    top_logprobs: TopLogprobs | None = None
    choice: int | None = None

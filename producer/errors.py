"""Everything that can go wrong, as one tree.

    HortatorError
    ├── BadRequest                  the job can never run, or an argument is of no use: mend it and call again
    │   ├── PromptTooLong
    │   └── IdempotencyConflict     same key, other body
    ├── IterableFailed              what `enqueue_many` was to iterate over raised
    ├── UnknownModel                no group serves this model, nor did lately
    ├── UnknownJob                  never issued, of another tenant, or expired (`gone` tells)
    ├── QueueFull                   try again after `retry_after_s`
    ├── ClientUnusable              the client is closed, or belongs to another event loop
    ├── StoreUnavailable            Redis is away, full or slow; nothing was written
    │   └── StoreForbidden          it refuses our credentials (a ConfigError, too)
    ├── StoreUnsuitable             Redis is too old, or set to evict: refused at start
    ├── JobFailed                   the job ended without a result
    │   ├── JobCancelled
    │   └── JobExpired              its deadline passed
    ├── ConfigError                 a setting, file or model directory cannot work
    └── GroupFailed                 a rank died, hung or disagreed: the whole group is down

Each carries a stable `code` (what clients may match on) and, where there is one, the `job_id` that it concerns.
"""

from typing import Any, ClassVar


class HortatorError(Exception):
    """Root of all errors that hortator raises on purpose."""

    code: ClassVar[str] = "error"

    def __init__(self, message: str, *, job_id: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.job_id = job_id
        self.index: int | None = None  # of the refused job among those of one enqueue; a job that is not in has no id
        self.accepted: tuple[Any, ...] = ()  # of a long enqueue: what it would have returned for the jobs that are in


class BadRequest(HortatorError):
    """The job can never run as it is; or an argument of a client's call is of no use."""

    code = "bad_request"


class PromptTooLong(BadRequest):
    """Prompt and max_tokens do not fit the model or the KV pool."""

    code = "prompt_too_long"


class IdempotencyConflict(BadRequest):
    """The idempotency key was used with another body."""

    code = "idempotency_conflict"


class IterableFailed(HortatorError):
    """The iterable that `enqueue_many` was given raised (that is the cause): the jobs before are `accepted`."""

    code = "iterable_failed"


class UnknownModel(HortatorError):
    """No group has served this model for as long as results live."""

    code = "unknown_model"


class UnknownJob(HortatorError):
    """The id was never issued, or is another tenant's (`gone` false), or its record has expired (`gone` true)."""

    code = "unknown_job"

    def __init__(self, message: str, *, job_id: str | None = None, gone: bool = False) -> None:
        super().__init__(message, job_id=job_id)
        self.gone = gone


class QueueFull(HortatorError):
    """The model's or the tenant's queue is at its limit; nothing was written."""

    code = "queue_full"

    def __init__(self, message: str, *, retry_after_s: float, job_id: str | None = None) -> None:
        super().__init__(message, job_id=job_id)
        self.retry_after_s = retry_after_s


class ClientUnusable(HortatorError):
    """The client was closed; or it is an AsyncClient that another event loop has used."""

    code = "client_unusable"


class StoreUnavailable(HortatorError):
    """Redis did not take the call; nothing was half-written."""

    code = "store_unavailable"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StoreUnsuitable(HortatorError):
    """This Redis would lose jobs: wrong version or an eviction policy."""

    code = "store_unsuitable"


class JobFailed(HortatorError):
    """The job ended without a result; `reason` is the code in its record."""

    code = "job_failed"

    def __init__(self, message: str, *, job_id: str | None = None, reason: str = "failed") -> None:
        super().__init__(message, job_id=job_id)
        self.reason = reason


class JobCancelled(JobFailed):
    """Somebody cancelled the job."""

    code = "cancelled"


class JobExpired(JobFailed):
    """The job's deadline passed before it was finished."""

    code = "expired"


class ConfigError(HortatorError):
    """A setting, a file or a model directory cannot work."""

    code = "config_error"


class StoreForbidden(StoreUnavailable, ConfigError):
    """Redis is there and refuses our credentials, or they do not allow what we need.

    To whoever starts a process a setting is wrong; for one that runs already the store is away until that is mended.
    """


class GroupFailed(HortatorError):
    """A rank died, hung or disagreed; the group is one unit of failure."""

    code = "group_failed"

"""What an application needs to enqueue prompts and to get every answer, once.  No torch, no Celery."""

if __name__ != "hortator.producer":
    raise ImportError(f"import this folder as hortator.producer, not as {__name__}")

from .aio import AsyncClient, AsyncJobHandle
from .client import Client, JobHandle
from .errors import (
    BadRequest,
    ClientUnusable,
    ConfigError,
    HortatorError,
    IdempotencyConflict,
    IterableFailed,
    JobCancelled,
    JobExpired,
    JobFailed,
    PromptTooLong,
    QueueFull,
    StoreUnavailable,
    StoreUnsuitable,
    UnknownJob,
    UnknownModel,
)
from .schema import (
    Chunk,
    Failure,
    FinishReason,
    Job,
    Message,
    Priority,
    Result,
    Sampling,
    State,
    Status,
    Timings,
    Usage,
)

__all__ = [
    "AsyncClient",
    "AsyncJobHandle",
    "BadRequest",
    "Chunk",
    "Client",
    "ClientUnusable",
    "ConfigError",
    "Failure",
    "FinishReason",
    "HortatorError",
    "IdempotencyConflict",
    "IterableFailed",
    "Job",
    "JobCancelled",
    "JobExpired",
    "JobFailed",
    "JobHandle",
    "Message",
    "Priority",
    "PromptTooLong",
    "QueueFull",
    "Result",
    "Sampling",
    "State",
    "Status",
    "StoreUnavailable",
    "StoreUnsuitable",
    "Timings",
    "UnknownJob",
    "UnknownModel",
    "Usage",
]

"""What an application needs to enqueue prompts and to get every answer, once.  No torch, no Celery."""

if __name__ != "hortator.producer":
    raise ImportError(f"import this folder as hortator.producer, not as {__name__}")

from hortator.producer.aio import AsyncClient, AsyncJobHandle
from hortator.producer.client import Client, JobHandle
from hortator.producer.errors import (
    BadRequest,
    ConfigError,
    HortatorError,
    IdempotencyConflict,
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
from hortator.producer.schema import (
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
    "ConfigError",
    "Failure",
    "FinishReason",
    "HortatorError",
    "IdempotencyConflict",
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

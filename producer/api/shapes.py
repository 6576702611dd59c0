"""What the API answers beside the wire schema, and how both appear in its OpenAPI page."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from hortator.producer.schema import JobId, State, Status


class Shape(BaseModel):
    model_config = ConfigDict(frozen=True)


class Accepted(Shape):
    """The job is durable.  `duplicate`: its idempotency key was known, nothing was added."""

    id: str
    state: State
    duplicate: bool = False
    ignored: tuple[str, ...] = Field(default=(), description="fields of the body that this server does not know")


class CancelReply(Shape):
    id: str
    state: State


class Ids(Shape):
    ids: tuple[JobId, ...] = Field(min_length=1)


class Statuses(Shape):
    jobs: tuple[Status | None, ...]


class ErrorDetail(Shape):
    code: str = Field(description="stable; match on this")
    message: str = Field(description="for people")
    job_id: str | None = None


class ErrorReply(Shape):
    error: ErrorDetail


class Group(Shape):
    """A model group that is alive, as it describes itself."""

    group: str
    model: str
    running: int
    capacity: int
    epoch: int
    state: str = Field(description="starting, ready, draining, stopping, restarting, down")
    info: dict[str, Any]
    room: int = Field(default=0, description="rows that are free for jobs")


class Hindrance(Shape):
    """Why a job waits."""

    why: str = Field(description="no_group, not_ready, draining, suspects, full, memory; match on this")
    text: str = Field(description="for people")


class Queue(Shape):
    model: str
    depth: int
    oldest_age_s: float | None = None
    running: int
    suspects: int = Field(description="jobs that were part of a crash and must first run alone")
    groups: tuple[Group, ...]
    hindrance: Hindrance | None = Field(default=None, description="null: a job that is sent now is taken at once")


class Queues(Shape):
    queues: tuple[Queue, ...]


class Letter(Shape):
    """A dead letter; `message` shows its first bytes, unprintable ones escaped."""

    letter_id: str
    model: str
    job_id: str | None = None
    reason: str
    buried_ms: int
    message: str
    message_bytes: int


class Letters(Shape):
    dead_letters: tuple[Letter, ...]


def error_docs(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorReply} for status in statuses}


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """The body's schema for the OpenAPI page; routes parse the bytes themselves, strictly."""
    schema = model.model_json_schema(ref_template=f"#/components/schemas/{model.__name__}/$defs/{{model}}")
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}

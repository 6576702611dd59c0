"""The one shape in which the API says no: {"error": {"code", "message", "job_id"?}}, and its HTTP status.

HortatorError
└── ApiError                only over HTTP
    ├── Malformed           the bytes are not an acceptable JSON body or parameter
    │   └── BadFraming      nor an HTTP request of which everybody sees the same end
    ├── BadField            the JSON is fine, a field's value is not
    ├── NotJson             another Content-Type
    ├── BodyTooLarge, BodyTooSlow
    ├── Unauthorized, Forbidden
    └── TooManyWaiters      long polls and streams are bounded
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

from starlette.responses import Response

from hortator.producer.errors import (
    BadRequest,
    HortatorError,
    IdempotencyConflict,
    QueueFull,
    StoreUnavailable,
    StoreUnsuitable,
    UnknownJob,
    UnknownModel,
)
from hortator.producer.problems import Problem, listed


class ApiError(HortatorError):
    """An error that only a client over HTTP can meet."""

    status: ClassVar[int] = 400
    headers: ClassVar[Mapping[str, str]] = {}


class Malformed(ApiError):
    code = "malformed"


class BadFraming(Malformed):
    headers: ClassVar[Mapping[str, str]] = {"connection": "close"}


class BadField(ApiError):
    code = "bad_request"
    status = 422


class NotJson(ApiError):
    code = "not_json"
    status = 415


class BodyTooLarge(ApiError):
    code = "body_too_large"
    status = 413
    headers: ClassVar[Mapping[str, str]] = {"connection": "close"}


class BodyTooSlow(ApiError):
    code = "body_too_slow"
    status = 408
    headers: ClassVar[Mapping[str, str]] = {"connection": "close"}


class Unauthorized(ApiError):
    code = "unauthorized"
    status = 401
    headers: ClassVar[Mapping[str, str]] = {"www-authenticate": "Bearer"}


class Forbidden(ApiError):
    code = "forbidden"
    status = 403


class TooManyWaiters(ApiError):
    code = "too_many_waiters"
    status = 503
    headers: ClassVar[Mapping[str, str]] = {"retry-after": "1"}


STATUS: Mapping[type[HortatorError], int] = {
    BadRequest: 400,
    IdempotencyConflict: 409,
    UnknownModel: 404,
    UnknownJob: 404,
    QueueFull: 429,
    StoreUnavailable: 503,
    StoreUnsuitable: 503,
}


def error_response(
    status: int, code: str, message: str, *, job_id: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """The shape itself as a response."""
    return Response(error_body(code, message, job_id=job_id), status, headers, media_type="application/json")


def error_body(code: str, message: str, *, job_id: str | None = None) -> bytes:
    """The shape itself.  Escaped to ASCII, so that nothing a client sent can break the encoding."""
    error = {"code": code, "message": message} | ({"job_id": job_id} if job_id is not None else {})
    return json.dumps({"error": error}).encode()


def refusal(error: HortatorError) -> Response:
    """Any error of the tree as a response."""
    headers = dict(error.headers) if isinstance(error, ApiError) else {}
    if isinstance(error, QueueFull | StoreUnavailable):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    return error_response(status_of(error), error.code, error.message, job_id=error.job_id, headers=headers)


def status_of(error: HortatorError) -> int:
    """The HTTP status of an error: its own, or that of the nearest ancestor in the table."""
    if isinstance(error, ApiError):
        return error.status
    if isinstance(error, UnknownJob) and error.gone:
        return 410
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)


def describe(problems: Sequence[Problem]) -> str:
    """pydantic's complaints as one line: which field, what was wrong.  Text of the client is never repeated."""
    return listed(problems, got=got)


def got(problem: Problem) -> str:
    """Numbers are repeated, text never is: it may be the prompt."""
    value = problem.get("input")
    if isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 10**30):
        return f" (got {value})"
    return ""

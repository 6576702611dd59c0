"""The Celery protocol-2 message of a job, as kombu's Redis transport reads it from a list."""

import base64
import functools
import hashlib
import json
import re
import socket
from dataclasses import dataclass, replace
from typing import Any

from .errors import BadRequest
from .names import STEP_OF
from .schema import JOB_ID, MAX_N, SCHEMA_VERSION, TASK_NAME, Job

MAX_ENVELOPE_BYTES = 65_536
_EMBED = '{"callbacks": null, "errbacks": null, "chain": null, "chord": null}'
_REDACTED = '"(redacted)"'  # Celery's events, Flower and logs show the repr: the prompt must not be in it
_ANSWERS = re.compile(rb'"n"\s*:\s*(\d{1,9})')
_JOB_ID = re.compile(JOB_ID)


def is_job_id(text: str) -> bool:
    """True when the text may be used in keys as a job's id."""
    return _JOB_ID.fullmatch(text) is not None


@functools.cache
def _origin() -> str:
    return json.dumps(f"hortator@{socket.gethostname()}")


def build(job: Job, job_id: str) -> bytes:
    """The message to LPUSH.  `hortator.record` says that a record was written with it; the id must be a sound one."""
    body = base64.b64encode(f"[[], {job.model_dump_json(exclude_none=True)}, {_EMBED}]".encode()).decode()
    return (
        f'{{"body": "{body}", "content-encoding": "utf-8", "content-type": "application/json", "headers": {{'
        f'"lang": "py", "task": "{TASK_NAME}", "id": "{job_id}", "root_id": "{job_id}", "parent_id": null, '
        f'"group": null, '
        f'"retries": 0, "eta": null, "expires": null, "timelimit": [null, null], '
        f'"argsrepr": {_REDACTED}, "kwargsrepr": {_REDACTED}, "origin": {_origin()}, "ignore_result": false, '
        f'"stamps": {{}}, '
        f'"hortator": {{"version": {SCHEMA_VERSION}, "record": true}}}}, '
        f'"properties": {{"correlation_id": "{job_id}", "reply_to": "", "delivery_mode": 2, '
        f'"delivery_info": {{"exchange": "", "routing_key": "{job.model}"}}, "priority": {STEP_OF[job.priority]}, '
        f'"body_encoding": "base64", "delivery_tag": "{job_id}"}}}}'
    ).encode()


def checked(job: Job, job_id: str, *, max_bytes: int) -> bytes:
    """`build`, or BadRequest for an id that could break keys or a job that is too large."""
    if not is_job_id(job_id):
        raise BadRequest(f"job id {job_id!r:.140}: letters, digits and . _ : - only, at most 128", job_id=job_id)
    raw = build(job, job_id)
    if len(raw) > max_bytes:
        raise BadRequest(f"the job is {len(raw)} bytes as a message, the limit is {max_bytes}", job_id=job_id)
    return raw


def digest(job: Job) -> str:
    """What must be equal for two jobs under one idempotency key."""
    return hashlib.sha256(job.model_dump_json(exclude={"idempotency_key"}).encode()).hexdigest()[:32]


def rows_of(raw: bytes) -> int:
    """For how many answers a message asks, as record.lua finds it: 1 where that cannot be told."""
    envelope = _json(raw)
    body = envelope.get("body") if isinstance(envelope, dict) else None
    if not isinstance(body, str):
        return 1
    try:
        text = body.encode() if body.startswith("[") else base64.b64decode(body)
    except ValueError:
        return 1
    found = [int(digits) for digits in _ANSWERS.findall(text)]
    return max((n for n in found if 1 <= n <= MAX_N), default=1)


@dataclass(frozen=True)
class Opened:
    """What a message's envelope says, read as claim.lua reads it: the id if it is sound, and what is wrong."""

    job_id: str | None = None
    problem: str | None = None
    version: Any = None
    recorded: bool = False


def opened(raw: bytes, *, max_bytes: int) -> Opened:
    """Look at the envelope only; whoever runs the job looks into the body."""
    found = _opened(raw)
    if len(raw) <= max_bytes:
        return found
    return replace(found, problem=f"too large: {len(raw)} bytes, the limit is {max_bytes}")


def _opened(raw: bytes) -> Opened:
    envelope = _json(raw)
    if not isinstance(envelope, dict):
        return Opened(problem="not a JSON object")
    body = envelope.get("body")
    size = len(raw) - (len(body) if isinstance(body, str) else 0)
    if size > MAX_ENVELOPE_BYTES:
        return Opened(problem=f"its envelope is larger than {MAX_ENVELOPE_BYTES} bytes")
    headers = envelope.get("headers")
    if not isinstance(headers, dict):
        return Opened(problem="no headers: not a Celery protocol 2 message")
    job_id = headers.get("id")
    if not isinstance(job_id, str) or not is_job_id(job_id):
        return Opened(problem="no usable id in its headers")
    mark = headers.get("hortator")
    mark = mark if isinstance(mark, dict) else {}
    version = mark.get("version")
    problem = _problem(envelope) or _version_problem(version)
    return Opened(job_id, problem, version, mark.get("record") is True)


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None


def _is_text(envelope: dict[str, Any]) -> bool:
    try:
        json.dumps(envelope, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _version_problem(version: Any) -> str | None:
    sound = version is None or (isinstance(version, int | float) and not isinstance(version, bool) and version >= 1)
    if sound and (version is None or version % 1 == 0):
        return None
    return "its hortator.version is no version: a positive integer"


def _problem(envelope: dict[str, Any]) -> str | None:
    rest = envelope | {"body": ""} if isinstance(envelope.get("body"), str) else envelope
    if not _is_text(rest):
        return "its envelope has half of a surrogate pair, which is no text"
    if envelope.get("content-type") != "application/json":
        return "its content type is not application/json"
    if not isinstance(envelope.get("body"), str):
        return "no body"
    if not isinstance(envelope.get("properties"), dict):
        return "no properties: not a Celery protocol 2 message"
    return None

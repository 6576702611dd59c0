"""What is inside a Celery protocol-2 message, opened with suspicion: anybody can push bytes into the queue."""

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic import ValidationError

from hortator.producer.errors import BadRequest
from hortator.producer.job import describe
from hortator.producer.schema import SCHEMA_VERSION, TASK_NAME, Job, Sampling
from hortator.producer.sizes import too_many

MAX_TIME_LIMIT_S = 30 * 86_400

_SAMPLING_FIELDS = frozenset(Sampling.model_fields)
_LINKS = ("callbacks", "errbacks", "chain", "chord")


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message whose form is right; nothing is known yet about the job in it."""

    args: list[Any]
    kwargs: dict[str, Any]
    headers: dict[str, Any]
    properties: dict[str, Any]
    time_limit_s: float | None = None


def open_envelope(message: bytes) -> Envelope:
    """Decode a message of the queue; BadRequest says what is wrong with it."""
    raw = _loads(message, "the message")
    if not isinstance(raw, dict):
        raise BadRequest(f"the message is a JSON {_kind(raw)}, not a Celery message")
    headers, properties = raw.get("headers"), raw.get("properties")
    if not isinstance(headers, dict) or not isinstance(properties, dict):
        raise BadRequest("the message has no headers and properties: not Celery's message protocol 2")
    if headers.get("task") != TASK_NAME:
        raise BadRequest(f"unknown task {str(headers.get('task'))[:128]!r}: this queue runs {TASK_NAME!r} only")
    if headers.get("eta") is not None:
        raise BadRequest("eta and countdown are not supported: send the job when it is due")
    args, kwargs = _open_body(raw, properties)
    return Envelope(args, kwargs, headers, properties, _time_limit_s(headers))


def job_of(envelope: Envelope, *, model: str) -> Job:
    """The job that the arguments describe; BadRequest names every wrong field, and never repeats the prompt.

    `llm.generate(prompt)`, `llm.generate({...})` and keywords all work; sampling parameters may stand beside the
    prompt; the model defaults to the queue's.
    """
    fields = _positional(envelope.args) | envelope.kwargs
    if problem := too_many(fields):
        raise BadRequest(problem)
    if fields.setdefault("version", SCHEMA_VERSION) != SCHEMA_VERSION:
        raise BadRequest(f"schema version {fields['version']!r:.40} is not {SCHEMA_VERSION}: it needs another worker")
    loose = {name: fields.pop(name) for name in _SAMPLING_FIELDS & fields.keys()}
    if loose:
        given = fields.get("sampling") or {}
        fields["sampling"] = loose | given if isinstance(given, dict) else given
    fields.setdefault("model", model)
    try:
        job = Job.model_validate(fields)
    except ValidationError as error:
        raise BadRequest(describe(error)) from None
    if job.model != model:
        raise BadRequest(f"the job asks for model {job.model!r} but was sent to the queue of {model!r}")
    return job


def _open_body(raw: dict[str, Any], properties: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    if raw.get("content-type") != "application/json":
        raise BadRequest(f"content type {str(raw.get('content-type'))[:80]!r} is refused: only application/json")
    if raw.get("headers", {}).get("compression"):
        raise BadRequest("compressed messages are refused: send it without task_compression")
    body = _loads(_body_bytes(raw.get("body"), properties.get("body_encoding")), "the message's body")
    match body:
        case [list(args), dict(kwargs), dict(embed)] if all(isinstance(name, str) for name in kwargs):
            _refuse_links(embed)
            return args, kwargs
        case _:
            raise BadRequest("the message's body is not [args, kwargs, embed]")


def _body_bytes(body: Any, encoding: Any) -> bytes:
    if not isinstance(body, str):
        raise BadRequest("the message has no body")
    try:
        return base64.b64decode(body, validate=True) if encoding == "base64" else body.encode()
    except (binascii.Error, UnicodeEncodeError, ValueError):
        raise BadRequest("the message's body is not valid base64") from None


def _refuse_links(embed: dict[str, Any]) -> None:
    links = [name for name in _LINKS if embed.get(name)]
    if links:
        raise BadRequest(f"{', '.join(links)}: hortator starts no further tasks; wait for the result and send them")


def _positional(args: list[Any]) -> dict[str, Any]:
    match args:
        case []:
            return {}
        case [str(prompt)]:
            return {"prompt": prompt}
        case [dict(fields)] if all(isinstance(name, str) for name in fields):
            return dict(fields)
        case _:
            raise BadRequest(f"{TASK_NAME} takes keywords, one prompt, or one object; got {len(args)} arguments")


def _time_limit_s(headers: dict[str, Any]) -> float | None:
    limits = headers.get("timelimit")
    hard = limits[0] if isinstance(limits, list) and limits else None
    if hard is None:
        return None
    if isinstance(hard, bool) or not isinstance(hard, int | float) or not 0 < hard <= MAX_TIME_LIMIT_S:
        raise BadRequest(f"the time limit must be a positive number of seconds, at most {MAX_TIME_LIMIT_S}")
    return float(hard)


def _loads(data: bytes, what: str) -> Any:
    try:
        return _decode(data.decode())
    except RecursionError:
        raise BadRequest(f"{what} is nested too deeply") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise BadRequest(f"{what} is not valid JSON: {type(error).__name__}") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_decode = json.JSONDecoder(parse_constant=_no_constant).decode


def _kind(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")

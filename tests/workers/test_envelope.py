"""Messages of any client and any enemy."""

import base64
import json
from typing import Any

import pytest

from hortator.producer.errors import BadRequest
from hortator.workers.envelope import Envelope, job_of, open_envelope
from tests.workers.messages import message


def envelope(*args: Any, **kwargs: Any) -> Envelope:
    return open_envelope(message("id-1", *args, **kwargs))


def test_a_message_of_a_stock_client_opens() -> None:
    opened = envelope(prompt="hello", headers={"traceparent": "00-ab"})
    assert (opened.args, opened.kwargs) == ([], {"prompt": "hello"})
    assert opened.headers["traceparent"] == "00-ab"


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"NaN", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 5000, "not valid JSON"),
        (b"17", "JSON number"),
        (b'"text"', "JSON string"),
        (b"{}", "message protocol 2"),
        (b'{"headers": [], "properties": {}}', "message protocol 2"),
        (b'{"headers": {"task": "os.system"}, "properties": {}}', "unknown task 'os.system'"),
        (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R.", "not valid JSON"),
    ],
)
def test_bytes_that_are_no_message_are_refused_with_the_reason(raw: bytes, says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        open_envelope(raw)


def _bent(**changes: Any) -> bytes:
    raw = json.loads(message("id-1", prompt="x"))
    for where, value in changes.items():
        place, *rest = where.split("__")
        if rest:
            raw[place][rest[0]] = value
        else:
            raw[place.replace("_", "-") if place.startswith("content") else place] = value
    return json.dumps(raw).encode()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"content_type": "application/x-python-serialize"}, "only application/json"),
        ({"body": "%%%"}, "not valid base64"),
        ({"body": None}, "no body"),
        ({"body": base64.b64encode(b"{}").decode()}, r"not \[args, kwargs, embed\]"),
        ({"body": base64.b64encode(b"[[],{},{}").decode()}, "not valid JSON"),
        ({"headers__compression": "application/x-gzip"}, "compressed"),
        ({"headers__eta": "2030-01-01T00:00:00"}, "eta and countdown"),
        ({"headers__timelimit": ["soon", None]}, "time limit"),
        ({"headers__timelimit": [-1, None]}, "time limit"),
        ({"headers__timelimit": [10**400, None]}, "time limit"),
        ({"body": base64.b64encode(b'[[],{},{"chord":{"task":"x"}}]').decode()}, "chord"),
    ],
)
def test_an_envelope_that_cannot_be_honoured_is_refused_with_the_reason(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        open_envelope(_bent(**changes))


def test_the_time_limit_of_a_message_is_read() -> None:
    assert open_envelope(_bent(headers__timelimit=[12, 10])).time_limit_s == 12


def test_the_model_defaults_to_the_queue() -> None:
    assert job_of(envelope(prompt="hello"), model="m").model == "m"


def test_a_prompt_may_be_the_only_argument() -> None:
    assert job_of(envelope("hello"), model="m").prompt == "hello"


def test_an_object_may_be_the_only_argument() -> None:
    assert job_of(envelope({"messages": [{"role": "user", "content": "hi"}]}), model="m").messages is not None


def test_sampling_parameters_may_stand_beside_the_prompt() -> None:
    job = job_of(envelope(prompt="hello", max_tokens=7, sampling={"temperature": 0.5}), model="m")
    assert (job.sampling.max_tokens, job.sampling.temperature) == (7, 0.5)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({}, "exactly one of prompt, token_ids, messages; got none"),
        ({"prompt": "x", "token_ids": [1]}, "exactly one"),
        ({"prompt": ""}, "prompt: String should have at least 1 character"),
        ({"prompt": 5}, "prompt: Input should be a valid string"),
        ({"prompt": "x", "max_tokens": -1}, "sampling.max_tokens"),
        ({"prompt": "x", "sampling": 5}, "sampling"),
        ({"prompt": "x", "temperature": 1e300}, "sampling.temperature"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "x", "version": 2}, "schema version 2 is not 1"),
        ({"prompt": "x", "model": "other"}, "asks for model 'other'"),
        ({"token_ids": [1, -1, -1]}, "^token_ids.1: [^;]*$"),
        ({"token_ids": [1] * 1_000_001}, "token_ids: 1000001 values"),
        ({"messages": [1] * 40_000}, "messages: too many values"),
        ({"prompt": "x", "stop": [[], [1] * 40_000]}, "stop: too many values"),
        ({"prompt": "x", "metadata": {str(n): 1 for n in range(40_000)}}, "metadata: too many values"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_wrong_job_is_refused_with_the_field_named(kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        job_of(envelope(**kwargs), model="m")


def test_a_refusal_never_repeats_the_prompt() -> None:
    with pytest.raises(BadRequest) as refusal:
        job_of(envelope(prompt="my secret", max_tokens="my other secret"), model="m")
    assert "secret" not in refusal.value.message

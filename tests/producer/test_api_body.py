"""The strict parser and the byte counter, without a server."""

import asyncio
import contextlib
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message

from hortator.producer.api import body
from hortator.producer.api.failures import BodyTooLarge, BodyTooSlow, Malformed


def parse(raw: bytes) -> dict[str, Any]:
    return body.parse_object(raw, max_depth=8, max_containers=100)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"a":1,"a":2}', "twice"),
        (b'{"x":{"a":1,"a":1}}', "twice"),
        (b'{"a":NaN}', "NaN is no number"),
        (b'{"a":-Infinity}', "-Infinity is no number"),
        (b'{"a":"\xff"}', "not UTF-8: byte 6"),
        (b'\xef\xbb\xbf{"a":1}', "BOM"),
        (b'{"a":"\x01"}', "control character"),
        (b'{"a":' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"a":' * 9 + b"1" + b"}" * 9, "nested 9 deep"),
        (b"[" * 1_000, "more than 100"),
        (b'{"a":[' + b"[]," * 101 + b"1]}", "more than 100"),
        (b'{"a":1}{"b":2}', "not JSON"),
        (b'{"a":0.' + b"3" * 500 + b"}", "too many digits"),
        (b'{"a":[' + b"1," * 1_100_000 + b"1]}", "more than 1032768 values"),
        (b'{"a":{' + b",".join(b'"%d":1' % n for n in range(40_000)) + b"}}", "more than 32768 keys"),
        (b'{"a":{"stop":[' + b"1," * 40_000 + b"1]}}", "a: too many values"),
        (b'{"token_ids":[' + b"1," * 1_000_000 + b"1]}", "token_ids: 1000001 values"),
    ],
)
def test_a_body_is_refused_with_the_reason(raw: bytes, reason: str) -> None:
    with pytest.raises(Malformed) as refused:
        parse(raw)
    assert reason in refused.value.message


def test_brackets_inside_strings_do_not_count() -> None:
    text = 'code: if (a[0]) { "quoted \\" [" } ' * 1000
    assert parse(json.dumps({"prompt": text}).encode()) == {"prompt": text}


@settings(max_examples=30)
@given(
    st.dictionaries(st.text(max_size=8), st.recursive(st.text() | st.integers() | st.booleans() | st.none(), st.lists))
)
def test_what_json_writes_is_read_back_the_same(value: dict[str, Any]) -> None:
    assert body.parse_object(json.dumps(value).encode(), max_depth=1000, max_containers=100_000) == value


@given(st.binary(max_size=300) | st.text(alphabet='{}[]",:\\ \x00aeé1.-', max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused_and_never_crash(raw: bytes) -> None:
    with contextlib.suppress(Malformed):
        assert isinstance(parse(raw), dict)


@pytest.mark.parametrize(
    "raw",
    [
        b'"' + rb"\"" * 4_000_000,
        b"{" * 8_000_000,
        b"[]," * 2_600_000,
        b'{"a":"' + b"\\" * 7_999_999,
        b'{"' + b'":"' * 2_600_000,
    ],
    ids=["escaped quotes", "braces", "empty arrays", "backslashes", "quotes"],
)
def test_eight_hostile_megabytes_cost_no_more_than_their_length(raw: bytes) -> None:
    began = time.process_time()
    with pytest.raises(Malformed):
        parse(raw)
    assert time.process_time() - began < 30.0, "linear: about a second on a slow machine; quadratic: hours"


def test_a_million_token_ids_are_not_too_many() -> None:
    assert len(parse(b'{"token_ids":[' + b"1," * 999_999 + b"1]}")["token_ids"]) == 1_000_000


class Line:
    """A client that sends these parts, then nothing more."""

    def __init__(self, *parts: bytes, complete: bool = True) -> None:
        self._messages: list[Message] = [
            {"type": "http.request", "body": part, "more_body": not complete or part is not parts[-1]} for part in parts
        ]
        self.taken = 0

    async def __call__(self) -> Message:
        if self.taken == len(self._messages):
            await asyncio.Event().wait()
        self.taken += 1
        return self._messages[self.taken - 1]


async def read_all(metered: body.Metered) -> bytes:
    whole = b""
    while True:
        message = await metered()
        whole += bytes(message["body"])
        if not message["more_body"]:
            return whole


def test_a_body_within_the_limit_passes() -> None:
    assert asyncio.run(read_all(body.Metered(Line(b"abc", b"defg"), 7, 1.0))) == b"abcdefg"


def test_a_body_without_a_length_is_refused_when_its_bytes_exceed_the_limit() -> None:
    with pytest.raises(BodyTooLarge):
        asyncio.run(read_all(body.Metered(Line(b"abc", b"defg", b"h"), 6, 1.0)))


def test_a_body_that_trickles_is_given_up() -> None:
    with pytest.raises(BodyTooSlow):
        asyncio.run(read_all(body.Metered(Line(b"abc", complete=False), 6, 0.05)))

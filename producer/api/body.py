"""Request bodies: bounded before they are read, and strict when they are parsed."""

import asyncio
import json
import re
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NoReturn

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hortator.producer.problems import NO_TEXT, field_name
from hortator.producer.sizes import MAX_VALUES, MAX_VALUES_OF_ALL, too_many

from .failures import BodyTooLarge, BodyTooSlow, Malformed, refusal

# A whole JSON string, or an unterminated one to the end: so every byte is looked at once, whatever a client sends.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_NOT_BRACKETS = bytes(sorted(set(range(256)) - set(b"[]{}")))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_LONG_NUMBER = re.compile(rb"[0-9]{400}")  # of the largest float 309 stand before its point
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
LINGER_BYTES = 64 * 2**20
LINGER_S = 2.0


class BodyLimit:
    """ASGI: refuses a body by its Content-Length, else counts its bytes as they come; bounds the time of both."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_s: float) -> None:
        self._app, self._max_bytes, self._timeout_s = app, max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._max_bytes:
            if "expect" not in headers:  # such a client sends nothing before it is told to
                await linger(receive)
            await refusal(too_large(length[:20], self._max_bytes))(scope, receive, send)
            return
        await self._app(scope, Metered(receive, self._max_bytes, self._timeout_s), send)


class Metered:
    """A `receive` that counts.  Raises BodyTooLarge or BodyTooSlow into whoever reads the body."""

    def __init__(self, receive: Receive, max_bytes: int, timeout_s: float) -> None:
        self._receive, self._max_bytes, self._timeout_s = receive, max_bytes, timeout_s
        self._read = 0
        self._complete = False
        self._deadline: float | None = None

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()
        now = asyncio.get_running_loop().time()
        self._deadline = self._deadline or now + self._timeout_s
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise BodyTooSlow(f"the body was not complete after {self._timeout_s:g} s") from None
        if message["type"] == "http.request":
            self._read += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._read > self._max_bytes:
                await linger(self._receive)
                raise too_large("more", self._max_bytes)
        return message


def too_large(size: str, max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body has {size} bytes, the limit is {max_bytes} bytes (HORTATOR_API_MAX_BODY_BYTES)")


async def linger(receive: Receive) -> None:
    """Throw away, for a while, what the client still sends: cut off while it sends, it never reads the answer."""
    thrown_away = 0
    try:
        async with asyncio.timeout(LINGER_S):
            while thrown_away < LINGER_BYTES:
                message = await receive()
                thrown_away += len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def parse_object(body: bytes, *, max_depth: int, max_containers: int) -> dict[str, Any]:
    """The JSON object in a body.  Raises Malformed for anything that two readers might understand differently
    (duplicate keys, NaN, invalid UTF-8, half of a surrogate pair) or that costs more to read than it can be worth
    (nesting)."""
    check_shape(body, max_depth=max_depth, max_containers=max_containers)
    try:
        parsed = json.loads(body.decode(), object_pairs_hook=unique_keys, parse_constant=no_constant)
    except UnicodeDecodeError as problem:
        raise Malformed(f"the body is not UTF-8: byte {problem.start} is wrong") from None
    except json.JSONDecodeError as problem:
        raise Malformed(f"the body is not JSON: {problem.msg} at character {problem.pos}") from None
    if not isinstance(parsed, dict):
        raise Malformed("the body must be a JSON object")
    if crowd := too_many(parsed):
        raise Malformed(crowd)
    if _SURROGATE.search(body) and (where := next(no_text(parsed), None)):
        raise Malformed(f"{field_name(where)}: {NO_TEXT}")
    return parsed


def check_shape(body: bytes, *, max_depth: int, max_containers: int) -> None:
    """Depth, and number of objects and arrays, of values and keys, counted without building them."""
    unquoted = _STRING.sub(b"", body)
    if unquoted.count(b",") > MAX_VALUES_OF_ALL:
        raise Malformed(f"the body has more than {MAX_VALUES_OF_ALL} values")
    if unquoted.count(b":") > MAX_VALUES:
        raise Malformed(f"the body has more than {MAX_VALUES} keys")
    if _LONG_NUMBER.search(unquoted):
        raise Malformed("the body is not JSON: a number has too many digits")
    brackets = unquoted.translate(None, _NOT_BRACKETS)
    if len(brackets) > 2 * max_containers:
        raise Malformed(f"the body has more than {max_containers} objects and arrays")
    depth = max(accumulate((_STEP[bracket] for bracket in brackets), initial=0))
    if depth > max_depth:
        raise Malformed(f"the body is nested {depth} deep, the limit is {max_depth}")


def no_text(value: Any, *path: str | int) -> Iterator[tuple[str | int, ...]]:
    """Where there are strings, keys among them, that no UTF-8 can hold."""
    if isinstance(value, str):
        if not is_text(value):
            yield path
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(key, str) and not is_text(key):
            yield (*path, key)
        if isinstance(inner, str | dict | list):
            yield from no_text(inner, *path, key)


def is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Malformed("the body names a key twice in one object")
    return found


def no_constant(name: str) -> NoReturn:
    raise Malformed(f"the body is not JSON: {name} is no number")

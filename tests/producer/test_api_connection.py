"""Connections that ask nothing, against the API's protocol on a real socket."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from hortator.producer.api import connection as module
from hortator.producer.api.connection import Connection

PATIENCE_S = 0.3
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[bytes]]


async def slow_app(scope: Any, receive: Any, send: Any) -> None:
    """Answers after more than the patience with those that ask nothing."""
    await asyncio.sleep(2 * PATIENCE_S)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEADERS_TIMEOUT_S", PATIENCE_S)


def answers(*talks: Talk) -> list[bytes]:
    """What each of several connections at a time is told."""

    async def run() -> list[bytes]:
        config = uvicorn.Config(slow_app, http=Connection, lifespan="off", log_level="error")
        config.load()
        state = ServerState()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: Connection(config=config, server_state=state, app_state={}), "127.0.0.1", 0
        )
        async with server:
            opened = [await asyncio.open_connection(*server.sockets[0].getsockname()) for _ in talks]
            found = await asyncio.wait_for(asyncio.gather(*(t(*o) for t, o in zip(talks, opened, strict=True))), 5)
            for _, writer in opened:
                writer.close()
            return list(found)

    return asyncio.run(run())


async def asks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    return (await reader.readuntil(b"ok")).splitlines()[0]


async def keeps_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    return await reader.read()


async def dribbles(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    for _ in range(100):
        writer.write(b"G")
        await asyncio.sleep(PATIENCE_S / 10)
        if reader.at_eof() or writer.is_closing():  # the latter if a byte met a closed connection
            return b"ended"
    return b"borne"


async def asks_and_dribbles(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    assert b" 200 " in await asks(reader, writer)
    return await dribbles(reader, writer)


def test_who_sends_no_request_in_time_is_cut_off_and_who_waits_for_an_answer_is_not() -> None:
    told = answers(keeps_silent, dribbles, asks_and_dribbles, asks)
    assert told == [b"", b"ended", b"ended", b"HTTP/1.1 200 OK"]


def test_a_connection_too_many_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "max_connections", lambda: 2)
    *_, last = answers(asks, asks, keeps_silent)
    assert last.startswith(b"HTTP/1.1 503 ")
    assert b"too_many_connections" in last

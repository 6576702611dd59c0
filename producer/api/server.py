"""The API as a process: its socket, and an end that leaves no client without an answer."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
from fastapi import FastAPI

from hortator.producer.errors import ConfigError

from .connection import Connection, accepted_at_a_time, raise_limit
from .settings import ApiSettings

BACKLOG = 2048


class Server(uvicorn.Server):
    """Told to stop, it first ends all waiting: long polls get the present state, streams end to be resumed.

    Without this, uvicorn would wait for them until its patience ends.
    """

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.watcher.drain()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket.  Raises ConfigError that names host and port and says what to do."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        return bound(family, kind, protocol, address)
    except (OSError, UnicodeError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
        raise ConfigError(
            f"cannot listen on {host}:{port}: {reason}; choose another with --host/--port"
            " or HORTATOR_API_HOST/HORTATOR_API_PORT (port 0: any free one)"
        ) from None


def bound(family: int, kind: int, protocol: int, address: Any) -> socket.socket:
    """A listening socket.  It must know its protocol: asyncio sets TCP_NODELAY only then, and without that every answer
    waits 40 ms for the client's delayed acknowledgement."""
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def run(
    make_app: Callable[[], Awaitable[FastAPI]],
    close: Callable[[], Awaitable[None]],
    *,
    sock: socket.socket,
    settings: ApiSettings,
) -> None:
    """Serve on a bound socket until SIGINT or SIGTERM.  What `make_app` refuses is raised before anything is served."""

    raise_limit()

    async def serve() -> None:
        try:
            config = uvicorn.Config(
                await make_app(),
                http=Connection,
                backlog=accepted_at_a_time(),
                ws="none",
                lifespan="on",
                log_level="warning",
                server_header=False,
                timeout_graceful_shutdown=max(1, round(settings.drain_s)),
            )
            await Server(config).serve(sockets=[sock])
        finally:
            await close()

    asyncio.run(serve())


def address_of(sock: socket.socket) -> str:
    """http://host:port as a client would write it."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

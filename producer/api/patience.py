"""How long a request waits: for the store, and for whom."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.requests import Request

from hortator.producer.errors import StoreUnavailable

T = TypeVar("T")


@asynccontextmanager
async def bounded(timeout_s: float) -> AsyncIterator[None]:
    """StoreUnavailable instead of waiting longer for a store that is away, slow or cut off."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError:
        raise StoreUnavailable(f"Redis did not answer within {timeout_s * 1000:.0f} ms") from None


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The work's outcome, or None as soon as the client is gone: nobody waits for a client that left."""
    task, hangup = asyncio.ensure_future(work), asyncio.ensure_future(disconnect(request))
    try:
        await asyncio.wait({task, hangup}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        hangup.cancel()


async def disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

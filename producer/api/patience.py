"""How long a request waits: for the store, and for a client that may have left."""

import asyncio
import functools
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.requests import Request

from hortator.producer.errors import StoreUnavailable
from hortator.producer.schema import Chunk, Job, State, Status
from hortator.producer.store import DeadLetter, QueueInfo, Receipt, SweepReport

from .seam import AsyncStore

T = TypeVar("T")

TICKS = 5
STATUSES_AT_A_TIME = 25
SLOTS = 16  # calls at a time, each on a connection of its own
SLOWEST_LINK_BYTES_PER_S = 20e6  # a large prompt may take longer than the patience for a small one


@asynccontextmanager
async def bounded(timeout_s: float) -> AsyncIterator[None]:
    """StoreUnavailable instead of waiting longer for a store that is away, slow or cut off.

    Time is counted in a few ticks of the event loop: while this process itself is held up, the store's answer may be
    lying here unread, and that must not look like an outage.
    """
    loop = asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = []

    def tick() -> None:
        if len(timers) == TICKS:
            scope.reschedule(loop.time())
        else:
            timers.append(loop.call_later(timeout_s / TICKS, tick))

    try:
        async with asyncio.timeout(None) as scope:
            tick()
            yield
    except TimeoutError:
        raise StoreUnavailable(f"Redis did not answer within {timeout_s * 1000:.0f} ms") from None
    finally:
        timers[-1].cancel()


class PatientStore:
    """A store that many requests share: few calls at a time, each bounded in time.

    A crowd waits its turn for as long as the store answers; once a call fails, all who wait are refused at once.
    """

    def __init__(self, store: AsyncStore, *, timeout_s: float) -> None:
        self._store, self._timeout_s = store, timeout_s
        self._free = SLOTS
        self._crowd: deque[asyncio.Future[None]] = deque()

    async def enqueue(self, jobs: Sequence[Job], *, job_ids: Sequence[str] | None = None) -> list[Receipt]:
        size = sum(prompt_chars(job) for job in jobs)
        return await self._in_turn(lambda: self._store.enqueue(jobs, job_ids=job_ids), size / SLOWEST_LINK_BYTES_PER_S)

    async def cancel(self, job_ids: Sequence[str], *, tenant: str | None = None) -> list[State | None]:
        return await self._in_turn(lambda: self._store.cancel(job_ids, tenant=tenant))

    async def statuses(self, job_ids: Sequence[str], *, tenant: str | None = None) -> list[Status | None]:
        """Asked and read in pieces, each of which has its own time: the results of many jobs may be megabytes."""
        found: list[Status | None] = []
        for start in range(0, len(job_ids), STATUSES_AT_A_TIME):
            some = job_ids[start : start + STATUSES_AT_A_TIME]
            found += await self._in_turn(functools.partial(self._store.statuses, some, tenant=tenant))
        return found

    async def ended(self, job_ids: Sequence[str], *, tenant: str | None = None) -> list[str]:
        return await self._in_turn(lambda: self._store.ended(job_ids, tenant=tenant))

    async def issued(self, job_id: str, *, tenant: str) -> bool:
        return await self._in_turn(lambda: self._store.issued(job_id, tenant=tenant))

    async def chunks(self, job_id: str, *, after: int = 0) -> list[Chunk]:
        return await self._in_turn(lambda: self._store.chunks(job_id, after=after))

    async def sweep(self, *, limit: int = 1000, expired_before_ms: int | None = None) -> SweepReport:
        return await self._in_turn(lambda: self._store.sweep(limit=limit, expired_before_ms=expired_before_ms))

    async def queues(self) -> list[QueueInfo]:
        return await self._in_turn(self._store.queues)

    async def dead_letters(self, *, limit: int = 100, before: str | None = None) -> list[DeadLetter]:
        return await self._in_turn(lambda: self._store.dead_letters(limit=limit, before=before))

    async def count_dead_letters(self) -> int:
        return await self._in_turn(self._store.count_dead_letters)

    async def check(self, *, for_submits: bool = False) -> None:
        await self._in_turn(lambda: self._store.check(for_submits=for_submits))

    async def _in_turn(self, call: Callable[[], Awaitable[T]], extra_s: float = 0.0) -> T:
        await self._enter()
        try:
            async with bounded(self._timeout_s + extra_s):
                return await call()
        except StoreUnavailable as outage:
            self._refuse_crowd(outage)
            raise
        finally:
            self._leave()

    async def _enter(self) -> None:
        if self._free:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._crowd.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._leave()  # the slot was ours already
            raise

    def _leave(self) -> None:
        while self._crowd:
            turn = self._crowd.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def _refuse_crowd(self, outage: StoreUnavailable) -> None:
        crowd, self._crowd = self._crowd, deque()
        for turn in crowd:
            if not turn.done():
                turn.set_exception(StoreUnavailable(outage.message, retry_after_s=outage.retry_after_s))


def prompt_chars(job: Job) -> int:
    """About the size of a job."""
    said = sum(len(message.content) for message in job.messages or ())
    return said + len(job.prompt or "") + 8 * len(job.token_ids or ())


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

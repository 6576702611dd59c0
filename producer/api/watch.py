"""Waiting for jobs: one task looks at all awaited ids in one call; a waiter costs no connection and no call."""

import asyncio
import logging
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

from hortator.producer.errors import StoreUnavailable, UnknownJob
from hortator.producer.schema import Status

from .failures import TooManyWaiters
from .patience import bounded
from .seam import AsyncStore

log = logging.getLogger(__name__)

IDS_PER_CALL = 500
POLL_TIMEOUT_S = 2.0  # of one call for many ids; the callers' own patience is bounded elsewhere
IDLE_SHARE = 3  # of the poll's own duration is slept after it, so that polling takes at most a quarter of the time


class Watch:
    """One waiter's view of one job.  `status` is the newest one seen; close it, or use it as a context."""

    def __init__(self, watcher: "Watcher", status: Status) -> None:
        self._watcher = watcher
        self._event = asyncio.Event()
        self._vanished = False
        self.status = status

    async def changed(self, timeout_s: float) -> bool:
        """Wait for a newer status; False if there was none in time.  Raises UnknownJob once the record is gone."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        except TimeoutError:
            return False
        if not self._watcher.draining:
            self._event.clear()
        if self._vanished:
            raise UnknownJob(f"the record of job {self.status.id} has expired", job_id=self.status.id, gone=True)
        return True

    def tell(self, status: Status | None) -> None:
        """The watcher's side: what the store says now."""
        if status is None:
            self._vanished = True
        elif progress(status) == progress(self.status):
            return
        else:
            self.status = status
        self._event.set()

    def wake(self) -> None:
        self._event.set()

    def close(self) -> None:
        self._watcher.forget(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Watcher:
    """Polls while anybody waits.  `drain` ends all waiting, for good: the process is about to stop."""

    def __init__(self, store: AsyncStore, *, poll_s: float, max_waiters: int) -> None:
        self._store, self._poll_s, self._max_waiters = store, poll_s, max_waiters
        self._watches: dict[str, set[Watch]] = {}
        self._count = 0
        self._somebody = asyncio.Event()
        self.draining = False
        self._away_since: float | None = None  # on the loop's clock, as of the last poll

    @property
    def away_s(self) -> float:
        """For how long no poll was answered; 0 if the last one was."""
        return 0.0 if self._away_since is None else asyncio.get_running_loop().time() - self._away_since

    @property
    def waiters(self) -> int:
        return self._count

    def watch(self, status: Status) -> Watch:
        """Begin to watch a job.  Raises TooManyWaiters beyond the bound."""
        if self._count >= self._max_waiters:
            raise TooManyWaiters(f"{self._count} requests wait already; poll without wait_s, or come back")
        watch = Watch(self, status)
        self._watches.setdefault(status.id, set()).add(watch)
        self._count += 1
        self._somebody.set()
        if self.draining:
            watch.wake()
        return watch

    def forget(self, watch: Watch) -> None:
        """The end of a watch; a second call changes nothing."""
        same_job = self._watches.get(watch.status.id, set())
        if watch not in same_job:
            return
        same_job.remove(watch)
        self._count -= 1
        if not same_job:
            del self._watches[watch.status.id]
        if not self._watches:
            self._somebody.clear()
            self._away_since = None  # nobody looks from now on

    async def terminal(self, status: Status, *, timeout_s: float) -> Status:
        """The job's status as soon as it is terminal, else the newest one when the time is up.

        An outage of the store that ends in time goes unnoticed; one that does not raises StoreUnavailable.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        with self.watch(status) as watch:
            while not (watch.status.state.terminal or self.draining):
                left_s = deadline - asyncio.get_running_loop().time()
                if left_s <= 0 or not await watch.changed(left_s):
                    break
            if self.away_s and not watch.status.state.terminal:
                raise StoreUnavailable("Redis is away, the job's state is not known now")
            return watch.status

    def drain(self) -> None:
        self.draining = True
        for watch in self._all():
            watch.wake()

    async def run(self) -> None:
        """The one polling task; ends by cancellation only."""
        loop = asyncio.get_running_loop()
        while True:
            await self._somebody.wait()
            began = loop.time()
            try:
                await self._poll()
                self._away_since = None
            except StoreUnavailable:
                self._away_since = self._away_since or began
            except Exception:
                log.exception("cannot read the awaited jobs")
            await asyncio.sleep(max(self._poll_s, IDLE_SHARE * (loop.time() - began)))

    async def _poll(self) -> None:
        for ids in slices(list(self._watches), IDS_PER_CALL):
            async with bounded(POLL_TIMEOUT_S):
                statuses = await self._store.statuses(ids)
            for job_id, status in zip(ids, statuses, strict=True):
                for watch in self._watches.get(job_id, ()):
                    watch.tell(status)

    def _all(self) -> Iterator[Watch]:
        for watches in self._watches.values():
            yield from watches


def progress(status: Status) -> tuple[object, ...]:
    """What a waiter wants to be woken for."""
    return status.state, status.num_tokens, status.attempt


def slices(ids: list[str], size: int) -> Iterable[list[str]]:
    return (ids[start : start + size] for start in range(0, len(ids), size))

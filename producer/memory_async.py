"""The store's twin for asyncio."""

from collections.abc import Sequence

from .memory import MemoryStore
from .schema import Chunk, Job, State, Status
from .store import (
    DeadLetter,
    QueueInfo,
    Receipt,
    SweepReport,
)


class AsyncMemoryStore:
    """A MemoryStore whose methods are coroutines, as AsyncRedisStore's are: those that producers and the API call."""

    def __init__(self, store: MemoryStore | None = None) -> None:
        self.sync = store or MemoryStore()

    async def enqueue(self, jobs: Sequence[Job], *, job_ids: Sequence[str] | None = None) -> list[Receipt]:
        return self.sync.enqueue(jobs, job_ids=job_ids)

    async def cancel(self, job_ids: Sequence[str], *, tenant: str | None = None) -> list[State | None]:
        return self.sync.cancel(job_ids, tenant=tenant)

    async def statuses(self, job_ids: Sequence[str], *, tenant: str | None = None) -> list[Status | None]:
        return self.sync.statuses(job_ids, tenant=tenant)

    async def ended(self, job_ids: Sequence[str], *, tenant: str | None = None) -> list[str]:
        return self.sync.ended(job_ids, tenant=tenant)

    async def issued(self, job_id: str, *, tenant: str) -> bool:
        return self.sync.issued(job_id, tenant=tenant)

    async def chunks(self, job_id: str, *, after: int = 0) -> list[Chunk]:
        return self.sync.chunks(job_id, after=after)

    async def sweep(self, *, limit: int = 1000, expired_before_ms: int | None = None) -> SweepReport:
        return self.sync.sweep(limit=limit, expired_before_ms=expired_before_ms)

    async def queues(self) -> list[QueueInfo]:
        return self.sync.queues()

    async def dead_letters(self, *, limit: int = 100, before: str | None = None) -> list[DeadLetter]:
        return self.sync.dead_letters(limit=limit, before=before)

    async def count_dead_letters(self) -> int:
        return self.sync.count_dead_letters()

    async def check(self, *, for_submits: bool = False) -> None:
        self.sync.check(for_submits=for_submits)

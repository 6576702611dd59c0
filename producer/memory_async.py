"""The store's twin for asyncio."""

from collections.abc import Sequence

from hortator.producer.memory import MemoryStore
from hortator.producer.schema import Chunk, Job, State, Status
from hortator.producer.store import (
    Append,
    Claim,
    DeadLetter,
    GroupBeat,
    Lease,
    Outcome,
    QueueInfo,
    Receipt,
    ReleaseReason,
    Signals,
    SweepReport,
    Verdict,
)


class AsyncMemoryStore:
    """A MemoryStore whose methods are coroutines, as AsyncRedisStore's are."""

    def __init__(self, store: MemoryStore | None = None) -> None:
        self.sync = store or MemoryStore()

    async def enqueue(self, jobs: Sequence[Job], *, job_ids: Sequence[str] | None = None) -> list[Receipt]:
        return self.sync.enqueue(jobs, job_ids=job_ids)

    async def cancel(self, job_ids: Sequence[str], *, tenant: str | None = None) -> list[State | None]:
        return self.sync.cancel(job_ids, tenant=tenant)

    async def statuses(self, job_ids: Sequence[str], *, tenant: str | None = None) -> list[Status | None]:
        return self.sync.statuses(job_ids, tenant=tenant)

    async def issued(self, job_id: str, *, tenant: str) -> bool:
        return self.sync.issued(job_id, tenant=tenant)

    async def chunks(self, job_id: str, *, after: int = 0) -> list[Chunk]:
        return self.sync.chunks(job_id, after=after)

    async def claim(self, model: str, *, owner: str, limit: int, lease_s: float, idle: bool) -> Claim:
        return self.sync.claim(model, owner=owner, limit=limit, lease_s=lease_s, idle=idle)

    async def append(self, appends: Sequence[Append]) -> Signals:
        return self.sync.append(appends)

    async def renew(self, leases: Sequence[Lease], *, owner: str, lease_s: float) -> Signals:
        return self.sync.renew(leases, owner=owner, lease_s=lease_s)

    async def commit(self, outcomes: Sequence[Outcome]) -> list[Verdict]:
        return self.sync.commit(outcomes)

    async def release(self, leases: Sequence[Lease], *, reason: ReleaseReason) -> None:
        self.sync.release(leases, reason=reason)

    async def clear(self, lease: Lease) -> None:
        self.sync.clear(lease)

    async def beat(self, beat: GroupBeat) -> None:
        self.sync.beat(beat)

    async def sweep(self, *, limit: int = 1000, expired_before_ms: int | None = None) -> SweepReport:
        return self.sync.sweep(limit=limit, expired_before_ms=expired_before_ms)

    async def queues(self) -> list[QueueInfo]:
        return self.sync.queues()

    async def bury(self, model: str, message: bytes, *, reason: str, job_id: str | None = None) -> str:
        return self.sync.bury(model, message, reason=reason, job_id=job_id)

    async def dead_letters(self, *, limit: int = 100, before: str | None = None) -> list[DeadLetter]:
        return self.sync.dead_letters(limit=limit, before=before)

    async def replay(self, letter_ids: Sequence[str]) -> list[str]:
        return self.sync.replay(letter_ids)

    async def check(self, *, for_submits: bool = False) -> None:
        self.sync.check(for_submits=for_submits)

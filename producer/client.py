"""The blocking client: enqueue prompts, get every answer."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Self, Unpack

from . import arguments
from .awaited import Awaited, End, Handle, Key
from .batches import Batches
from .caller import Caller, OnOutage, settings_for
from .errors import HortatorError, StoreUnavailable, UnknownJob
from .job import (
    Follower,
    JobFields,
    Pace,
    Patience,
    new_job,
    outcome_of,
    result_of,
    unknown,
)
from .redis_store import RedisStore
from .schema import Chunk, Job, Result, State, Status
from .settings import StoreSettings
from .store import QueueInfo, Receipt, Store


class JobHandle(Handle):
    """One accepted job.  `duplicate`: the idempotency key was known, and this is the job that has it."""

    def __init__(self, client: "Client", job_id: str, *, tenant: str, duplicate: bool = False) -> None:
        super().__init__(job_id, tenant=tenant, duplicate=duplicate)
        self._client = client

    def status(self) -> Status:
        """Where the job stands now.  Raises UnknownJob if its record has expired."""
        status = self._client.store.statuses([self.id], tenant=self.tenant)[0]
        if status is None:
            raise self._client.unknown(self)
        return status

    def result(self, *, timeout_s: float | None = None) -> Result:
        """Wait for the result.  Raises JobFailed (JobCancelled, JobExpired), UnknownJob, or TimeoutError."""
        if self.end is None:
            for _ in self._client.as_completed([self], timeout_s=timeout_s):
                pass
        return self.known_result()

    def stream(self, *, after: int = 0, timeout_s: float | None = None) -> Iterator[Chunk]:
        """Chunks from token `after` on, as they are accepted, until the job ends; then raises as `result` does unless
        it succeeded.  A crash of the leader or a restart of Redis only makes it wait."""
        return self._client.stream(self, after=after, timeout_s=timeout_s)

    def cancel(self) -> State:
        """Ask for cancellation; the state after that.  A running job ends within a lease renewal."""
        state = self._client.store.cancel([self.id], tenant=self.tenant)[0]
        if state is None:
            raise self._client.unknown(self)
        return state


class Client(Caller[Store]):
    """Talks to one store.  Threads may share it.

    `where` is a Redis URL, a store (MemoryStore in tests), or None for the environment (HORTATOR_REDIS_URL ...).
    `tenant` owns the jobs that name none.  Waiting calls bear with an unavailable store for `patience_s`,
    and tell `on_outage` once, as soon as each finds that it is away (and again if it comes back and goes away again);
    what that raises ends the wait.
    """

    def __init__(
        self,
        where: str | Store | None = None,
        *,
        namespace: str | None = None,
        tenant: str = "default",
        require_known_model: bool | None = None,
        timeout_s: float | None = None,
        patience_s: float = 30.0,
        on_outage: OnOutage | None = None,
    ) -> None:
        if where is None or isinstance(where, str):
            where = RedisStore.from_settings(settings_for(where, namespace, require_known_model, timeout_s))
        super().__init__(
            arguments.store(where, for_asyncio=False), tenant=tenant, patience_s=patience_s, on_outage=on_outage
        )

    @classmethod
    def from_settings(
        cls,
        settings: StoreSettings,
        *,
        tenant: str = "default",
        patience_s: float = 30.0,
        on_outage: OnOutage | None = None,
    ) -> Self:
        """A client of the store that the settings describe."""
        store = RedisStore.from_settings(settings)
        return cls(store, tenant=tenant, patience_s=patience_s, on_outage=on_outage)

    def __enter__(self) -> Self:
        self._check()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections.  Every later call raises ClientUnusable."""
        self._closed = True
        if isinstance(self._store, RedisStore):
            self._store.close()

    def enqueue(self, prompt: str | None = None, *, model: str, **fields: Unpack[JobFields]) -> JobHandle:
        """Accept one job: exactly one of prompt, messages, token_ids; and, as you like, sampling, priority, deadline_s,
        idempotency_key, tenant, metadata.

        Raises BadRequest, UnknownModel, QueueFull, IdempotencyConflict, StoreUnavailable.
        """
        job = new_job(prompt, model=model, tenant=self.tenant, fields=fields)
        return self.enqueue_many([job])[0]

    def enqueue_many(self, jobs: Iterable[Job]) -> list[JobHandle]:
        """Accept many jobs, one round trip per few hundred.

        Raises as `enqueue` does, and IterableFailed; the error's `accepted` are the handles of the first jobs, which
        are in already, its `index` is the place of the one that was refused."""
        store = self.store
        batches = Batches(jobs, self._accepted)
        for some in batches:
            with batches.accepting(some) as receipts:
                receipts.extend(store.enqueue(some))
        return batches.handles

    def job(self, job_id: str, *, tenant: str | None = None) -> JobHandle:
        """A handle on a job that was enqueued earlier or elsewhere; nothing is asked yet."""
        self._check()
        tenant = self.tenant if tenant is None else arguments.tenant(tenant)
        return JobHandle(self, arguments.text("job_id", job_id), tenant=tenant)

    def statuses(self, job_ids: Iterable[str]) -> list[Status | None]:
        """One call for many; None where there is no such job of this tenant."""
        return self.store.statuses(arguments.job_ids(job_ids), tenant=self.tenant)

    def results(self, job_ids: Iterable[str]) -> list[Result | HortatorError | None]:
        """One call for many, without waiting: a result, the error that stands in its place, or None while not done."""
        ids = arguments.job_ids(job_ids)
        return [
            self.unknown(self.job(job_id)) if status is None else outcome_of(status)
            for job_id, status in zip(ids, self.statuses(ids), strict=True)
        ]

    def queues(self) -> list[QueueInfo]:
        """Depth, age, running jobs and groups of every known model."""
        return self.store.queues()

    def as_completed(self, handles: Iterable[JobHandle], *, timeout_s: float | None = None) -> Iterator[JobHandle]:
        """Each handle once, as its job ends (however it ends): `result()` of it does not wait.  All are watched by one
        call at a time, and several handles on one job are all given.  Raises TimeoutError when the time is up."""
        waiting = Awaited(handles, JobHandle)
        pace, patience = Pace(timeout_s), self._patience()
        while waiting:
            pace.asking()
            ends: dict[Key, End] = {}
            try:
                ends = self._ends(waiting.ids())
                patience.good()
            except StoreUnavailable as error:
                patience.bear(error)
            yield from waiting.end(ends)
            if waiting:
                self._wait(pace, patience, news=len(ends), jobs=len(waiting), waiting_for=waiting)

    def stream(self, handle: JobHandle, *, after: int, timeout_s: float | None) -> Iterator[Chunk]:
        """What JobHandle.stream says."""
        reader = Follower(handle.id, after)
        pace, patience = Pace(timeout_s), self._patience()
        while True:
            pace.asking()
            status, chunks = None, []
            try:
                status = handle.status()  # before the chunks: what is terminal now has its whole journal already
                chunks = self.store.chunks(handle.id, after=reader.after) if reader.behind(status) else []
                patience.good()
            except StoreUnavailable as error:
                patience.bear(error)
                status = None
            yield from reader.take(chunks)
            if status is not None and status.state.terminal:
                yield from reader.rest(result_of(status))
                return
            self._wait(pace, patience, news=len(chunks), waiting_for=f"job {handle.id}")

    def _accepted(self, job: Job, receipt: Receipt) -> JobHandle:
        return JobHandle(self, receipt.job_id, tenant=job.tenant, duplicate=receipt.duplicate)

    def unknown(self, handle: JobHandle) -> UnknownJob:
        """UnknownJob, telling gone from never issued."""
        return unknown(handle.id, gone=self.store.issued(handle.id, tenant=handle.tenant))

    def _ends(self, ids: Mapping[str, Sequence[str]]) -> dict[Key, End]:
        """How jobs ended, of those that have; asked by tenant."""
        ends: dict[Key, End] = {}
        for tenant, some in ids.items():
            if ended := self.store.ended(some, tenant=tenant):
                statuses = self.store.statuses(ended, tenant=tenant)
                for job_id, status in zip(ended, statuses, strict=True):
                    ends[tenant, job_id] = status or self.unknown(self.job(job_id, tenant=tenant))
        return ends

    @staticmethod
    def _wait(pace: Pace, patience: Patience, *, news: int, jobs: int = 1, waiting_for: object) -> None:
        delay = pace.delay(news=news, jobs=jobs)
        if delay is None:
            raise patience.too_late(waiting_for)
        time.sleep(delay)

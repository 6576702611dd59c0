"""The asyncio client: `client.Client` with the same names, as coroutines."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Protocol, Self, Unpack

from . import arguments
from .awaited import Awaited, End, Handle, Key
from .batches import Batches
from .caller import Caller, OnOutage, settings_for
from .errors import ClientUnusable, HortatorError, StoreUnavailable, UnknownJob
from .job import Follower, JobFields, Pace, Patience, new_job, outcome_of, result_of, unknown
from .redis_store import AsyncRedisStore
from .schema import Chunk, Job, Result, State, Status
from .settings import StoreSettings
from .store import QueueInfo, Receipt


class AsyncProducerStore(Protocol):
    """What the client needs of a store: the producers' calls of `store.Store` as coroutines."""

    async def enqueue(self, jobs: Sequence[Job], *, job_ids: Sequence[str] | None = None) -> list[Receipt]: ...

    async def cancel(self, job_ids: Sequence[str], *, tenant: str | None = None) -> list[State | None]: ...

    async def statuses(self, job_ids: Sequence[str], *, tenant: str | None = None) -> list[Status | None]: ...

    async def ended(self, job_ids: Sequence[str], *, tenant: str | None = None) -> list[str]: ...

    async def issued(self, job_id: str, *, tenant: str) -> bool: ...

    async def chunks(self, job_id: str, *, after: int = 0) -> list[Chunk]: ...

    async def queues(self) -> list[QueueInfo]: ...


class AsyncJobHandle(Handle):
    """One accepted job.  `duplicate`: the idempotency key was known, and this is the job that has it."""

    def __init__(self, client: "AsyncClient", job_id: str, *, tenant: str, duplicate: bool = False) -> None:
        super().__init__(job_id, tenant=tenant, duplicate=duplicate)
        self._client = client

    async def status(self) -> Status:
        """Where the job stands now.  Raises UnknownJob if its record has expired."""
        status = (await self._client.store.statuses([self.id], tenant=self.tenant))[0]
        if status is None:
            raise await self._client.unknown(self)
        return status

    async def result(self, *, timeout_s: float | None = None) -> Result:
        """Wait for the result.  Raises JobFailed (JobCancelled, JobExpired), UnknownJob, or TimeoutError."""
        if self.end is None:
            async for _ in self._client.as_completed([self], timeout_s=timeout_s):
                pass
        return self.known_result()

    def stream(self, *, after: int = 0, timeout_s: float | None = None) -> AsyncIterator[Chunk]:
        """Chunks from token `after` on, as they are accepted, until the job ends; then raises as `result` does unless
        it succeeded.  A crash of the leader or a restart of Redis only makes it wait."""
        return self._client.stream(self, after=after, timeout_s=timeout_s)

    async def cancel(self) -> State:
        """Ask for cancellation; the state after that.  A running job ends within a lease renewal."""
        state = (await self._client.store.cancel([self.id], tenant=self.tenant))[0]
        if state is None:
            raise await self._client.unknown(self)
        return state


class AsyncClient(Caller[AsyncProducerStore]):
    """Talks to one store, in one event loop.

    `where` is a Redis URL, a store (AsyncMemoryStore in tests), or None for the environment (HORTATOR_REDIS_URL ...).
    `tenant` owns the jobs that name none.  Waiting calls bear with an unavailable store for `patience_s`,
    and tell `on_outage` once, as soon as each finds that it is away (and again if it comes back and goes away again);
    what that raises ends the wait.
    """

    def __init__(
        self,
        where: str | AsyncProducerStore | None = None,
        *,
        namespace: str | None = None,
        tenant: str = "default",
        require_known_model: bool | None = None,
        timeout_s: float | None = None,
        patience_s: float = 30.0,
        on_outage: OnOutage | None = None,
    ) -> None:
        if where is None or isinstance(where, str):
            where = AsyncRedisStore.from_settings(settings_for(where, namespace, require_known_model, timeout_s))
        super().__init__(
            arguments.store(where, for_asyncio=True), tenant=tenant, patience_s=patience_s, on_outage=on_outage
        )
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def store(self) -> AsyncProducerStore:
        """What answers the calls.  Raises ClientUnusable once the client is closed, and in another event loop than the
        one in which its connections are."""
        store = super().store
        self._stay_in_loop()
        return store

    def _stay_in_loop(self) -> None:
        loop = asyncio.get_running_loop() if isinstance(self._store, AsyncRedisStore) else None
        self._loop = self._loop or loop
        if self._loop is not loop:
            raise ClientUnusable(
                "this AsyncClient was used in another event loop, and asyncio.run makes a new one each time:"
                " make, use and close an AsyncClient in one"
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
        store = AsyncRedisStore.from_settings(settings)
        return cls(store, tenant=tenant, patience_s=patience_s, on_outage=on_outage)

    async def __aenter__(self) -> Self:
        self._check()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections.  Every later call raises ClientUnusable."""
        if not self._closed:
            self._stay_in_loop()
        self._closed = True
        if isinstance(self._store, AsyncRedisStore):
            await self._store.aclose()

    async def enqueue(self, prompt: str | None = None, *, model: str, **fields: Unpack[JobFields]) -> AsyncJobHandle:
        """Accept one job: exactly one of prompt, messages, token_ids; and, as you like, sampling, priority, deadline_s,
        idempotency_key, tenant, metadata.

        Raises BadRequest, UnknownModel, QueueFull, IdempotencyConflict, StoreUnavailable.
        """
        job = new_job(prompt, model=model, tenant=self.tenant, fields=fields)
        return (await self.enqueue_many([job]))[0]

    async def enqueue_many(self, jobs: Iterable[Job]) -> list[AsyncJobHandle]:
        """Accept many jobs, one round trip per few hundred.

        Raises as `enqueue` does, and IterableFailed; the error's `accepted` are the handles of the first jobs, which
        are in already, its `index` is the place of the one that was refused."""
        store = self.store
        batches = Batches(jobs, self._accepted)
        for some in batches:
            with batches.accepting(some) as receipts:
                receipts.extend(await store.enqueue(some))
        return batches.handles

    def job(self, job_id: str, *, tenant: str | None = None) -> AsyncJobHandle:
        """A handle on a job that was enqueued earlier or elsewhere; nothing is asked yet."""
        self._check()
        tenant = self.tenant if tenant is None else arguments.tenant(tenant)
        return AsyncJobHandle(self, arguments.text("job_id", job_id), tenant=tenant)

    async def statuses(self, job_ids: Iterable[str]) -> list[Status | None]:
        """One call for many; None where there is no such job of this tenant."""
        return await self.store.statuses(arguments.job_ids(job_ids), tenant=self.tenant)

    async def results(self, job_ids: Iterable[str]) -> list[Result | HortatorError | None]:
        """One call for many, without waiting: a result, the error that stands in its place, or None while not done."""
        ids = arguments.job_ids(job_ids)
        return [
            await self.unknown(self.job(job_id)) if status is None else outcome_of(status)
            for job_id, status in zip(ids, await self.statuses(ids), strict=True)
        ]

    async def queues(self) -> list[QueueInfo]:
        """Depth, age, running jobs and groups of every known model."""
        return await self.store.queues()

    async def as_completed(
        self, handles: Iterable[AsyncJobHandle], *, timeout_s: float | None = None
    ) -> AsyncIterator[AsyncJobHandle]:
        """Each handle once, as its job ends (however it ends): `result()` of it does not wait.  All are watched by one
        call at a time, and several handles on one job are all given.  Raises TimeoutError when the time is up."""
        waiting = Awaited(handles, AsyncJobHandle)
        pace, patience = Pace(timeout_s), self._patience()
        while waiting:
            pace.asking()
            ends: dict[Key, End] = {}
            try:
                ends = await self._ends(waiting.ids())
                patience.good()
            except StoreUnavailable as error:
                patience.bear(error)
            for handle in waiting.end(ends):
                yield handle
            if waiting:
                await self._wait(pace, patience, news=len(ends), jobs=len(waiting), waiting_for=waiting)

    async def stream(self, handle: AsyncJobHandle, *, after: int, timeout_s: float | None) -> AsyncIterator[Chunk]:
        """What AsyncJobHandle.stream says."""
        reader = Follower(handle.id, after)
        pace, patience = Pace(timeout_s), self._patience()
        while True:
            pace.asking()
            status, chunks = None, []
            try:
                status = await handle.status()  # before the chunks: what is terminal now has its whole journal already
                chunks = await self.store.chunks(handle.id, after=reader.after) if reader.behind(status) else []
                patience.good()
            except StoreUnavailable as error:
                patience.bear(error)
                status = None
            for chunk in reader.take(chunks):
                yield chunk
            if status is not None and status.state.terminal:
                for chunk in reader.rest(result_of(status)):
                    yield chunk
                return
            await self._wait(pace, patience, news=len(chunks), waiting_for=f"job {handle.id}")

    def _accepted(self, job: Job, receipt: Receipt) -> AsyncJobHandle:
        return AsyncJobHandle(self, receipt.job_id, tenant=job.tenant, duplicate=receipt.duplicate)

    async def unknown(self, handle: AsyncJobHandle) -> UnknownJob:
        """UnknownJob, telling gone from never issued."""
        return unknown(handle.id, gone=await self.store.issued(handle.id, tenant=handle.tenant))

    async def _ends(self, ids: Mapping[str, Sequence[str]]) -> dict[Key, End]:
        """How jobs ended, of those that have; asked by tenant."""
        ends: dict[Key, End] = {}
        for tenant, some in ids.items():
            if ended := await self.store.ended(some, tenant=tenant):
                statuses = await self.store.statuses(ended, tenant=tenant)
                for job_id, status in zip(ended, statuses, strict=True):
                    ends[tenant, job_id] = status or await self.unknown(self.job(job_id, tenant=tenant))
        return ends

    @staticmethod
    async def _wait(pace: Pace, patience: Patience, *, news: int, jobs: int = 1, waiting_for: object) -> None:
        delay = pace.delay(news=news, jobs=jobs)
        if delay is None:
            raise patience.too_late(waiting_for)
        await asyncio.sleep(delay)

"""The store on Redis: one Lua call for each method (a few for very long lists), blocking or with asyncio."""

import contextlib
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Self, TypeVar

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError
from redis.retry import Retry

from .calls import Calls
from .errors import ConfigError
from .ids import Mint, new_secret
from .names import Names
from .redis_url import checked_redis_url, is_unix
from .refused import naming_jobs
from .rules import Rules
from .schema import Chunk, Job, State, Status
from .script import Call, script
from .server import refuse_unsuitable, translate
from .settings import CONNECT_TIMEOUT_S, TIMEOUT_S, StoreSettings
from .store import (
    Append,
    Claim,
    DeadLetter,
    GroupBeat,
    Holder,
    Lease,
    Outcome,
    QueueInfo,
    Receipt,
    ReleaseReason,
    Signals,
    SweepReport,
    Verdict,
)

T = TypeVar("T")

HEALTH_CHECK_S = 15  # a connection idle for longer is asked before it is used: it may be half-open


class RedisStore:
    """`store.Store` on one Redis.  Threads may share it.

    `timeout_s` is the longest wait for one answer: short for producers, which would rather hear StoreUnavailable;
    leaders should give some seconds.  A call that a broken connection swallowed is sent once more: every script
    recognises a repetition.
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: str = "",
        rules: Rules | None = None,
        timeout_s: float = TIMEOUT_S,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        self.rules = rules or Rules()
        self.names = Names(namespace)
        self._calls = Calls(self.names, self.rules)
        self._mint: Mint | None = None
        self._mint_lock = threading.Lock()
        retry = Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,))
        self._redis = redis.Redis.from_url(
            _readable(url), retry=retry, **_connection(url, timeout_s, connect_timeout_s)
        )
        self._where = _where(self._redis)

    @classmethod
    def from_settings(cls, settings: StoreSettings) -> Self:
        return cls(
            settings.redis_url,
            namespace=settings.namespace,
            rules=settings.rules(),
            timeout_s=settings.timeout_s,
            connect_timeout_s=settings.connect_timeout_s,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._redis.close()

    def enqueue(self, jobs: Sequence[Job], *, job_ids: Sequence[str] | None = None) -> list[Receipt]:
        ids = self._new_ids(jobs) if job_ids is None else job_ids
        receipts: list[Receipt] = []
        with naming_jobs(receipts, ids, minted=job_ids is None):
            for call in self._calls.enqueue(jobs, ids):
                accepted = self._run(call)
                receipts += accepted
        return receipts

    def cancel(self, job_ids: Sequence[str], *, tenant: str | None = None) -> list[State | None]:
        return [state for call in self._calls.cancel(job_ids, tenant) for state in self._run(call)]

    def statuses(self, job_ids: Sequence[str], *, tenant: str | None = None) -> list[Status | None]:
        return [status for call in self._calls.statuses(job_ids, tenant) for status in self._run(call)]

    def ended(self, job_ids: Sequence[str], *, tenant: str | None = None) -> list[str]:
        return [job_id for call in self._calls.ended(job_ids, tenant) for job_id in self._run(call)]

    def issued(self, job_id: str, *, tenant: str) -> bool:
        return self._minted().issued(job_id, tenant)

    def chunks(self, job_id: str, *, after: int = 0) -> list[Chunk]:
        return self._run(self._calls.chunks(job_id, after))

    def claim(self, model: str, *, owner: str, limit: int, lease_s: float, idle: bool, surplus: int = 0) -> Claim:
        return self._run(self._calls.claim(model, owner, limit, lease_s, idle, surplus=surplus))

    def append(self, appends: Sequence[Append]) -> Signals:
        return self._run(self._calls.append(appends)) if appends else Signals()

    def renew(self, leases: Sequence[Lease], *, owner: str, lease_s: float) -> Signals:
        return self._run(self._calls.renew(leases, lease_s)) if leases else Signals()

    def commit(self, outcomes: Sequence[Outcome]) -> list[Verdict]:
        return self._run(self._calls.commit(outcomes)) if outcomes else []

    def release(self, leases: Sequence[Lease], *, reason: ReleaseReason) -> None:
        if leases:
            self._run(self._calls.release(leases, reason))

    def clear(self, lease: Lease) -> None:
        self._run(self._calls.clear(lease))

    def beat(self, beat: GroupBeat) -> None:
        self._run(self._calls.beat(beat))

    def hold(self, holder: Holder, *, replacing: str = "") -> Holder | None:
        return self._run(self._calls.hold(holder, replacing))

    def let_go(self, holder: Holder) -> None:
        self._run(self._calls.hold(holder, "", leave=True))

    def sweep(self, *, limit: int = 1000, expired_before_ms: int | None = None) -> SweepReport:
        return self._run(self._calls.sweep(limit, expired_before_ms))

    def queues(self) -> list[QueueInfo]:
        return self._run(self._calls.queues())

    def bury(self, model: str, message: bytes, *, reason: str, job_id: str | None = None) -> str:
        return self._run(self._calls.bury(model, message, reason, job_id))

    def dead_letters(self, *, limit: int = 100, before: str | None = None) -> list[DeadLetter]:
        return self._run(self._calls.dead_letters(limit, before))

    def count_dead_letters(self) -> int:
        return self._run(self._calls.count_dead_letters())

    def dead_letter(self, letter_id: str) -> DeadLetter | None:
        return self._run(self._calls.dead_letter(letter_id))

    def replay(self, letter_ids: Sequence[str]) -> list[str]:
        return self._run(self._calls.replay(letter_ids)) if letter_ids else []

    def check(self, *, for_submits: bool = False) -> None:
        with self._translated():
            info = self._redis.info()
        refuse_unsuitable(info)
        if for_submits:
            self._run(self._calls.ready())

    def _run(self, call: Call[T]) -> T:
        lua = script(call.script)
        with self._translated():
            try:
                reply = self._redis.execute_command("EVALSHA", lua.sha, 0, *call.args)  # type: ignore[no-untyped-call]
            except NoScriptError:
                reply = self._redis.execute_command("EVAL", lua.text, 0, *call.args)  # type: ignore[no-untyped-call]
        return call.parse(reply)

    def _new_ids(self, jobs: Sequence[Job]) -> list[str]:
        mint = self._minted()
        return [mint.issue(job.tenant) for job in jobs]

    def _minted(self) -> Mint:
        with self._mint_lock:
            if self._mint is None:
                self._mint = Mint(self._run(self._calls.secret(new_secret())))
            return self._mint

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (RedisError, OSError) as error:
            raise translate(error, self._where) from error


class AsyncRedisStore:
    """What producers and the API call of `RedisStore`, as coroutines.  It belongs to one event loop."""

    def __init__(
        self,
        url: str,
        *,
        namespace: str = "",
        rules: Rules | None = None,
        timeout_s: float = TIMEOUT_S,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        self.rules = rules or Rules()
        self.names = Names(namespace)
        self._calls = Calls(self.names, self.rules)
        self._mint: Mint | None = None
        retry = AsyncRetry(NoBackoff(), 1, supported_errors=(RedisConnectionError,))
        self._redis = redis.asyncio.Redis.from_url(
            _readable(url), retry=retry, **_connection(url, timeout_s, connect_timeout_s)
        )
        self._where = _where(self._redis)

    @classmethod
    def from_settings(cls, settings: StoreSettings) -> Self:
        return cls(
            settings.redis_url,
            namespace=settings.namespace,
            rules=settings.rules(),
            timeout_s=settings.timeout_s,
            connect_timeout_s=settings.connect_timeout_s,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._redis.aclose()

    async def enqueue(self, jobs: Sequence[Job], *, job_ids: Sequence[str] | None = None) -> list[Receipt]:
        ids = await self._new_ids(jobs) if job_ids is None else job_ids
        receipts: list[Receipt] = []
        with naming_jobs(receipts, ids, minted=job_ids is None):
            for call in self._calls.enqueue(jobs, ids):
                accepted = await self._run(call)
                receipts += accepted
        return receipts

    async def cancel(self, job_ids: Sequence[str], *, tenant: str | None = None) -> list[State | None]:
        return [state for call in self._calls.cancel(job_ids, tenant) for state in await self._run(call)]

    async def statuses(self, job_ids: Sequence[str], *, tenant: str | None = None) -> list[Status | None]:
        return [status for call in self._calls.statuses(job_ids, tenant) for status in await self._run(call)]

    async def ended(self, job_ids: Sequence[str], *, tenant: str | None = None) -> list[str]:
        return [job_id for call in self._calls.ended(job_ids, tenant) for job_id in await self._run(call)]

    async def issued(self, job_id: str, *, tenant: str) -> bool:
        return (await self._minted()).issued(job_id, tenant)

    async def chunks(self, job_id: str, *, after: int = 0) -> list[Chunk]:
        return await self._run(self._calls.chunks(job_id, after))

    async def sweep(self, *, limit: int = 1000, expired_before_ms: int | None = None) -> SweepReport:
        return await self._run(self._calls.sweep(limit, expired_before_ms))

    async def queues(self) -> list[QueueInfo]:
        return await self._run(self._calls.queues())

    async def dead_letters(self, *, limit: int = 100, before: str | None = None) -> list[DeadLetter]:
        return await self._run(self._calls.dead_letters(limit, before))

    async def count_dead_letters(self) -> int:
        return await self._run(self._calls.count_dead_letters())

    async def check(self, *, for_submits: bool = False) -> None:
        async with self._translated():
            info = await self._redis.info()
        refuse_unsuitable(info)
        if for_submits:
            await self._run(self._calls.ready())

    async def _run(self, call: Call[T]) -> T:
        lua = script(call.script)
        async with self._translated():
            try:
                reply = await self._redis.execute_command("EVALSHA", lua.sha, 0, *call.args)  # type: ignore[no-untyped-call]
            except NoScriptError:
                reply = await self._redis.execute_command("EVAL", lua.text, 0, *call.args)  # type: ignore[no-untyped-call]
        return call.parse(reply)

    async def _new_ids(self, jobs: Sequence[Job]) -> list[str]:
        mint = await self._minted()
        return [mint.issue(job.tenant) for job in jobs]

    async def _minted(self) -> Mint:
        if self._mint is None:
            self._mint = Mint(await self._run(self._calls.secret(new_secret())))
        return self._mint

    @contextlib.asynccontextmanager
    async def _translated(self) -> AsyncIterator[None]:
        try:
            yield
        except (RedisError, OSError) as error:
            raise translate(error, self._where) from error


def _connection(url: str, timeout_s: float, connect_timeout_s: float) -> dict[str, Any]:
    keepalive = {} if is_unix(url) else {"socket_keepalive": True}
    return keepalive | {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": connect_timeout_s,
        "health_check_interval": HEALTH_CHECK_S,
    }


def _where(client: "redis.Redis | redis.asyncio.Redis") -> str:
    """Host and port for messages: the URL itself may hold a password."""
    options = client.get_connection_kwargs()
    return str(options.get("path") or f"{options.get('host', 'localhost')}:{options.get('port', 6379)}")


def _readable(url: str) -> str:
    try:
        return checked_redis_url(url)
    except ValueError as error:
        raise ConfigError(str(error)) from None

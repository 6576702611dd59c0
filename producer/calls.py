"""Every call to Redis as a value: which script, which arguments, how to read the reply.  No I/O is done here, so that
the blocking store and the asyncio one are the same store.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

import redis.exceptions as broken
from pydantic import ValidationError

from . import journal, message
from .errors import (
    BadRequest,
    HortatorError,
    IdempotencyConflict,
    QueueFull,
    StoreForbidden,
    StoreUnavailable,
    StoreUnsuitable,
    UnknownJob,
    UnknownModel,
)
from .names import STEP_OF, Names
from .rules import ROOM_COUNTS_S, Rules
from .schema import SCHEMA_VERSION, Chunk, Failure, Job, Result, State, Status, Timings
from .store import (
    Append,
    Claim,
    Claimed,
    ClaimMode,
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

MAX_JOBS_PER_CALL = 250
MAX_BYTES_PER_CALL = 2**20
MAX_IDS_PER_CALL = 500
MAX_CLAIM = 1000  # a script's reply is unpacked on a stack of 8000


class Script:
    """One Lua file behind the part that all share."""

    def __init__(self, name: str) -> None:
        folder = Path(__file__).parent
        self.text = (folder / "record.lua").read_bytes() + b"\n" + (folder / f"{name}.lua").read_bytes()
        self.sha = hashlib.sha1(self.text, usedforsecurity=False).hexdigest()


script = functools.cache(Script)


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One round trip."""

    script: str
    args: Sequence[Any]
    parse: Callable[[Any], T]


class Calls:
    """Builds the calls of one namespace under one set of rules."""

    def __init__(self, names: Names, rules: Rules) -> None:
        self.names = names
        self.rules = rules
        self._instance = os.urandom(4).hex()  # a restarted leader of the same name must not get its old reply again
        self._seen: dict[str, str] = {}  # owner -> token of the last claim reply that arrived

    def secret(self, new: bytes) -> Call[bytes]:
        return self._call("secret", [new], bytes)

    # producers

    def enqueue(self, jobs: Sequence[Job], job_ids: Sequence[str]) -> Iterator[Call[list[Receipt]]]:
        """Calls of a few hundred jobs or about a megabyte each, in order."""
        jobs_here: list[Job] = []
        ids_here: list[str] = []
        args: list[Any] = []
        size = 0
        for job, job_id in zip(jobs, job_ids, strict=True):
            one = self._enqueue_args(job, job_id)
            if jobs_here and (len(jobs_here) == MAX_JOBS_PER_CALL or size + len(one[4]) > MAX_BYTES_PER_CALL):
                yield self._enqueue(jobs_here, ids_here, args)
                jobs_here, ids_here, args, size = [], [], [], 0
            jobs_here.append(job)
            ids_here.append(job_id)
            args += one
            size += len(one[4])
        if jobs_here:
            yield self._enqueue(jobs_here, ids_here, args)

    def _enqueue_args(self, job: Job, job_id: str) -> list[Any]:
        body = message.checked(job, job_id, max_bytes=self.rules.max_message_bytes)
        key = job.idempotency_key
        return [
            job_id,
            job.model,
            job.tenant,
            STEP_OF[job.priority],
            body,
            "" if job.deadline_s is None else job.deadline_s,
            json.dumps(job.metadata, separators=(",", ":")) if job.metadata else "",
            "" if key is None else self.names.idempotency(job.tenant, key),
            "" if key is None else message.digest(job),
            job.sampling.n,
        ]

    def _enqueue(self, jobs: list[Job], job_ids: list[str], args: list[Any]) -> Call[list[Receipt]]:
        rules = self.rules
        header = [
            int(rules.require_known_model),
            rules.max_queued_per_model,
            rules.max_queued_per_tenant,
            rules.memory_headroom,
            _ms(rules.idempotency_ttl_s),
        ]
        return self._call("enqueue", header + args, functools.partial(_receipts, jobs, job_ids))

    def cancel(self, job_ids: Sequence[str], tenant: str | None) -> Iterator[Call[list[State | None]]]:
        return self._by_ids("cancel", job_ids, tenant, lambda _, state: State(state.decode()))

    def statuses(self, job_ids: Sequence[str], tenant: str | None) -> Iterator[Call[list[Status | None]]]:
        return self._by_ids("statuses", job_ids, tenant, _status)

    def ended(self, job_ids: Sequence[str], tenant: str | None) -> Iterator[Call[list[str]]]:
        return self._by_some("ended", job_ids, tenant, lambda ids, reply: [ids[place] for place in reply])

    def _by_ids(
        self, name: str, job_ids: Sequence[str], tenant: str | None, one: Callable[[str, Any], T]
    ) -> Iterator[Call[list[T | None]]]:
        return self._by_some(name, job_ids, tenant, lambda ids, reply: _each(ids, one, reply))

    def _by_some(
        self, name: str, job_ids: Sequence[str], tenant: str | None, read: Callable[[Sequence[str], Any], T]
    ) -> Iterator[Call[T]]:
        """Calls of a few hundred ids.  Something that is no id at all is asked as '' and found nowhere."""
        for start in range(0, len(job_ids), MAX_IDS_PER_CALL):
            some = job_ids[start : start + MAX_IDS_PER_CALL]
            ids = [job_id if message.is_job_id(job_id) else "" for job_id in some]
            yield self._call(name, [tenant or "", *ids], functools.partial(read, some))

    def chunks(self, job_id: str, after: int) -> Call[list[Chunk]]:
        job_id = job_id if message.is_job_id(job_id) else ""
        return self._call(
            "chunks",
            [job_id, max(after, 0)],
            lambda reply: journal.from_token(map(journal.decode_chunk, reply), after),
        )

    # leaders

    def claim(self, model: str, owner: str, limit: int, lease_s: float, idle: bool, *, surplus: int = 0) -> Call[Claim]:
        owner = f"{owner}#{self._instance}".replace(" ", "_")
        args = [
            model,
            owner,
            os.urandom(6).hex(),
            self._seen.get(owner, "-"),
            min(limit, MAX_CLAIM),
            _ms(lease_s),
            int(idle),
            SCHEMA_VERSION,
            surplus,
            _ms(ROOM_COUNTS_S),
        ]
        return self._call("claim", args, functools.partial(self._claimed, owner))

    def _claimed(self, owner: str, reply: list[Any]) -> Claim:
        mode, full, now, token, *jobs = reply
        claim = Claim(ClaimMode(mode.decode()), tuple(map(_claimed, jobs)), int(now), bool(full))
        if jobs:
            self._seen[owner] = token.decode()
        return claim

    def append(self, appends: Sequence[Append]) -> Call[Signals]:
        args: list[Any] = []
        for a in appends:
            after = a.chunk.index + len(a.chunk.token_ids)
            args += (a.lease.job_id, a.lease.attempt, a.chunk.index, after, journal.encode_chunk(a.chunk))
        return self._call("append", args, _signals)

    def renew(self, leases: Sequence[Lease], lease_s: float) -> Call[Signals]:
        return self._call("renew", [_ms(lease_s), *_flat(leases)], _signals)

    def commit(self, outcomes: Sequence[Outcome]) -> Call[list[Verdict]]:
        args = [part for outcome in outcomes for part in _outcome_args(outcome)]
        return self._call("commit", args, lambda reply: [Verdict.COMMITTED if one else Verdict.FENCED for one in reply])

    def release(self, leases: Sequence[Lease], reason: ReleaseReason) -> Call[None]:
        return self._call("release", [reason.value, *_flat(leases)], _nothing)

    def clear(self, lease: Lease) -> Call[None]:
        return self._call("clear", _flat([lease]), _nothing)

    def beat(self, beat: GroupBeat) -> Call[None]:
        said = {name: getattr(beat, name) for name in GroupBeat.__slots__}
        text = json.dumps(said, separators=(",", ":"))
        return self._call("beat", [beat.group, beat.model, text, beat.state, beat.room, _ms(ROOM_COUNTS_S)], _nothing)

    def hold(self, holder: Holder, replacing: str, *, leave: bool = False) -> Call[Holder | None]:
        text = json.dumps(asdict(holder), separators=(",", ":"))
        args = [holder.group, holder.life, text, _ms(self.rules.beat_ttl_s), replacing, int(leave)]
        return self._call("hold", args, _holder)

    # anybody

    def sweep(self, limit: int, expired_before_ms: int | None) -> Call[SweepReport]:
        before = "" if expired_before_ms is None else expired_before_ms
        return self._call("sweep", [limit, before, _ms(self.rules.conviction_grace_s)], _sweep_report)

    def ready(self) -> Call[None]:
        return self._call("ready", [self.rules.memory_headroom], _refuse_no_room)

    def queues(self) -> Call[list[QueueInfo]]:
        return self._call("queues", [_ms(self.rules.beat_ttl_s)], _queues)

    def bury(self, model: str, raw: bytes, reason: str, job_id: str | None) -> Call[str]:
        return self._call("bury", [model, job_id or "", reason, raw], lambda reply: str(reply.decode()))

    def dead_letters(self, limit: int, before: str | None) -> Call[list[DeadLetter]]:
        return self._call("letters", [max(limit, 1), before or ""], lambda reply: [_letter(one) for one in reply])

    def count_dead_letters(self) -> Call[int]:
        return self._call("count_letters", [], int)

    def dead_letter(self, letter_id: str) -> Call[DeadLetter | None]:
        return self._call("letter", [letter_id], lambda reply: _letter(reply[0]) if reply else None)

    def replay(self, letter_ids: Sequence[str]) -> Call[list[str]]:
        return self._call("replay", list(letter_ids), _replayed)

    def _call(self, name: str, args: Sequence[Any], parse: Callable[[Any], T]) -> Call[T]:
        rules = self.rules
        shared = [
            self.names.namespace,
            _ms(rules.result_ttl_s),
            _ms(rules.journal_ttl_s),
            datetime.now(UTC).isoformat(),
            rules.max_attempts,
            _ms(rules.deadline_grace_s),
            rules.max_letters,
            _ms(rules.default_deadline_s),
            rules.max_letters_bytes,
            rules.max_message_bytes,
        ]
        return Call(name, [*shared, *args], parse)


@contextlib.contextmanager
def naming_jobs(receipts: list[Receipt], job_ids: Sequence[str], *, minted: bool) -> Iterator[None]:
    """An error on the way through an enqueue carries the receipts of what was accepted before it and the index of the
    refused job.  Its id, if it was minted for this call, goes: nobody will ever find a job under it."""
    try:
        yield
    except HortatorError as error:
        error.accepted = tuple(receipts)
        if error.job_id in job_ids:
            error.index = job_ids.index(error.job_id)
        if minted:
            error.job_id = None
        raise


def refuse_unsuitable(info: dict[str, Any]) -> None:
    """StoreUnsuitable with the reason, unless the server that gave this INFO is safe to queue on."""
    version = str(info.get("redis_version", "0"))
    if tuple(int(part) for part in version.split(".")[:2]) < (6, 2):
        raise StoreUnsuitable(f"Redis {version} is too old: 6.2 or newer is needed")
    if info.get("cluster_enabled"):
        raise StoreUnsuitable("this is a Redis Cluster node: use a single Redis (with replicas, if you like)")
    if info.get("role") != "master":
        raise StoreUnsuitable("this Redis is a replica and takes no writes: give the address of its master")
    policy = info.get("maxmemory_policy")
    if policy != "noeviction":
        raise _evicts(str(policy))


def _evicts(policy: str) -> StoreUnsuitable:
    return StoreUnsuitable(
        f"this Redis evicts keys when it is full (maxmemory-policy {policy}), which loses jobs:"
        " run CONFIG SET maxmemory-policy noeviction, and put it in redis.conf"
    )


# Redis 6.2 wraps what a script met in an error of its own, so the code may stand anywhere
_UNAVAILABLE = re.compile(r"\b(OOM|MISCONF|READONLY|LOADING|BUSY|MASTERDOWN|NOREPLICAS)\b")

_NO_PASSWORD = re.compile(
    r"\bNOAUTH\b|Authentication required|HELLO must be called with the client already authenticated"
)
_PROTECTED = re.compile(r"\bDENIED\b.*protected mode")
_HOW = "write redis://:PASSWORD@HOST:PORT/DB"
_FORBIDDEN = re.compile(r"\b(NOAUTH|WRONGPASS|NOPERM)\b|can't run this command|can't access at least one of the keys")


def translate(error: Exception, where: str) -> HortatorError:
    """What to raise for what redis-py raised.  Whatever a server answers that nobody foresaw is an outage as well: what
    is at that address now, or what somebody did to our keys, may be mended while workers and clients wait."""
    text = str(error)
    if _NO_PASSWORD.search(text):
        return StoreForbidden(f"Redis at {where} wants a password, and the URL has none: {_HOW}", retry_after_s=5)
    if _PROTECTED.search(text):
        return StoreForbidden(
            f"Redis at {where} is in protected mode: without a password it takes nobody from another machine;"
            f" give it one (requirepass in its configuration) and {_HOW}",
            retry_after_s=5,
        )
    if isinstance(error, broken.AuthenticationError | broken.NoPermissionError) or _FORBIDDEN.search(text):
        return StoreForbidden(f"Redis at {where} refuses our credentials: {text[:200]}", retry_after_s=5.0)
    if isinstance(error, broken.ConnectionError | broken.TimeoutError | OSError):
        problem = text.rstrip(".") or type(error).__name__
        return StoreUnavailable(f"Redis at {where} does not answer: {problem}; does it run, and is the URL right?")
    if isinstance(error, broken.OutOfMemoryError | broken.ReadOnlyError) or _UNAVAILABLE.search(text):
        return StoreUnavailable(f"Redis at {where} takes no writes now: {text[:200]}")
    return StoreUnavailable(f"Redis at {where} refused a call: {text[:200] or type(error).__name__}")


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _nothing(_: Any) -> None:
    return None


def _flat(leases: Iterable[Lease]) -> list[Any]:
    return [part for lease in leases for part in (lease.job_id, lease.attempt)]


def _text(raw: bytes | None) -> str:
    return "" if raw is None else raw.decode(errors="replace")


def _int(raw: bytes | int | None) -> int | None:
    """None also for what is no whole number: somebody damaged the record."""
    try:
        return None if raw is None else int(raw)
    except ValueError:
        return None


def _each(ids: Sequence[str], one: Callable[[str, Any], T], reply: list[Any]) -> list[T | None]:
    return [None if row == b"" else one(job_id, row) for job_id, row in zip(ids, reply, strict=True)]


def _receipts(jobs: list[Job], job_ids: list[str], reply: list[Any]) -> list[Receipt]:
    kind, *rest = reply
    if kind == b"ok":
        known = {rest[i]: rest[i + 1].decode() for i in range(0, len(rest), 2)}
        return [Receipt(known.get(i, job_id), i in known) for i, job_id in enumerate(job_ids)]
    _refuse_no_room(reply)
    job, job_id = jobs[rest[0]], job_ids[rest[0]]
    if kind == b"unknown_model":
        raise unknown_model(job.model, [_text(name) for name in rest[1:]], job_id)
    if kind == b"conflict":
        raise idempotency_conflict(job_id)
    if kind == b"taken":
        raise BadRequest("this job id cannot be used: leave ids to hortator", job_id=job_id)
    whose = f"model {job.model!r}" if kind == b"full_model" else f"tenant {job.tenant!r} on model {job.model!r}"
    raise queue_full(whose, rest[1], rest[2] / 1000, job_id)


def _refuse_no_room(reply: list[Any]) -> None:
    kind, *rest = reply
    if kind == b"evicts":
        raise _evicts(_text(rest[0]))
    if kind == b"full_memory":
        raise StoreUnavailable(
            f"Redis is nearly full ({rest[0]} of {rest[1]} bytes): finished results will make room", retry_after_s=5.0
        )


def unknown_model(model: str, known: Iterable[str], job_id: str) -> UnknownModel:
    names = ", ".join(sorted(known)) or "none yet: start a worker first"
    return UnknownModel(
        f"no group serves model {model!r}, nor did lately (one that starts counts once it is ready); "
        f"known models: {names}",
        job_id=job_id,
    )


def idempotency_conflict(job_id: str) -> IdempotencyConflict:
    return IdempotencyConflict("this idempotency key was used with another body: use a new key", job_id=job_id)


def queue_full(whose: str, limit: int, retry_after_s: float, job_id: str) -> QueueFull:
    return QueueFull(
        f"the queue of {whose} is at its limit of {limit} jobs: try again in {retry_after_s:.0f} s",
        retry_after_s=retry_after_s,
        job_id=job_id,
    )


def _claimed(row: list[Any]) -> Claimed:
    job_id, attempt, raw, tenant, enqueued, deadline, chunks = row
    return Claimed(
        Lease(job_id.decode(), int(attempt)),
        raw or b"",
        _text(tenant),
        int(enqueued),
        _int(deadline),
        tuple(map(journal.decode_chunk, chunks)),
    )


def _signals(reply: list[list[bytes]]) -> Signals:
    cancelled, lost = reply
    if not cancelled and not lost:
        return Signals()
    return Signals(frozenset(_text(one) for one in cancelled), frozenset(_text(one) for one in lost))


def _outcome_args(outcome: Outcome) -> tuple[Any, ...]:
    job_id = outcome.lease.job_id
    result, code, text = "", "", ""
    if outcome.state is State.SUCCEEDED:
        if outcome.result is None:
            raise ValueError(f"{job_id}: SUCCEEDED needs a result")
        result = f'{{"id":"{job_id}",{outcome.result.model_dump_json(exclude_none=True)[1:]}'
    elif not outcome.state.terminal:
        raise ValueError(f"{job_id}: {outcome.state} is not terminal")
    else:
        failure = outcome.failure or Failure(code=outcome.state.value, message=outcome.state.value)
        code, text = failure.code, failure.message
    seal = hashlib.blake2b("\0".join((outcome.state, result, code, text)).encode(), digest_size=4).hexdigest()
    return (job_id, outcome.lease.attempt, outcome.state.value, seal, result, code, text, *_rest_args(outcome.rest))


def _rest_args(rest: Chunk | None) -> tuple[Any, ...]:
    if rest is None:
        return ("", "", "")
    return (rest.index, rest.index + len(rest.token_ids), journal.encode_chunk(rest))


def _status(job_id: str, row: list[Any]) -> Status:
    state = State(row[0].decode())
    fields: dict[str, Any] = {
        "id": job_id,
        "model": _text(row[1]),
        "tenant": _text(row[2]),
        "state": state,
        "attempt": (_int(row[3]) or 0) - (_int(row[4]) or 0),
        "num_tokens": _int(row[9]) or 0,
        "timings": Timings(
            enqueued_ms=_int(row[5]), claimed_ms=_int(row[6]), first_token_ms=_int(row[7]), finished_ms=_int(row[8])
        ),
        "metadata": json.loads(row[10]) if row[10] else {},
    }
    if state is State.SUCCEEDED:
        fields["result"], fields["failure"] = _result(row[14] if len(row) > 14 else None)
    elif state.terminal:
        fields["failure"] = Failure(code=_text(row[11]), message=_text(row[12]))
    return Status.model_construct(**fields)


def _result(meta: bytes | None) -> tuple[Result | None, Failure | None]:
    """Celery's key holds the result, and anybody with Celery may delete it (`forget`) or write over it."""
    try:
        return Result.model_validate(json.loads(meta or b"")["result"]), None
    except (ValueError, KeyError, TypeError, ValidationError):
        return None, Failure(code="result_gone", message="the result's Celery key was deleted or written over")


def _sweep_report(reply: list[Any]) -> SweepReport:
    now, *groups = reply
    requeued, expired, poisoned, damage = (tuple(_text(one) for one in group) for group in groups)
    return SweepReport(requeued=requeued, expired=expired, poisoned=poisoned, now_ms=int(now), damage=damage)


def _beats(said: Iterable[bytes]) -> Iterator[GroupBeat]:
    """What groups said of themselves; what no group can have said is passed by."""
    for one in said:
        with contextlib.suppress(ValueError, TypeError):
            yield GroupBeat(**json.loads(one))


def _queues(reply: list[Any]) -> list[QueueInfo]:
    alive = list(_beats(reply[0]))
    return [
        QueueInfo(
            model=_text(model),
            depth=depth,
            oldest_age_s=None if age == b"" else age / 1000,
            running=running,
            suspects=suspects,
            groups=tuple(sorted((beat for beat in alive if beat.model == _text(model)), key=lambda beat: beat.group)),
        )
        for model, depth, age, running, suspects in reply[1]
    ]


def _letter(row: list[Any]) -> DeadLetter:
    letter_id, model, job_id, reason, raw, at, size = row
    return DeadLetter(_text(letter_id), _text(model), _text(job_id) or None, _text(reason), raw, int(at), int(size))


def cut_letter(letter_id: str, kept: int, size: int) -> BadRequest:
    return BadRequest(
        f"only {kept} of {size} bytes of dead letter {letter_id!r} were kept: send the job anew; nothing was replayed"
    )


def _replayed(reply: list[Any]) -> list[str]:
    kind, *rest = reply
    if kind == b"unknown":
        raise UnknownJob(f"there is no dead letter {_text(rest[0])!r}; nothing was replayed")
    if kind == b"cut":
        raise cut_letter(_text(rest[0]), int(rest[1]), int(rest[2]))
    return [_text(one) for one in rest]


def _holder(reply: list[Any]) -> Holder | None:
    return Holder(**json.loads(reply[1]) | {"renewals": int(reply[0])}) if reply else None

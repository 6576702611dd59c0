"""The store's twin in memory: the same promises without Redis, for tests of everything above it.  One process only."""

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from . import journal, message
from .calls import cut_letter, idempotency_conflict, naming_jobs, queue_full, unknown_model
from .errors import BadRequest, UnknownJob
from .ids import Mint, new_secret
from .names import STEP_OF, STEPS
from .rules import ROOM_COUNTS_S, Rules
from .schema import SCHEMA_VERSION, Chunk, Failure, Job, Result, State, Status, Timings
from .store import (
    LETTER_CUT_BYTES,
    LETTER_HEAD_BYTES,
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

ROUND = (0, 3, 0, 6, 0, 3, 0, 9, 0, 3, 0, 6, 0, 3, 0)  # as in claim.lua
MAX_REFUSED = 256
FEW = 8  # likewise
RETRY_AFTER_S = 5.0


@dataclass
class _Record:
    """One job, as redis_store keeps it in a hash."""

    model: str
    tenant: str
    enqueued: int
    state: State = State.QUEUED
    deadline: int | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    step: int = 0
    rows: int = 1
    message: bytes | None = None  # while it is in no list
    attempt: int = 0
    free: int = 0
    suspicion: int = 0
    alone: bool = False
    cancel: bool = False
    lease_ends: int = 0
    claimed: int | None = None
    first: int | None = None
    finished: int | None = None
    tokens: int = 0
    chunks: list[Chunk] = field(default_factory=list)
    result: Result | None = None
    failure: Failure | None = None
    outcome: Outcome | None = None

    def overdue(self, now: int, grace: int) -> bool:
        if self.deadline is None or self.state.terminal:
            return False
        return now >= self.deadline + (grace if self.state is State.RUNNING else 0)


@dataclass
class _Queue:
    """One model's lists: the right end of each is served next."""

    lists: dict[int, deque[bytes]] = field(default_factory=lambda: {step: deque() for step in STEPS})
    suspects: deque[str] = field(default_factory=deque)
    queued: Counter[str] = field(default_factory=Counter)  # by tenant; foreign messages belong to none yet
    dead: int = 0  # messages of jobs that ended while they were queued
    left: set[str] = field(default_factory=set)  # the ids of these
    turn: int = 0
    holder: tuple[str, int] | None = None  # who makes room for suspects, or tries the last few; until when
    rooms: dict[str, tuple[int, int]] = field(default_factory=dict)  # group -> when it said so, rows that are free
    beaten: int = 0  # when a group last said that it is alive; 0: none of its groups was ever ready

    @property
    def known(self) -> bool:
        return self.beaten > 0

    @property
    def depth(self) -> int:
        return sum(map(len, self.lists.values())) + len(self.suspects) - self.dead


class MemoryStore:
    """`store.Store` in memory.  `clock` gives seconds since 1970; tests may turn it."""

    def __init__(self, *, rules: Rules | None = None, clock: Callable[[], float] = time.time) -> None:
        self.rules = rules or Rules()
        self._clock = clock
        self._lock = threading.RLock()
        self._records: dict[str, _Record] = {}
        self._queues: dict[str, _Queue] = {}
        self._idempotency: dict[tuple[str, str], tuple[str, str, int]] = {}
        self._letters: list[tuple[DeadLetter, str, int]] = []  # with tenant and step
        self._num_letters = 0
        self._groups: dict[str, tuple[int, GroupBeat]] = {}
        self._holders: dict[str, tuple[int, Holder]] = {}  # until when a name is whose
        self._mint = Mint(new_secret())

    # producers

    def enqueue(self, jobs: Sequence[Job], *, job_ids: Sequence[str] | None = None) -> list[Receipt]:
        ids = [self._mint.issue(job.tenant) for job in jobs] if job_ids is None else list(job_ids)
        receipts: list[Receipt] = []
        with self._lock, naming_jobs(receipts, ids, minted=job_ids is None):
            now = self._now()
            plan = self._admit(jobs, ids, now)
            for job, job_id, first in zip(jobs, ids, plan, strict=True):
                receipts.append(Receipt(first or job_id, first is not None))
                if first is None:
                    self._accept(job, job_id, now)
        return receipts

    def _admit(self, jobs: Sequence[Job], ids: Sequence[str], now: int) -> list[str | None]:
        """For each job the id that it already has, or None for a new one; raises before anything is written."""
        plan: list[str | None] = []
        new_ids: dict[str, str] = {}
        new_keys: dict[tuple[str, str], tuple[str, str]] = {}
        new_models: Counter[str] = Counter()
        new_tenants: Counter[tuple[str, str]] = Counter()
        for job, job_id in zip(jobs, ids, strict=True):
            message.checked(job, job_id, max_bytes=self.rules.max_message_bytes)
            queue = self._queues.get(job.model)
            if self.rules.require_known_model and not (queue and queue.known):
                raise unknown_model(job.model, [name for name, one in self._queues.items() if one.known], job_id)
            first = self._first_id(job, job_id, now, new_ids, new_keys)
            plan.append(first)
            if first is not None:
                continue
            new_models[job.model] += 1
            new_tenants[job.model, job.tenant] += 1
            depth, queued = (queue.depth, queue.queued[job.tenant]) if queue else (0, 0)
            if depth + new_models[job.model] > self.rules.max_queued_per_model:
                raise queue_full(f"model {job.model!r}", self.rules.max_queued_per_model, RETRY_AFTER_S, job_id)
            if queued + new_tenants[job.model, job.tenant] > self.rules.max_queued_per_tenant:
                raise queue_full(f"tenant {job.tenant!r}", self.rules.max_queued_per_tenant, RETRY_AFTER_S, job_id)
            new_ids[job_id] = job.tenant
            if job.idempotency_key is not None:
                new_keys[job.tenant, job.idempotency_key] = (message.digest(job), job_id)
        return plan

    def _first_id(
        self,
        job: Job,
        job_id: str,
        now: int,
        new_ids: dict[str, str],
        new_keys: dict[tuple[str, str], tuple[str, str]],
    ) -> str | None:
        if job.idempotency_key is not None:
            key = (job.tenant, job.idempotency_key)
            old = self._idempotency.get(key)
            seen = new_keys.get(key) or (old[:2] if old and old[2] > now else None)
            if seen is not None:
                if seen[0] != message.digest(job):
                    raise idempotency_conflict(job_id)
                return seen[1]
        record = self._record(job_id)
        owner = new_ids.get(job_id) or (record.tenant if record else None)
        if owner is not None and owner != job.tenant:
            raise BadRequest("this job id cannot be used: leave ids to hortator", job_id=job_id)
        return job_id if owner is not None else None

    def _accept(self, job: Job, job_id: str, now: int) -> None:
        deadline = self._default_deadline(now) if job.deadline_s is None else now + math.ceil(job.deadline_s * 1000)
        self._records[job_id] = _Record(
            job.model,
            job.tenant,
            now,
            deadline=deadline,
            metadata=dict(job.metadata),
            step=STEP_OF[job.priority],
            rows=job.sampling.n,
        )
        queue = self._queue(job.model)
        queue.lists[STEP_OF[job.priority]].appendleft(message.build(job, job_id))
        queue.queued[job.tenant] += 1
        if job.idempotency_key is not None:
            ends = now + round(self.rules.idempotency_ttl_s * 1000)
            self._idempotency[job.tenant, job.idempotency_key] = (message.digest(job), job_id, ends)

    def push(self, model: str, raw: bytes, *, step: int = 0) -> None:
        """What a foreign Celery client's LPUSH does."""
        with self._lock:
            self._queue(model).lists[step].appendleft(raw)

    def cancel(self, job_ids: Sequence[str], *, tenant: str | None = None) -> list[State | None]:
        with self._lock:
            return [self._cancel(job_id, self._visible(job_id, tenant)) for job_id in job_ids]

    def _cancel(self, job_id: str, record: _Record | None) -> State | None:
        if record is None:
            return None
        if self._overdue(record):
            self._expire(job_id, record)
        elif record.state is State.QUEUED:
            self._end_cancelled(job_id, record)
        elif record.state is State.RUNNING:
            record.cancel = True
        return record.state

    def statuses(self, job_ids: Sequence[str], *, tenant: str | None = None) -> list[Status | None]:
        with self._lock:
            return [self._status(job_id, self._visible(job_id, tenant)) for job_id in job_ids]

    def ended(self, job_ids: Sequence[str], *, tenant: str | None = None) -> list[str]:
        statuses = self.statuses(job_ids, tenant=tenant)
        return [
            job_id for job_id, status in zip(job_ids, statuses, strict=True) if status is None or status.state.terminal
        ]

    def _status(self, job_id: str, record: _Record | None) -> Status | None:
        if record is None:
            return None
        if self._overdue(record):
            self._expire(job_id, record)
        return Status(
            id=job_id,
            model=record.model,
            tenant=record.tenant,
            state=record.state,
            attempt=record.attempt - record.free,
            num_tokens=record.tokens,
            timings=Timings(
                enqueued_ms=record.enqueued,
                claimed_ms=record.claimed,
                first_token_ms=record.first,
                finished_ms=record.finished,
            ),
            metadata=record.metadata,
            result=record.result,
            failure=record.failure,
        )

    def issued(self, job_id: str, *, tenant: str) -> bool:
        return self._mint.issued(job_id, tenant)

    def chunks(self, job_id: str, *, after: int = 0) -> list[Chunk]:
        with self._lock:
            record = self._record(job_id)
            return journal.from_token(record.chunks, after) if record else []

    # leaders

    def claim(self, model: str, *, owner: str, limit: int, lease_s: float, idle: bool, surplus: int = 0) -> Claim:
        with self._lock:
            now = self._now()
            lease_ends = now + round(lease_s * 1000)
            queue = self._queue(model)
            special = self._suspect_first(queue, owner, lease_ends, now, idle=idle)
            if special is not None:
                return special
            if queue.holder and queue.holder[0] == owner:
                queue.holder = None
            total = sum(map(len, queue.lists.values()))
            most = self._share(queue, owner, total, limit, surplus)
            jobs = tuple(self._take_many(model, queue, most, lease_ends))
            rows = sum(self._records[claimed.lease.job_id].rows for claimed in jobs)
            if rows and owner in queue.rooms:
                queue.rooms[owner] = now, max(0, limit - surplus - rows)
            return Claim(ClaimMode.SHARED if most < min(limit, total) else ClaimMode.TOGETHER, jobs, now)

    def _share(self, queue: _Queue, owner: str, total: int, limit: int, surplus: int) -> int:
        """See claim.lua."""
        free, since = limit - surplus, self._now() - ROOM_COUNTS_S * 1000
        others = sum(rows for group, (at, rows) in queue.rooms.items() if group != owner and at > since)
        if not others:
            return limit
        if total >= free + others:
            return free + min(surplus, total - free - others)
        return math.ceil(total * max(0, free) / (free + others))

    def _suspect_first(self, queue: _Queue, owner: str, lease_ends: int, now: int, *, idle: bool) -> Claim | None:
        while queue.suspects:
            if not idle:
                if queue.holder and queue.holder[0] != owner and queue.holder[1] > now:
                    return None
                queue.holder = (owner, lease_ends)
                return Claim(ClaimMode.DRAIN, (), now)
            job_id = queue.suspects[-1]
            record = self._records[job_id]
            if self._overdue(record):
                self._expire(job_id, record)
                continue
            if record.message is None:
                self._damaged(job_id, record)
                continue
            queue.suspects.pop()
            queue.queued[record.tenant] -= 1
            if 0 < len(queue.suspects) <= FEW:
                queue.holder = (owner, lease_ends)
            elif queue.holder and queue.holder[0] == owner:
                queue.holder = None
            claimed = self._lease(job_id, record, record.message, lease_ends, alone=True)
            return Claim(ClaimMode.ALONE, (claimed,), now, full_run_alone=record.suspicion >= 2)
        return None

    def _take_many(self, model: str, queue: _Queue, limit: int, lease_ends: int) -> list[Claimed]:
        left = {step: len(queue.lists[step]) for step in STEPS}
        if not any(left.values()):
            queue.dead = 0
            queue.left.clear()
        jobs: list[Claimed] = []
        rows = examined = 0
        while any(left.values()) and rows < limit and examined < limit + MAX_REFUSED:
            step = ROUND[queue.turn]
            queue.turn = (queue.turn + 1) % len(ROUND)
            if left[step]:
                left[step] -= 1
                examined += 1
                claimed = self._take(model, queue.lists[step].pop(), step, lease_ends)
                if claimed:
                    jobs.append(claimed)
                    rows += self._records[claimed.lease.job_id].rows
        return jobs

    def _take(self, model: str, raw: bytes, step: int, lease_ends: int) -> Claimed | None:
        opened = message.opened(raw, max_bytes=self.rules.max_message_bytes)
        if opened.problem is not None:
            self._refuse(model, opened.job_id, opened.problem, raw, step)
            return None
        assert opened.job_id is not None
        if opened.version is not None and opened.version != SCHEMA_VERSION:
            self._queue(model).lists[step].appendleft(raw)
            return None
        record = self._record(opened.job_id)
        if record is None and (opened.recorded or opened.job_id in self._queue(model).left):
            self._meet_without_record(model, opened.job_id, raw, step)
            return None
        queue = self._queue(model)
        if record is None:
            now = self._now()
            record = _Record(model, "default", now, deadline=self._default_deadline(now))
            self._records[opened.job_id] = record
            queue.queued["default"] += 1
        if self._overdue(record) and record.state is State.QUEUED and record.message is None:
            self._expire(opened.job_id, record)
        if record.state.terminal:
            self._drop_message(model, opened.job_id)
            return None
        if record.state is State.RUNNING or record.model != model or record.message is not None:
            return None  # a duplicate: the job runs, or is a suspect
        queue.queued[record.tenant] -= 1
        record.step = step
        return self._lease(opened.job_id, record, raw, lease_ends, alone=False)

    def _refuse(self, model: str, job_id: str | None, problem: str, raw: bytes, step: int) -> None:
        self._bury(model, raw, problem, job_id, step=step)
        if job_id is None:
            return
        record = self._record(job_id)
        if record is None:
            record = self._records[job_id] = _Record(model, "default", self._now())
            self._queue(model).queued["default"] += 1
        if record.state is State.QUEUED:
            self._end(job_id, record, State.FAILED, Failure(code="malformed", message=problem))
            self._drop_message(model, job_id)

    def _meet_without_record(self, model: str, job_id: str, raw: bytes, step: int) -> None:
        if job_id in self._queue(model).left:
            self._drop_message(model, job_id)
        else:
            self._bury(model, raw, "its record is gone: expired, or a late duplicate", job_id, step=step)

    def _drop_message(self, model: str, job_id: str) -> None:
        """The message of a job that had ended while it was queued was met."""
        queue = self._queue(model)
        queue.dead = max(0, queue.dead - 1)
        queue.left.discard(job_id)

    def _lease(self, job_id: str, record: _Record, raw: bytes, lease_ends: int, *, alone: bool) -> Claimed:
        now = self._now()
        record.state, record.message, record.alone, record.lease_ends = State.RUNNING, raw, alone, lease_ends
        record.attempt += 1
        record.claimed = record.claimed or now
        lease = Lease(job_id, record.attempt)
        return Claimed(lease, raw, record.tenant, record.enqueued, record.deadline, tuple(record.chunks))

    def append(self, appends: Sequence[Append]) -> Signals:
        cancelled: set[str] = set()
        lost: set[str] = set()
        with self._lock:
            for one in appends:
                record = self._ours(one.lease)
                if record is None or not self._append(record, one.chunk):
                    lost.add(one.lease.job_id)
                elif record.cancel:
                    cancelled.add(one.lease.job_id)
        return Signals(frozenset(cancelled), frozenset(lost))

    def _append(self, record: _Record, chunk: Chunk) -> bool:
        if chunk.index != record.tokens:
            return chunk in record.chunks  # the same call again
        if chunk.token_ids:
            record.chunks.append(chunk)
        if chunk.index == 0 and record.first is None:
            record.first = self._now()
        record.tokens += len(chunk.token_ids)
        return True

    def renew(self, leases: Sequence[Lease], *, owner: str, lease_s: float) -> Signals:
        with self._lock:
            ends = self._now() + round(lease_s * 1000)
            ours = {lease.job_id: self._ours(lease) for lease in leases}
            for record in ours.values():
                if record is not None:
                    record.lease_ends = ends
            return Signals(
                frozenset(job_id for job_id, record in ours.items() if record is not None and record.cancel),
                frozenset(job_id for job_id, record in ours.items() if record is None),
            )

    def commit(self, outcomes: Sequence[Outcome]) -> list[Verdict]:
        with self._lock:
            return [self._commit(outcome) for outcome in outcomes]

    def _commit(self, outcome: Outcome) -> Verdict:
        job_id, state = outcome.lease.job_id, outcome.state
        if not state.terminal or (state is State.SUCCEEDED and outcome.result is None):
            raise ValueError(f"{job_id}: {state} is not terminal, or SUCCEEDED without a result")
        record = self._ours(outcome.lease)
        if record is None:
            stored = self._record(job_id)
            return Verdict.COMMITTED if stored and stored.outcome == outcome else Verdict.FENCED
        if outcome.rest is not None and outcome.rest.index == record.tokens:
            self._append(record, outcome.rest)
        failure = None
        if state is not State.SUCCEEDED:
            failure = outcome.failure or Failure(code=state.value, message=state.value)
        self._end(job_id, record, state, failure, outcome.result if failure is None else None)
        record.outcome = outcome
        return Verdict.COMMITTED

    def release(self, leases: Sequence[Lease], *, reason: ReleaseReason) -> None:
        with self._lock:
            for lease in reversed(leases):
                record = self._ours(lease)
                if record is None:
                    continue
                if reason is ReleaseReason.CRASHED:
                    self._crashed(lease.job_id, record)
                else:
                    self._drained(lease.job_id, record)

    def _crashed(self, job_id: str, record: _Record) -> str:
        charged = record.attempt - record.free
        if record.cancel:
            self._end_cancelled(job_id, record)
            return "cancelled"
        if record.alone or charged >= self.rules.max_attempts:
            code, text = "too_many_attempts", f"gave up after {charged} attempts"
            if record.alone:
                code, text = "poison", "its group died twice while it ran, the last time with nothing beside it"
            self._bury(record.model, record.message or b"", code, job_id, tenant=record.tenant, step=record.step)
            self._end(job_id, record, State.FAILED, Failure(code=code, message=text))
            return "poison"
        record.state = State.QUEUED
        record.suspicion += 1
        self._queue(record.model).queued[record.tenant] += 1
        self._queue(record.model).suspects.appendleft(job_id)
        return "suspect"

    def _drained(self, job_id: str, record: _Record) -> None:
        if record.cancel:
            self._end_cancelled(job_id, record)
            return
        if record.message is None:
            self._damaged(job_id, record)
            return
        record.state = State.QUEUED
        record.free += 1
        queue = self._queue(record.model)
        queue.queued[record.tenant] += 1
        if record.alone:
            queue.suspects.append(job_id)
        else:
            queue.lists[record.step].append(record.message)
            record.message = None

    def clear(self, lease: Lease) -> None:
        with self._lock:
            record = self._ours(lease)
            if record is not None:
                record.alone = False

    def beat(self, beat: GroupBeat) -> None:
        with self._lock:
            queue = self._queue(beat.model)
            if beat.state == "ready" or queue.known:
                queue.beaten = self._now()
            if beat.room:
                queue.rooms[beat.group] = self._now(), beat.room
            else:
                queue.rooms.pop(beat.group, None)
            if beat.state == "gone":
                self._groups.pop(beat.group, None)
            else:
                self._groups[beat.group] = (self._now(), beat)

    def hold(self, holder: Holder, *, replacing: str = "") -> Holder | None:
        with self._lock:
            until, found = self._holders.get(holder.group, (0, holder))
            if found.life not in (holder.life, replacing) and self._now() < until:
                return found
            ours = found.life == holder.life and self._now() < until
            kept = replace(holder, renewals=found.renewals + 1 if ours else 0)
            self._holders[holder.group] = self._now() + round(self.rules.beat_ttl_s * 1000), kept
            return None

    def let_go(self, holder: Holder) -> None:
        with self._lock:
            if holder.group in self._holders and self._holders[holder.group][1].life == holder.life:
                del self._holders[holder.group]

    # anybody

    def sweep(self, *, limit: int = 1000, expired_before_ms: int | None = None) -> SweepReport:
        with self._lock:
            now = self._now()
            before = now if expired_before_ms is None else min(now, expired_before_ms)
            grace = round(self.rules.conviction_grace_s * 1000)
            requeued, poisoned = [], []
            expired = self._end_overdue(limit)
            ended = [
                (job_id, record)
                for job_id, record in self._records.items()
                if record.state is State.RUNNING and record.lease_ends < before - (grace if record.alone else 0)
            ]
            for job_id, record in sorted(ended, key=lambda one: one[1].lease_ends)[:limit]:
                fate = self._crashed(job_id, record)
                requeued += [job_id] if fate == "suspect" else []
                poisoned += [job_id] if fate == "poison" else []
            self._forget_models(now)
            return SweepReport(tuple(requeued), tuple(expired), tuple(poisoned), now)

    def _forget_models(self, now: int) -> None:
        busy = {record.model for record in self._records.values() if record.state is State.RUNNING}
        silent = now - round(self.rules.result_ttl_s * 1000)
        busy |= {beat.model for at, beat in self._groups.values() if at >= silent}
        for model, queue in list(self._queues.items()):
            waits = queue.suspects or any(queue.lists.values())
            if queue.beaten < silent and model not in busy and not waits:
                del self._queues[model]

    def _end_overdue(self, limit: int) -> list[str]:
        overdue = [job_id for job_id, record in self._records.items() if self._overdue(record)][:limit]
        for job_id in overdue:
            self._expire(job_id, self._records[job_id])
        return overdue

    def queues(self) -> list[QueueInfo]:
        with self._lock:
            return [self._info(model) for model in sorted(self._queues)]

    def _info(self, model: str) -> QueueInfo:
        now = self._now()
        queue = self._queues[model]
        records = [record for record in self._records.values() if record.model == model]
        waiting = [record.enqueued for record in records if record.state is State.QUEUED]
        alive = now - round(self.rules.beat_ttl_s * 1000)
        groups = [beat for at, beat in self._groups.values() if beat.model == model and at >= alive]
        return QueueInfo(
            model=model,
            depth=max(0, queue.depth),
            oldest_age_s=(now - min(waiting)) / 1000 if waiting else None,
            running=sum(record.state is State.RUNNING for record in records),
            suspects=len(queue.suspects),
            groups=tuple(sorted(groups, key=lambda beat: beat.group)),
        )

    def bury(self, model: str, message: bytes, *, reason: str, job_id: str | None = None) -> str:
        with self._lock:
            return self._bury(model, message, reason, job_id)

    def dead_letters(self, *, limit: int = 100, before: str | None = None) -> list[DeadLetter]:
        with self._lock:
            letters = [letter for letter, _, _ in reversed(self._letters)]
        older = [letter for letter in letters if before is None or _order(letter.letter_id) < _order(before)]
        return [replace(letter, message=letter.message[:LETTER_HEAD_BYTES]) for letter in older[:limit]]

    def count_dead_letters(self) -> int:
        with self._lock:
            return len(self._letters)

    def dead_letter(self, letter_id: str) -> DeadLetter | None:
        with self._lock:
            return next((letter for letter, _, _ in self._letters if letter.letter_id == letter_id), None)

    def replay(self, letter_ids: Sequence[str]) -> list[str]:
        with self._lock:
            by_id = {letter.letter_id: (letter, tenant, step) for letter, tenant, step in self._letters}
            for letter_id in letter_ids:
                if letter_id not in by_id:
                    raise UnknownJob(f"there is no dead letter {letter_id!r}; nothing was replayed")
                kept = by_id[letter_id][0]
                if len(kept.message) < kept.message_bytes:
                    raise cut_letter(letter_id, len(kept.message), kept.message_bytes)
            for letter_id in letter_ids:
                letter, tenant, step = by_id[letter_id]
                self._letters.remove(by_id[letter_id])
                if letter.job_id is None or self._clean_record(letter.job_id, letter.model, tenant):
                    self._queue(letter.model).lists[step].appendleft(letter.message)
            return [by_id[letter_id][0].job_id or "" for letter_id in letter_ids]

    def check(self, *, for_submits: bool = False) -> None:
        """Memory is always suitable."""

    def _clean_record(self, job_id: str, model: str, tenant: str) -> bool:
        old = self._record(job_id)
        if old is not None and not old.state.terminal:
            return False
        now, metadata = self._now(), old.metadata if old else {}
        new = _Record(
            model, old.tenant if old else tenant, now, deadline=self._default_deadline(now), metadata=metadata
        )
        new.attempt = new.free = old.attempt if old else 0
        self._records[job_id] = new
        self._queue(model).queued[new.tenant] += 1
        return True

    def _bury(
        self,
        model: str,
        raw: bytes,
        reason: str,
        job_id: str | None,
        *,
        tenant: str | None = None,
        step: int | None = None,
    ) -> str:
        record = self._record(job_id) if job_id else None
        self._num_letters += 1
        now, size = self._now(), len(raw)
        if size > max(self.rules.max_message_bytes, LETTER_CUT_BYTES):
            raw = raw[:LETTER_CUT_BYTES]
            reason = f"{reason}; only its first {LETTER_CUT_BYTES} bytes are kept"
        letter = DeadLetter(f"{now}-{self._num_letters}", model, job_id, reason, raw, now, size)
        whose = tenant or (record.tenant if record else "default")
        self._letters.append((letter, whose, step if step is not None else record.step if record else 0))
        del self._letters[: -self.rules.max_letters]
        while len(self._letters) > 1 and self._kept_bytes() > self.rules.max_letters_bytes:
            del self._letters[0]
        return letter.letter_id

    def _kept_bytes(self) -> int:
        return sum(len(letter.message) for letter, _, _ in self._letters)

    def _end(
        self, job_id: str, record: _Record, state: State, failure: Failure | None, result: Result | None = None
    ) -> None:
        queue = self._queue(record.model)
        if record.state is State.QUEUED:
            queue.queued[record.tenant] -= 1
            if job_id in queue.suspects:
                queue.suspects.remove(job_id)
            else:
                queue.dead += 1
                queue.left.add(job_id)
        record.state, record.failure, record.result = state, failure, result
        record.message, record.alone, record.cancel, record.suspicion = None, False, False, 0
        record.finished = self._now()

    def _end_cancelled(self, job_id: str, record: _Record) -> None:
        self._end(job_id, record, State.CANCELLED, Failure(code="cancelled", message="the job was cancelled"))

    def _damaged(self, job_id: str, record: _Record) -> None:
        text = "its message in Redis is gone or was damaged; send the job anew"
        self._end(job_id, record, State.FAILED, Failure(code="damaged", message=text))

    def _expire(self, job_id: str, record: _Record) -> None:
        text = f"its deadline passed while it was {record.state.value}"
        self._end(job_id, record, State.EXPIRED, Failure(code="expired", message=text))

    def _default_deadline(self, now: int) -> int:
        return now + round(self.rules.default_deadline_s * 1000)

    def _overdue(self, record: _Record) -> bool:
        return record.overdue(self._now(), round(self.rules.deadline_grace_s * 1000))

    def _ours(self, lease: Lease) -> _Record | None:
        record = self._record(lease.job_id)
        ours = record is not None and record.state is State.RUNNING and record.attempt == lease.attempt
        return record if ours else None

    def _record(self, job_id: str) -> _Record | None:
        """The record unless its time is over."""
        record = self._records.get(job_id)
        if record is None or record.finished is None:
            return record
        age = self._now() - record.finished
        if age >= self.rules.journal_ttl_s * 1000:
            record.chunks = []
        if age >= self.rules.result_ttl_s * 1000:
            del self._records[job_id]
            return None
        return record

    def _visible(self, job_id: str, tenant: str | None) -> _Record | None:
        record = self._record(job_id)
        return record if record is not None and tenant in (None, record.tenant) else None

    def _queue(self, model: str) -> _Queue:
        return self._queues.setdefault(model, _Queue())

    def _now(self) -> int:
        return int(self._clock() * 1000)


def _order(letter_id: str) -> tuple[int, ...]:
    return tuple(int(part) for part in letter_id.split("-"))

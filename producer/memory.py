"""The store's twin in memory: the same promises without Redis, for tests of everything above it.  One process only."""

import threading
import time
from collections.abc import Callable, Sequence

from . import journal, message
from .errors import UnknownJob
from .ids import Mint, new_secret
from .memory_admission import Admission
from .memory_claims import Claims
from .memory_groups import Groups
from .memory_letters import Kept
from .memory_records import Record, Records
from .refused import cut_letter, naming_jobs
from .rules import Rules
from .schema import Chunk, Failure, Job, State, Status, Timings
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


class MemoryStore:
    """`store.Store` in memory.  `clock` gives seconds since 1970; tests may turn it."""

    def __init__(self, *, rules: Rules | None = None, clock: Callable[[], float] = time.time) -> None:
        self._lock = threading.RLock()
        self._records = Records(rules or Rules(), clock)
        self._admission = Admission(self._records)
        self._claims = Claims(self._records)
        self._groups = Groups(self._records)
        self._mint = Mint(new_secret())

    @property
    def rules(self) -> Rules:
        return self._records.rules

    @rules.setter
    def rules(self, rules: Rules) -> None:
        self._records.rules = rules

    # producers

    def enqueue(self, jobs: Sequence[Job], *, job_ids: Sequence[str] | None = None) -> list[Receipt]:
        ids = [self._mint.issue(job.tenant) for job in jobs] if job_ids is None else list(job_ids)
        receipts: list[Receipt] = []
        with self._lock, naming_jobs(receipts, ids, minted=job_ids is None):
            now = self._records.now()
            plan = self._admission.plan(jobs, ids, now)
            for job, job_id, first in zip(jobs, ids, plan, strict=True):
                receipts.append(Receipt(first or job_id, first is not None))
                if first is None:
                    self._admission.accept(job, job_id, now)
        return receipts

    def push(self, model: str, raw: bytes, *, step: int = 0) -> None:
        """What a foreign Celery client's LPUSH does."""
        with self._lock:
            self._records.queue(model).lists[step].appendleft(raw)

    def cancel(self, job_ids: Sequence[str], *, tenant: str | None = None) -> list[State | None]:
        with self._lock:
            return [self._cancel(job_id, self._records.visible(job_id, tenant)) for job_id in job_ids]

    def _cancel(self, job_id: str, record: Record | None) -> State | None:
        if record is None:
            return None
        if self._records.overdue(record):
            self._records.expire(job_id, record)
        elif record.state is State.QUEUED:
            self._records.end_cancelled(job_id, record)
        elif record.state is State.RUNNING:
            record.cancel = True
        return record.state

    def statuses(self, job_ids: Sequence[str], *, tenant: str | None = None) -> list[Status | None]:
        with self._lock:
            return [self._status(job_id, self._records.visible(job_id, tenant)) for job_id in job_ids]

    def ended(self, job_ids: Sequence[str], *, tenant: str | None = None) -> list[str]:
        statuses = self.statuses(job_ids, tenant=tenant)
        return [
            job_id for job_id, status in zip(job_ids, statuses, strict=True) if status is None or status.state.terminal
        ]

    def _status(self, job_id: str, record: Record | None) -> Status | None:
        if record is None:
            return None
        if self._records.overdue(record):
            self._records.expire(job_id, record)
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
            record = self._records.get(job_id)
            return journal.from_token(record.chunks, after) if record else []

    # leaders

    def claim(self, model: str, *, owner: str, limit: int, lease_s: float, idle: bool, surplus: int = 0) -> Claim:
        with self._lock:
            return self._claims.claim(model, owner, limit, lease_s, idle=idle, surplus=surplus)

    def append(self, appends: Sequence[Append]) -> Signals:
        cancelled: set[str] = set()
        lost: set[str] = set()
        with self._lock:
            for one in appends:
                record = self._records.ours(one.lease)
                if record is None or not self._append(record, one.chunk):
                    lost.add(one.lease.job_id)
                elif record.cancel:
                    cancelled.add(one.lease.job_id)
        return Signals(frozenset(cancelled), frozenset(lost))

    def _append(self, record: Record, chunk: Chunk) -> bool:
        if chunk.index != record.tokens:
            return chunk in record.chunks  # the same call again
        if chunk.token_ids:
            record.chunks.append(chunk)
        if chunk.index == 0 and record.first is None:
            record.first = self._records.now()
        record.tokens += len(chunk.token_ids)
        return True

    def renew(self, leases: Sequence[Lease], *, owner: str, lease_s: float) -> Signals:
        with self._lock:
            ends = self._records.now() + round(lease_s * 1000)
            ours = [(lease.job_id, self._records.ours(lease)) for lease in leases]
            for _, record in ours:
                if record is not None:
                    record.lease_ends = ends
            return Signals(
                frozenset(job_id for job_id, record in ours if record is not None and record.cancel),
                frozenset(job_id for job_id, record in ours if record is None),
            )

    def commit(self, outcomes: Sequence[Outcome]) -> list[Verdict]:
        with self._lock:
            return [self._commit(outcome) for outcome in outcomes]

    def _commit(self, outcome: Outcome) -> Verdict:
        job_id, state = outcome.lease.job_id, outcome.state
        if not state.terminal or (state is State.SUCCEEDED and outcome.result is None):
            raise ValueError(f"{job_id}: {state} is not terminal, or SUCCEEDED without a result")
        record = self._records.ours(outcome.lease)
        if record is None:
            stored = self._records.get(job_id)
            return Verdict.COMMITTED if stored and stored.outcome == outcome else Verdict.FENCED
        if outcome.rest is not None and outcome.rest.index == record.tokens:
            self._append(record, outcome.rest)
        failure = None
        if state is not State.SUCCEEDED:
            failure = outcome.failure or Failure(code=state.value, message=state.value)
        self._records.end(job_id, record, state, failure, outcome.result if failure is None else None)
        record.outcome = outcome
        return Verdict.COMMITTED

    def release(self, leases: Sequence[Lease], *, reason: ReleaseReason) -> None:
        with self._lock:
            for lease in reversed(leases):
                record = self._records.ours(lease)
                if record is None:
                    continue
                if reason is ReleaseReason.CRASHED:
                    self._records.crashed(lease.job_id, record)
                else:
                    self._records.drained(lease.job_id, record)

    def clear(self, lease: Lease) -> None:
        with self._lock:
            record = self._records.ours(lease)
            if record is not None:
                record.alone = False

    def beat(self, beat: GroupBeat) -> None:
        with self._lock:
            self._groups.beat(beat)

    def hold(self, holder: Holder, *, replacing: str = "") -> Holder | None:
        with self._lock:
            return self._groups.hold(holder, replacing)

    def let_go(self, holder: Holder) -> None:
        with self._lock:
            self._groups.let_go(holder)

    # anybody

    def sweep(self, *, limit: int = 1000, expired_before_ms: int | None = None) -> SweepReport:
        with self._lock:
            now = self._records.now()
            before = now if expired_before_ms is None else min(now, expired_before_ms)
            grace = round(self.rules.conviction_grace_s * 1000)
            requeued, poisoned = [], []
            expired = self._end_overdue(limit)
            ended = [
                (job_id, record)
                for job_id, record in self._records.by_id.items()
                if record.state is State.RUNNING and record.lease_ends < before - (grace if record.alone else 0)
            ]
            for job_id, record in sorted(ended, key=lambda one: one[1].lease_ends)[:limit]:
                fate = self._records.crashed(job_id, record)
                requeued += [job_id] if fate == "suspect" else []
                poisoned += [job_id] if fate == "poison" else []
            for queue in self._records.queues.values():
                self._records.drop_dead(queue)
            self._forget_models(now)
            return SweepReport(tuple(requeued), tuple(expired), tuple(poisoned), now)

    def _forget_models(self, now: int) -> None:
        busy = {record.model for record in self._records.by_id.values() if record.state is State.RUNNING}
        silent = now - round(self.rules.result_ttl_s * 1000)
        busy |= {beat.model for beat in self._groups.since(silent)}
        for model, queue in list(self._records.queues.items()):
            waits = queue.suspects or any(queue.lists.values())
            if queue.beaten < silent and model not in busy and not waits:
                del self._records.queues[model]

    def _end_overdue(self, limit: int) -> list[str]:
        overdue = [job_id for job_id, record in self._records.by_id.items() if self._records.overdue(record)][:limit]
        for job_id in overdue:
            self._records.expire(job_id, self._records.by_id[job_id])
        return overdue

    def queues(self) -> list[QueueInfo]:
        with self._lock:
            return [self._info(model) for model in sorted(self._records.queues)]

    def _info(self, model: str) -> QueueInfo:
        now = self._records.now()
        queue = self._records.queues[model]
        records = [record for record in self._records.by_id.values() if record.model == model]
        waiting = [record.enqueued for record in records if record.state is State.QUEUED]
        alive = now - round(self.rules.beat_ttl_s * 1000)
        groups = [beat for beat in self._groups.since(alive) if beat.model == model]
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
            return self._records.bury(model, message, reason, job_id)

    def dead_letters(self, *, limit: int = 100, before: str | None = None) -> list[DeadLetter]:
        with self._lock:
            return self._records.letters.listed(limit, before)

    def count_dead_letters(self) -> int:
        with self._lock:
            return len(self._records.letters)

    def dead_letter(self, letter_id: str) -> DeadLetter | None:
        with self._lock:
            kept = self._records.letters.find(letter_id)
            return kept.letter if kept else None

    def replay(self, letter_ids: Sequence[str]) -> list[str]:
        with self._lock:
            letters = {letter_id: self._whole_letter(letter_id) for letter_id in letter_ids}
            for kept in letters.values():
                self._replay(kept)
            return [letters[letter_id].letter.job_id or "" for letter_id in letter_ids]

    def _whole_letter(self, letter_id: str) -> Kept:
        kept = self._records.letters.find(letter_id)
        if kept is None:
            raise UnknownJob(f"there is no dead letter {letter_id!r}; nothing was replayed")
        if not kept.whole:
            raise cut_letter(letter_id, len(kept.letter.message), kept.letter.message_bytes)
        return kept

    def _replay(self, kept: Kept) -> None:
        letter = kept.letter
        self._records.letters.drop(kept)
        rows = message.rows_of(letter.message)
        if letter.job_id is None or self._records.clean(letter.job_id, letter.model, kept.tenant, rows=rows):
            self._records.queue(letter.model).lists[kept.step].appendleft(letter.message)

    def check(self, *, for_submits: bool = False) -> None:
        """Memory is always suitable."""

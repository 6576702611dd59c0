"""How the memory twin hands out jobs, as claim.lua does."""

import math
from collections.abc import Sequence

from . import journal, message
from .memory_records import Queue, Record, Records
from .names import STEPS
from .rules import CLAIM_BYTES, CLAIM_JOBS, ROOM_COUNTS_S
from .schema import SCHEMA_VERSION, Failure, State
from .store import Claim, Claimed, ClaimMode, Lease

ROUND = (0, 3, 0, 6, 0, 3, 0, 9, 0, 3, 0, 6, 0, 3, 0)  # as in claim.lua
MAX_REFUSED = 256
FEW = 8  # likewise


class Claims:
    """Takes jobs off the queues.  Whoever calls holds the store's lock."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def claim(self, model: str, owner: str, limit: int, lease_s: float, *, idle: bool, surplus: int) -> Claim:
        now = self._records.now()
        lease_ends = now + round(lease_s * 1000)
        queue = self._records.queue(model)
        special = self._suspect_first(queue, owner, lease_ends, now, idle=idle)
        if special is not None:
            return special
        if queue.holder and queue.holder[0] == owner:
            queue.holder = None
        total = sum(map(len, queue.lists.values()))
        most = self._share(queue, owner, total, limit, surplus)
        jobs = tuple(self._take_many(model, queue, most, lease_ends))
        mode = ClaimMode.SHARED if most < min(limit, total) else ClaimMode.TOGETHER
        rows = sum(self._records.by_id[claimed.lease.job_id].rows for claimed in jobs)
        if rows and owner in queue.rooms:
            queue.rooms[owner] = now, max(0, limit - surplus - rows)
        return Claim(mode, jobs, now, more=_is_cut(jobs, sum(map(_num_bytes, jobs))))

    def _share(self, queue: Queue, owner: str, total: int, limit: int, surplus: int) -> int:
        """See claim.lua."""
        free, since = limit - surplus, self._records.now() - ROOM_COUNTS_S * 1000
        others = sum(rows for group, (at, rows) in queue.rooms.items() if group != owner and at > since)
        if not others:
            return limit
        if total >= free + others:
            return free + min(surplus, total - free - others)
        return math.ceil(total * max(0, free) / (free + others))

    def _suspect_first(self, queue: Queue, owner: str, lease_ends: int, now: int, *, idle: bool) -> Claim | None:
        while queue.suspects:
            if not idle:
                if queue.holder and queue.holder[0] != owner and queue.holder[1] > now:
                    return None
                queue.holder = (owner, lease_ends)
                return Claim(ClaimMode.DRAIN, (), now)
            job_id = queue.suspects[-1]
            record = self._records.by_id[job_id]
            if self._records.overdue(record):
                self._records.expire(job_id, record)
                continue
            if record.message is None:
                self._records.damaged(job_id, record)
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

    def _take_many(self, model: str, queue: Queue, limit: int, lease_ends: int) -> list[Claimed]:
        left = {step: len(queue.lists[step]) for step in STEPS}
        if not any(left.values()):
            queue.left.clear()
            if not queue.suspects:
                queue.queued.clear()
        jobs: list[Claimed] = []
        rows = examined = num_bytes = 0
        most_examined = min(limit, CLAIM_JOBS) + MAX_REFUSED
        while any(left.values()) and rows < limit and not _is_cut(jobs, num_bytes) and examined < most_examined:
            step = ROUND[queue.turn]
            queue.turn = (queue.turn + 1) % len(ROUND)
            if left[step]:
                left[step] -= 1
                examined += 1
                claimed = self._take(model, queue.lists[step].pop(), step, lease_ends)
                if claimed:
                    jobs.append(claimed)
                    num_bytes += _num_bytes(claimed)
                    rows += self._records.by_id[claimed.lease.job_id].rows
        return jobs

    def _take(self, model: str, raw: bytes, step: int, lease_ends: int) -> Claimed | None:
        records = self._records
        queue = records.queue(model)
        opened = message.opened(raw, max_bytes=records.rules.max_message_bytes)
        if opened.problem is not None:
            self._refuse(model, opened.job_id, opened.problem, raw, step)
            return None
        assert opened.job_id is not None
        if opened.version is not None and opened.version != SCHEMA_VERSION:
            queue.lists[step].appendleft(raw)
            return None
        record = records.get(opened.job_id)
        if record is None and (opened.recorded or opened.job_id in queue.left):
            self._meet_without_record(model, opened.job_id, raw, step)
            return None
        if record is None:
            now = records.now()
            rows = message.rows_of(raw)
            record = Record(model, "default", now, deadline=records.default_deadline(now), rows=rows)
            records.by_id[opened.job_id] = record
            queue.queued["default"] += 1
        if records.overdue(record) and record.state is State.QUEUED and record.message is None:
            records.expire(opened.job_id, record)
        if record.state.terminal:
            queue.drop_message(opened.job_id)
            return None
        if record.state is State.RUNNING or record.model != model or record.message is not None:
            return None  # a duplicate: the job runs, or is a suspect
        queue.queued[record.tenant] -= 1
        record.step = step
        return self._lease(opened.job_id, record, raw, lease_ends, alone=False)

    def _refuse(self, model: str, job_id: str | None, problem: str, raw: bytes, step: int) -> None:
        records = self._records
        records.bury(model, raw, problem, job_id, step=step)
        if job_id is None:
            return
        record = records.get(job_id)
        if record is None:
            record = records.by_id[job_id] = Record(model, "default", records.now())
            records.queue(model).queued["default"] += 1
        if record.state is State.QUEUED:
            records.end(job_id, record, State.FAILED, Failure(code="malformed", message=problem))
            records.queue(model).drop_message(job_id)

    def _meet_without_record(self, model: str, job_id: str, raw: bytes, step: int) -> None:
        if job_id in self._records.queue(model).left:
            self._records.queue(model).drop_message(job_id)
        else:
            reason = "its record is gone: expired, or a late duplicate"
            self._records.bury(model, raw, reason, job_id, step=step)

    def _lease(self, job_id: str, record: Record, raw: bytes, lease_ends: int, *, alone: bool) -> Claimed:
        now = self._records.now()
        record.state, record.message, record.alone, record.lease_ends = State.RUNNING, raw, alone, lease_ends
        record.attempt += 1
        record.claimed = record.claimed or now
        lease = Lease(job_id, record.attempt)
        return Claimed(lease, raw, record.tenant, record.enqueued, record.deadline, tuple(record.chunks))


def _is_cut(jobs: Sequence[Claimed], num_bytes: int) -> bool:
    return len(jobs) >= CLAIM_JOBS or num_bytes >= CLAIM_BYTES


def _num_bytes(claimed: Claimed) -> int:
    return len(claimed.message) + sum(len(journal.encode_chunk(chunk)) for chunk in claimed.journal)

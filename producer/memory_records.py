"""What the memory twin keeps of jobs and queues, and how a job ends, goes back or is handed on: as record.lua does."""

import re
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from .memory_letters import Letters
from .names import STEPS
from .rules import Rules
from .schema import Chunk, Failure, Result, State
from .store import Lease, Outcome

LOOKED_AT, LOOKED_PAST, LOOKED_BYTES = 1000, 32, 4 * 2**20  # as in record.lua
_ID = re.compile(rb'\{"body": "[A-Za-z0-9+/=]*", .*?"headers": \{.*?"id": "([\w.:-]+)"', re.DOTALL | re.ASCII)


@dataclass
class Record:
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
class Queue:
    """One model's lists: the right end of each is served next."""

    lists: dict[int, deque[bytes]] = field(default_factory=lambda: {step: deque() for step in STEPS})
    suspects: deque[str] = field(default_factory=deque)
    queued: Counter[str] = field(default_factory=Counter)  # by tenant; foreign messages belong to none yet
    left: dict[str, str] = field(default_factory=dict)  # id and tenant of jobs that ended queued: their messages stay
    turn: int = 0
    holder: tuple[str, int] | None = None  # who makes room for suspects, or tries the last few; until when
    rooms: dict[str, tuple[int, int]] = field(default_factory=dict)  # group -> when it said so, rows that are free
    beaten: int = 0  # when a group last said that it is alive; 0: none of its groups was ever ready

    @property
    def known(self) -> bool:
        return self.beaten > 0

    @property
    def num_messages(self) -> int:
        """With those of ended jobs; suspects among them."""
        return sum(map(len, self.lists.values())) + len(self.suspects)

    @property
    def depth(self) -> int:
        return self.num_messages - len(self.left)

    def num_messages_of(self, tenant: str) -> int:
        """Of foreign clients none is, until it is read."""
        return self.queued[tenant] + sum(whose == tenant for whose in self.left.values())

    def drop_message(self, job_id: str) -> None:
        """The message of a job that had ended while it was queued was met."""
        self.left.pop(job_id, None)


class Records:
    """All jobs, queues and dead letters of one store.  Whoever calls holds the store's lock."""

    def __init__(self, rules: Rules, clock: Callable[[], float] = time.time) -> None:
        self.rules = rules
        self.by_id: dict[str, Record] = {}
        self.queues: dict[str, Queue] = {}
        self.letters = Letters()
        self._clock = clock

    def now(self) -> int:
        return int(self._clock() * 1000)

    def queue(self, model: str) -> Queue:
        return self.queues.setdefault(model, Queue())

    def get(self, job_id: str) -> Record | None:
        """The record unless its time is over."""
        record = self.by_id.get(job_id)
        if record is None or record.finished is None:
            return record
        age = self.now() - record.finished
        if age >= self.rules.journal_ttl_s * 1000:
            record.chunks = []
        if age >= self.rules.result_ttl_s * 1000:
            del self.by_id[job_id]
            return None
        return record

    def visible(self, job_id: str, tenant: str | None) -> Record | None:
        record = self.get(job_id)
        return record if record is not None and tenant in (None, record.tenant) else None

    def ours(self, lease: Lease) -> Record | None:
        record = self.get(lease.job_id)
        ours = record is not None and record.state is State.RUNNING and record.attempt == lease.attempt
        return record if ours else None

    def overdue(self, record: Record) -> bool:
        return record.overdue(self.now(), round(self.rules.deadline_grace_s * 1000))

    def default_deadline(self, now: int) -> int:
        return now + round(self.rules.default_deadline_s * 1000)

    def drop_dead(self, queue: Queue) -> None:
        """As record.lua does."""
        looked = num_bytes = 0
        for step in STEPS if queue.left else ():
            waiting, past = queue.lists[step], 0
            while looked < LOOKED_AT and num_bytes < LOOKED_BYTES and past <= LOOKED_PAST and past < len(waiting):
                raw = waiting[-1 - past]
                looked, num_bytes = looked + 1, num_bytes + len(raw)
                found = _ID.match(raw)
                job_id = found[1].decode() if found else ""
                if job_id in queue.left and ((record := self.get(job_id)) is None or record.state.terminal):
                    del waiting[-1 - past]
                    queue.drop_message(job_id)
                else:
                    past += 1
        if not any(queue.lists.values()):
            queue.left.clear()

    def end(
        self, job_id: str, record: Record, state: State, failure: Failure | None, result: Result | None = None
    ) -> None:
        queue = self.queue(record.model)
        if record.state is State.QUEUED:
            queue.queued[record.tenant] -= 1
            if job_id in queue.suspects:
                queue.suspects.remove(job_id)
            else:
                queue.left[job_id] = record.tenant
        record.state, record.failure, record.result = state, failure, result
        record.message, record.alone, record.cancel, record.suspicion = None, False, False, 0
        record.finished = self.now()

    def end_cancelled(self, job_id: str, record: Record) -> None:
        self.end(job_id, record, State.CANCELLED, Failure(code="cancelled", message="the job was cancelled"))

    def damaged(self, job_id: str, record: Record) -> None:
        text = "its message in Redis is gone or was damaged; send the job anew"
        self.end(job_id, record, State.FAILED, Failure(code="damaged", message=text))

    def expire(self, job_id: str, record: Record) -> None:
        text = f"its deadline passed while it was {record.state.value}"
        self.end(job_id, record, State.EXPIRED, Failure(code="expired", message=text))

    def crashed(self, job_id: str, record: Record) -> str:
        charged = record.attempt - record.free
        if record.cancel:
            self.end_cancelled(job_id, record)
            return "cancelled"
        if record.alone or charged >= self.rules.max_attempts:
            code, text = "too_many_attempts", f"gave up after {charged} attempts"
            if record.alone:
                code, text = "poison", "its group died twice while it ran, the last time with nothing beside it"
            self.bury(record.model, record.message or b"", code, job_id, tenant=record.tenant, step=record.step)
            self.end(job_id, record, State.FAILED, Failure(code=code, message=text))
            return "poison"
        record.state = State.QUEUED
        record.suspicion += 1
        self.queue(record.model).queued[record.tenant] += 1
        self.queue(record.model).suspects.appendleft(job_id)
        return "suspect"

    def drained(self, job_id: str, record: Record) -> None:
        if record.cancel:
            self.end_cancelled(job_id, record)
            return
        if record.message is None:
            self.damaged(job_id, record)
            return
        record.state = State.QUEUED
        record.free += 1
        queue = self.queue(record.model)
        queue.queued[record.tenant] += 1
        if record.alone:
            queue.suspects.append(job_id)
        else:
            queue.lists[record.step].append(record.message)
            record.message = None

    def bury(
        self,
        model: str,
        raw: bytes,
        reason: str,
        job_id: str | None,
        *,
        tenant: str | None = None,
        step: int | None = None,
    ) -> str:
        record = self.get(job_id) if job_id else None
        whose = tenant or (record.tenant if record else "default")
        where = step if step is not None else record.step if record else 0
        return self.letters.bury(model, raw, reason, job_id, tenant=whose, step=where, now=self.now(), rules=self.rules)

    def clean(self, job_id: str, model: str, tenant: str, *, rows: int) -> bool:
        """A record as of a job that was never run, for a replay; False if the job has not ended."""
        old = self.get(job_id)
        if old is not None and not old.state.terminal:
            return False
        now, metadata = self.now(), old.metadata if old else {}
        whose, deadline = old.tenant if old else tenant, self.default_deadline(now)
        new = Record(model, whose, now, deadline=deadline, metadata=metadata, rows=rows)
        new.attempt = new.free = old.attempt if old else 0
        self.by_id[job_id] = new
        self.queue(model).queued[new.tenant] += 1
        return True

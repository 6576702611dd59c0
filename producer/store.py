"""The Store seam: every promise about queues, leases and results is kept behind these calls.

Two parts keep it: `redis_store.RedisStore` (one Lua call each) and `memory.MemoryStore` (the shipped test twin).
Job states: queued -> running -> succeeded | failed | cancelled | expired; terminal is written once.
All times are Redis's clock.  Methods raise `StoreUnavailable` when Redis does not answer; nothing is then half-written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from .schema import Chunk, Failure, Job, Result, State, Status


@dataclass(frozen=True, slots=True)
class Lease:
    """The time-limited right to finish one job.  `attempt` is the fencing token."""

    job_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Claimed:
    """One job taken off the queue, lease recorded in the same call."""

    lease: Lease
    message: bytes  # the Celery protocol-2 message as it was pushed
    tenant: str
    enqueued_ms: int
    deadline_ms: int | None
    journal: tuple[Chunk, ...] = ()  # tokens accepted by earlier attempts, in order
    damage: str | None = None  # why it can never run: end it with code `damaged`


class ClaimMode(StrEnum):
    """How the claimed jobs must be run, see docs/decisions on poison jobs."""

    TOGETHER = "together"  # batch freely
    SHARED = "shared"  # the same; what is left in the queue is other groups' share, for a moment
    ALONE = "alone"  # exactly one suspect: run it with nothing beside it until it is cleared or done
    DRAIN = "drain"  # a suspect waits for this group: claim no more, finish what runs, then claim again


@dataclass(frozen=True, slots=True)
class Claim:
    """The reply of one claim call."""

    mode: ClaimMode
    jobs: tuple[Claimed, ...]
    now_ms: int
    full_run_alone: bool = False  # with ALONE: the suspect was involved in two crashes and stays alone to its end
    more: bool = False  # one reply holds no more than these: ask again at once


@dataclass(frozen=True, slots=True)
class Append:
    """Tokens to add to a job's journal: chunk.index must equal the number of tokens already there."""

    lease: Lease
    chunk: Chunk


@dataclass(frozen=True, slots=True)
class Signals:
    """What the store tells a leader about its live jobs."""

    cancelled: frozenset[str] = frozenset()
    lost: frozenset[str] = frozenset()  # no longer ours: stop at once, a commit would be FENCED


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one attempt ended.  state is terminal; a result goes with SUCCEEDED, a failure with the other three.  `rest`
    is what the journal still lacks; it is written in the same call."""

    lease: Lease
    state: State
    result: Result | None = None
    failure: Failure | None = None
    rest: Chunk | None = None


class Verdict(StrEnum):
    """What the store made of a commit."""

    COMMITTED = "committed"
    FENCED = "fenced"  # another attempt owns the job, or it is terminal already: nothing was changed


class ReleaseReason(StrEnum):
    """Why a leader hands a job back before it is done."""

    DRAINED = "drained"  # shutdown or rejection: attempt not charged, no suspicion
    CRASHED = "crashed"  # the group died while the engine held the job: it becomes a suspect


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What one sweep did."""

    requeued: tuple[str, ...] = ()
    expired: tuple[str, ...] = ()
    poisoned: tuple[str, ...] = ()
    now_ms: int = 0  # when, on the store's clock
    damage: tuple[str, ...] = ()  # keys that it passed by or dropped, each with what is wrong with it


@dataclass(frozen=True, slots=True)
class Receipt:
    """An accepted job: durable when this is returned.  `duplicate`: it was known already, nothing was added."""

    job_id: str
    duplicate: bool = False


@dataclass(frozen=True, slots=True)
class GroupBeat:
    """What a group says of itself every second; `info` is a small JSON-ready dict for people."""

    group: str
    model: str
    running: int
    capacity: int
    epoch: int
    state: str  # starting | ready | draining | stopping | restarting | down; gone: it takes its leave
    info: dict[str, Any] = field(default_factory=dict)
    room: int = 0  # rows that are free for jobs


@dataclass(frozen=True, slots=True)
class Holder:
    """The leader that has a group's name.  Pids can be compared between holders of one `place`."""

    group: str
    host: str
    pid: int
    place: str  # machine, boot and namespace of processes
    born: str  # when the process was made, by that machine's clock
    life: str  # of the process image
    renewals: int = 0


@dataclass(frozen=True, slots=True)
class QueueInfo:
    """One model's queue."""

    model: str
    depth: int
    oldest_age_s: float | None
    running: int
    suspects: int
    groups: tuple[GroupBeat, ...]  # only those alive


LETTER_HEAD_BYTES = 512
LETTER_CUT_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that can never run, or a job that took groups down."""

    letter_id: str
    model: str
    job_id: str | None
    reason: str
    message: bytes  # in a list: the first LETTER_HEAD_BYTES
    buried_ms: int
    message_bytes: int  # as it came; of a message above the limit only the first LETTER_CUT_BYTES are kept


class Store(Protocol):
    """What producers, leaders and the API ask of the store."""

    # producers
    def enqueue(self, jobs: Sequence[Job], *, job_ids: Sequence[str] | None = None) -> list[Receipt]:
        """Accept all jobs (one round trip per few hundred) or raise; order is kept.

        Raises QueueFull, UnknownModel, IdempotencyConflict, StoreUnavailable, StoreUnsuitable.  A call that raises
        wrote nothing of the batch (round trip) that it concerns; `index` of the error names the first refused job,
        `job_id` too, if the caller gave the ids.
        """

    def cancel(self, job_ids: Sequence[str], *, tenant: str | None = None) -> list[State | None]:
        """Ask for cancellation: queued jobs end at once, running ones within a renewal.  The state after the call;
        None for ids that are unknown (or of another tenant; tenant None sees all)."""

    def statuses(self, job_ids: Sequence[str], *, tenant: str | None = None) -> list[Status | None]:
        """One call for many ids.  A queued or abandoned job past its deadline reads as expired (and is written so)."""

    def ended(self, job_ids: Sequence[str], *, tenant: str | None = None) -> list[str]:
        """Those of these ids that need not be waited for: terminal, or unknown to the tenant.  In the order asked; much
        cheaper than `statuses`, whose rule for deadlines holds here too."""

    def issued(self, job_id: str, *, tenant: str) -> bool:
        """True when the id was issued to this tenant, whether its record still exists or not: gone, not unknown."""

    def chunks(self, job_id: str, *, after: int = 0) -> list[Chunk]:
        """Journal from token `after` on, without waiting.  A chunk that straddles `after` is cut to start there (its
        text stays whole).  JobFailed with reason `damaged` where the journal is."""

    # leaders
    def claim(self, model: str, *, owner: str, limit: int, lease_s: float, idle: bool, surplus: int = 0) -> Claim:
        """Pop jobs for up to `limit` rows and record their leases, atomically.  `idle`: the group runs nothing now.

        A job takes a row for each of its answers; the last one may go beyond the limit.  Where other groups have said
        (`GroupBeat.room`) that they have free rows too, what is queued is shared by these, and `surplus`, that part of
        the limit for which there is no row yet, is claimed only of what is too much for all of them."""

    def append(self, appends: Sequence[Append]) -> Signals:
        """Journal the tokens of one step for all jobs.  Stale attempts change nothing and come back lost."""

    def renew(self, leases: Sequence[Lease], *, owner: str, lease_s: float) -> Signals:
        """Extend all leases in one call."""

    def commit(self, outcomes: Sequence[Outcome]) -> list[Verdict]:
        """End attempts: record, Celery result, lease and publication in one fenced call."""

    def release(self, leases: Sequence[Lease], *, reason: ReleaseReason) -> None:
        """Hand jobs back to the head of the queue at once (journal kept)."""

    def clear(self, lease: Lease) -> None:
        """The suspect got past the point where its group died: it may be batched again."""

    def beat(self, beat: GroupBeat) -> None:
        """Say that the group is alive; makes the model known."""

    def hold(self, holder: Holder, *, replacing: str = "") -> Holder | None:
        """Take a group's name, or keep it for as long as a beat counts.  None if it is ours, else who has it.
        `replacing`: a life that is known to be over, whose name may be taken at once."""

    def let_go(self, holder: Holder) -> None:
        """Give the name up, if it is ours."""

    # anybody
    def sweep(self, *, limit: int = 1000, expired_before_ms: int | None = None) -> SweepReport:
        """Return expired leases to the queue, end jobs past their deadline.  Only leases that ended before
        `expired_before_ms` (default: now) count as expired; see `sweeper.Sweeper` for who may say so."""

    def queues(self) -> list[QueueInfo]:
        """Every known model's queue."""

    def bury(self, model: str, message: bytes, *, reason: str, job_id: str | None = None) -> str:
        """Put a message to the dead letters; returns the letter's id."""

    def dead_letters(self, *, limit: int = 100, before: str | None = None) -> list[DeadLetter]:
        """Newest first, each with the first bytes of its message."""

    def count_dead_letters(self) -> int:
        """How many there are, of all models."""

    def dead_letter(self, letter_id: str) -> DeadLetter | None:
        """One letter with all that was kept of its message; None if there is none."""

    def replay(self, letter_ids: Sequence[str]) -> list[str]:
        """Send dead letters to their queue again with a clean record; the job ids ("" where a letter has none).
        An unknown letter raises UnknownJob, one that was not kept whole BadRequest, and then nothing is replayed."""

    def check(self, *, for_submits: bool = False) -> None:
        """Raise StoreUnsuitable with the reason unless this server is safe to queue on; StoreUnavailable if away, and
        with `for_submits` also if an enqueue would be refused now, because memory is short or no writes are taken."""

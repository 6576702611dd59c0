"""When to claim, and how much: the pace of an idle leader, suspects that must run alone, and room in the engine."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from hortator.producer.errors import StoreUnavailable
from hortator.producer.store import Claim, ClaimMode, Lease, Store

from .engine.step import EngineInfo, EngineStats
from .link import Link
from .settings import WorkerSettings

# How soon a queue is asked again that gave less than there was room for: while jobs arrive, a little later, idle.
EAGER_POLL_S, BUSY_POLL_S, IDLE_POLL_S = 0.002, 0.005, 0.020
EAGER_FOR_S, BUSY_FOR_S = 0.05, 2.0
# How often a group without room asks whether it must make room for a suspect, and how long it goes on hoping that
# another group takes the suspect, or that its own jobs end.
LOOK_S, GIVE_WAY_S = 0.2, 0.4
OVERCLAIM = 0.25  # of max_num_seqs: the surplus
SHARED_S = 1.5 * IDLE_POLL_S  # so long the others have to come for their share of the queue


class Room(NamedTuple):
    """For how many rows to claim."""

    free: int  # nothing takes them yet
    surplus: int  # whose jobs wait inside the engine, so that a row that is freed is refilled at once

    @property
    def limit(self) -> int:
        return self.free + self.surplus


NO_ROOM = Room(0, 0)


@dataclass(slots=True)
class _Alone:
    """A suspect that runs with nothing beside it."""

    lease: Lease
    to_its_end: bool


class Claimer:
    """Asks the store for jobs of one queue."""

    def __init__(self, store: Store, link: Link, settings: WorkerSettings, *, clock: Callable[[], float]) -> None:
        self.at = self._look_at = clock()  # not to be asked before, with room and without
        self._store = store
        self._link = link
        self._settings = settings
        self._clock = clock
        self._last_job_at = float("-inf")
        self._alone: _Alone | None = None
        self._asked_at: float | None = None  # since when a suspect has been waiting for this group to be empty
        self._redis_minus_clock_ms = 0.0
        self.step_s = 0.0  # how long the engine takes for a step
        self._last_step, self._stepped_at = 0, clock()

    @property
    def must_give_way(self) -> bool:
        """A suspect has waited long enough for what runs here to end."""
        return self._asked_at is not None and self._clock() - self._asked_at >= GIVE_WAY_S

    def room(self, num_rows: int, info: EngineInfo, stats: EngineStats | None) -> Room:
        """What to claim now beside the jobs that take, or will take, `num_rows`."""
        if self._alone or (self._asked_at is not None and num_rows):
            return NO_ROOM
        spare = max(1, int(info.max_num_seqs * OVERCLAIM))
        if stats and stats.waiting >= spare:
            return NO_ROOM  # rows are free, but not the KV blocks to fill them
        left = info.max_num_seqs + spare - num_rows
        if left < (spare + 1) // 2:
            return NO_ROOM  # enough jobs wait in the engine: fewer, larger claims
        free = max(0, info.max_num_seqs - num_rows)
        return Room(free, left - free)

    def claim(self, room: Room, *, idle: bool, crowded: bool) -> Claim | None:
        """Jobs for that room; None if it is too early to ask, or Redis is away.  `crowded`: better many than soon.

        Without room it asks now and then all the same: a suspect may be waiting for room to be made."""
        now = self._clock()
        if self._alone or now < (self.at if room.limit else self._look_at):
            return None
        self._look_at = now + LOOK_S
        try:
            claim = self._ask(room, idle=idle)
        except StoreUnavailable:
            self.at = now + IDLE_POLL_S
            return None
        if claim.jobs:
            self._last_job_at = now
        if claim.more:
            self.at = now
        elif claim.mode is ClaimMode.SHARED:
            self.at = now + SHARED_S
        elif len(claim.jobs) < room.limit:
            self.at = now + self._pause_s(now - self._last_job_at, idle=idle, crowded=crowded)
        return claim

    def stepped(self, step: int) -> None:
        """The engine has reported this step: a job can only enter between two of them."""
        now = self._clock()
        if step > self._last_step:
            self.step_s = (now - self._stepped_at) / (step - self._last_step)
        self._last_step, self._stepped_at = step, now

    def clock_of(self, redis_ms: int) -> float:
        """A time of Redis on the front's clock."""
        return (redis_ms - self._redis_minus_clock_ms) / 1000

    def suspect(self) -> Lease | None:
        """The job that must pass its probation, if one runs alone for that."""
        return self._alone.lease if self._alone and not self._alone.to_its_end else None

    def let_join(self, lease: Lease) -> None:
        """This job is cleared, or has left: others may be claimed."""
        if self._alone and self._alone.lease == lease:
            self._alone = None

    def _ask(self, room: Room, *, idle: bool) -> Claim:
        settings = self._settings
        claim = self._link.call(
            self._store.claim,
            settings.queue,
            owner=settings.group,
            limit=room.limit,
            lease_s=settings.lease_s,
            idle=idle,
            surplus=room.surplus,
        )
        self._redis_minus_clock_ms = claim.now_ms - self._clock() * 1000
        self._asked_at = (self._asked_at or self._clock()) if claim.mode is ClaimMode.DRAIN else None
        if claim.mode is ClaimMode.ALONE:
            self._alone = _Alone(claim.jobs[0].lease, claim.full_run_alone)
        return claim

    def _pause_s(self, since_job_s: float, *, idle: bool, crowded: bool) -> float:
        if since_job_s >= BUSY_FOR_S:
            return IDLE_POLL_S
        if since_job_s < EAGER_FOR_S and not crowded:
            return EAGER_POLL_S
        return BUSY_POLL_S if idle else min(max(BUSY_POLL_S, self.step_s / 2), IDLE_POLL_S)

"""Jobs between the store and the engine, in the leader.  Knows nothing of Celery, and never waits.

    take -> open -> admit -> (engine) -> on_events -> flush          tick: renew, deadlines, beat, sweep

Whoever drives it calls `on_events` when the group has something, `tick` when `wake_in` has passed, and after either
`take`, then `open` and `admit` for what was taken, and `flush`.
"""

import contextlib
import dataclasses
import heapq
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from hortator.producer.errors import (
    BadRequest,
    HortatorError,
    PromptTooLong,
    StoreForbidden,
    StoreUnavailable,
    StoreUnsuitable,
)
from hortator.producer.schema import Failure, FinishReason, Job, State
from hortator.producer.store import Claimed, ClaimMode, GroupBeat, Lease, Outcome, ReleaseReason, Store, Verdict
from hortator.producer.sweeper import Sweeper

from .claimer import NO_ROOM, Claimer, Room
from .engine.step import EngineInfo, EngineStats, Finish, Request
from .envelope import Envelope, job_of, open_envelope
from .gauges import Gauges
from .group import Event, Group, Ready, Stepped
from .intake import Damaged, prepare
from .link import Link
from .live import Live, Strand
from .outbox import Delivery, Letter, Outbox
from .refusals import Refusals
from .settings import WorkerSettings
from .supervisor import Down
from .tenure import Tenure
from .text import Text

logger = logging.getLogger("hortator.front")

JOURNAL_EVERY_S, LONGEST_JOURNAL_S = 0.03, 0.25
JOURNAL_ENTRIES_PER_S = 250  # a chunk costs Redis, the front and every reader the same, however many tokens it holds
BEAT_EVERY_S = 1.0
RENEW_EVERY_S, SWEEP_EVERY_S = 0.5, 0.25  # what a dead leader ran goes on elsewhere a lease and two sweeps later
CROWDED_DELIVERY_S, LONGEST_DELIVERY_S = 0.004, 0.02  # a well filled group tells Redis of results at most this often
MIN_DEADLINES = 64  # that are kept before those of ended jobs are thrown out
LONGEST_SLEEP_S = 0.05  # a revoke or a rejection by Celery comes between two turns, and waits no longer than this

_REASONS = {Finish.STOP: FinishReason.STOP, Finish.LENGTH: FinishReason.LENGTH}


class Watcher(Protocol):
    """Who wants to know what becomes of the jobs: the pool, on behalf of Celery."""

    def ended(self, outcome: Outcome, verdict: Verdict) -> None:
        """The store has the outcome, or refused it because the job is no longer ours."""

    def gone(self, lease: Lease, reason: str) -> None:
        """The job left without an outcome: handed back, or lost."""


class Front:
    """One model group's jobs.  All methods are called in one thread."""

    def __init__(
        self,
        store: Store,
        group: Group,
        text: Text,
        settings: WorkerSettings,
        *,
        watcher: Watcher,
        clock: Callable[[], float] = time.monotonic,
        journal_every_s: float = JOURNAL_EVERY_S,
    ) -> None:
        self.fatal: str | None = None  # why this worker can never serve: exit
        self._store = store
        self._group = group
        self._text = text
        self._settings = settings
        self._queue = settings.queue
        self._watcher = watcher
        self._clock = clock
        self._link = Link(clock)
        self._claimer = Claimer(store, self._link, settings, clock=clock)
        self._outbox = Outbox(store, model=self._queue)
        self._tenure = Tenure(store, self._link, settings.group, clock=clock)
        self._sweeper = Sweeper(store, settings.lease_s, clock=clock)
        self._gauges = Gauges(group, clock)
        self._refusals = Refusals(clock)
        self._handles = itertools.count(1)
        self._info: EngineInfo | None = None  # of the group that is up
        self._stats: EngineStats | None = None
        self._taken: dict[str, Claimed] = {}  # claimed, not admitted yet
        self._live: dict[str, Live] = {}  # the engine has them
        self._by_handle: dict[int, tuple[Live, Strand]] = {}  # the strands that the engine works on
        self._unjournalled: set[Live] = set()
        self._admits: list[Request] = []
        self._cancels: list[int] = []
        self._deadlines: list[tuple[float, int, Outcome]] = []  # (when, tie breaker, how it ends)
        self._sound = False  # this Redis loses no job
        self._draining = False
        self._ending = ""  # stopping or restarting: nothing calls it back
        self._unwanted = False  # Celery was told to consume nothing
        self._journal_every_s = journal_every_s
        self._renew_every_s = min(settings.lease_s / 3, RENEW_EVERY_S)
        self._claimed_at = self._beat_at = self._sweep_at = self._renew_at = self._deliver_at = clock()
        self._journal_at = self._first_tokens_at = self._ticked_at = self._beat_at

    # ---- what others may know

    @property
    def state(self) -> str:
        if self._ending:
            return self._ending
        if self._draining or self._unwanted:
            return "draining"
        if self._info is not None:
            return "ready"
        return "down" if self._group.last_failure else "starting"

    @property
    def capacity(self) -> int:
        """Rows of the engine, whether or not it is up."""
        return self._info.max_num_seqs if self._info else self._settings.max_num_seqs

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def _crowded(self) -> bool:
        """The engine is well filled: fewer, larger calls to Redis matter more than the last millisecond."""
        return 2 * len(self._live) >= self.capacity

    @property
    def busy(self) -> bool:
        """Something runs, or the store must still be told of something."""
        return bool(self._live or self._taken or self._outbox)

    def details(self) -> dict[str, Any]:
        """For people: the beat, `inspect stats`."""
        return self._gauges.read(self._stats) | {"redis_away": self._link.away}

    def beat(self) -> GroupBeat:
        return GroupBeat(
            group=self._settings.group,
            model=self._queue,
            running=len(self._live),
            capacity=self.capacity,
            epoch=self._group.epoch,
            state=self.state,
            info=self.details()
            | {name: getattr(self._tenure.holder, name) for name in ("host", "pid", "born")}
            | {"grace_s": self._settings.grace_s},
            room=self.room().free,
        )

    # ---- from the store to the engine

    def _may_claim(self) -> bool:
        return self.state == "ready" and self._entitled and self._group.steady

    @property
    def _entitled(self) -> bool:
        """This Redis loses no job, and the group's name is ours."""
        return self._sound and self._tenure.held

    def room(self) -> Room:
        """For how many rows to claim now."""
        if self._info is None or not self._may_claim():
            return NO_ROOM
        return self._claimer.room(self._num_rows, self._info, self._stats)

    @property
    def _num_rows(self) -> int:
        """That jobs take, or will."""
        return len(self._by_handle) + len(self._taken)

    def take(self) -> Sequence[Claimed]:
        """Claim what there is room for, if it is time to ask."""
        if not self._may_claim():
            return ()
        before, idle = self._clock(), not self._live
        claim = self._claimer.claim(self.room(), idle=idle and self._group_empty, crowded=self._crowded)
        if claim is None:
            return ()
        if claim.mode is ClaimMode.DRAIN:
            self._step_aside()
        if not claim.jobs:
            return ()
        if idle:
            self._renew_at = before + self._renew_every_s
        self._claimed_at = before
        self._taken.update((claimed.lease.job_id, claimed) for claimed in claim.jobs)
        return claim.jobs

    @property
    def _group_empty(self) -> bool:
        """Also of what has ended or left here: a suspect that runs alone is convicted if the group dies."""
        return self._group.empty and not self._cancels

    def _step_aside(self) -> None:
        """The next suspect waits for an empty group: those that have just been cleared go on after it, not before.

        Others have a moment to end by themselves, and then go on after it too, here or elsewhere."""
        if not self._live:
            return
        if all(live.cleared for live in self._live.values()):
            self.hand_back(reason="cleared; the next suspect waits")
        elif self._claimer.must_give_way:
            logger.info("%d jobs go back for a while: jobs of a dead group must run alone first", len(self._live))
            self.hand_back(reason="it makes room for a suspect")

    def open(self, claimed: Claimed) -> Envelope | None:
        """The message's envelope; None if it is not one of ours, and then it is buried and its job has failed, or if
        what the store keeps of its job is damaged."""
        if claimed.damage is not None:
            self._fail(claimed, Damaged(claimed.damage))
            return None
        try:
            return open_envelope(claimed.message)
        except BadRequest as error:
            self._refuse(claimed, error)
        except Exception as error:
            # Whatever it is, the job must end here: as long as it is neither open nor refused nothing else is claimed.
            logger.exception("job %s cannot be opened", claimed.lease.job_id)
            self._refuse(claimed, HortatorError(f"internal error: {type(error).__name__}"))
        return None

    def admit(self, claimed: Claimed, envelope: Envelope) -> bool:
        """Give the job to the engine; False if it ended or left at once."""
        if self._info is None:
            self.hand_back([claimed.lease], reason="the group is down")
            return False
        try:
            live, requests = self._prepare(claimed, envelope, self._info)
        except BadRequest as error:
            self._refuse(claimed, error)
            return False
        except Damaged as error:
            self._fail(claimed, error)
            return False
        except Exception as error:
            # A fault of ours that one job brings out must not end the worker and all other jobs with it.
            logger.exception("job %s cannot be prepared", claimed.lease.job_id)
            self._refuse(claimed, HortatorError(f"internal error: {type(error).__name__}"))
            return False
        self._enter(live)
        if live.done:  # the attempt before died between its last token and its commit
            self._succeed(live)
            return False
        self._admits += requests
        return True

    def _prepare(self, claimed: Claimed, envelope: Envelope, info: EngineInfo) -> tuple[Live, list[Request]]:
        job = job_of(envelope, model=self._queue)
        prepared = prepare(job, claimed, handles=self._handles, text=self._text, info=info, now=self._claimed_at)
        self._arm(claimed, job, envelope)
        return prepared

    def _enter(self, live: Live) -> None:
        job_id = live.lease.job_id
        self._taken.pop(job_id, None)
        if job_id in self._live:  # we lost its lease without noticing, and have now got it again
            self._lose(self._live[job_id], "another attempt owns it")
        self._live[job_id] = live
        self._by_handle.update((strand.handle, (live, strand)) for strand in live.strands if strand.reason is None)

    def _arm(self, claimed: Claimed, job: Job, envelope: Envelope) -> None:
        deadline_ms = claimed.deadline_ms
        if job.deadline_s is not None:  # of a plain Celery client's job only the body knows it
            asked_ms = claimed.enqueued_ms + math.ceil(job.deadline_s * 1000)
            deadline_ms = asked_ms if deadline_ms is None else min(deadline_ms, asked_ms)
        if deadline_ms is not None:
            failure = Failure(code="expired", message="the deadline passed before the job was finished")
            self._end_at(self._claimer.clock_of(deadline_ms), Outcome(claimed.lease, State.EXPIRED, failure=failure))
        if envelope.time_limit_s is not None:
            failure = Failure(code="time_limit", message=f"the time limit of {envelope.time_limit_s:g} s is over")
            self._end_at(self._clock() + envelope.time_limit_s, Outcome(claimed.lease, State.FAILED, failure=failure))

    def _end_at(self, at: float, outcome: Outcome) -> None:
        heapq.heappush(self._deadlines, (at, next(self._handles), outcome))
        if len(self._deadlines) > 2 * (len(self._live) + len(self._taken)) + MIN_DEADLINES:
            self._forget_deadlines()

    def _forget_deadlines(self) -> None:
        """Of jobs that have ended: theirs may be days away."""
        here = self._live.keys() | self._taken.keys()
        self._deadlines = [entry for entry in self._deadlines if entry[2].lease.job_id in here]
        heapq.heapify(self._deadlines)

    def refuse(self, lease: Lease, reason: str) -> None:
        """Celery can do nothing with a message that was taken."""
        claimed = self._taken.get(lease.job_id)
        if claimed is not None and claimed.lease == lease:
            self._refuse(claimed, BadRequest(reason))

    def _refuse(self, claimed: Claimed, error: HortatorError) -> None:
        """The job has failed; a message that should never have been sent is kept in the dead letters."""
        lease = claimed.lease
        if not isinstance(error, PromptTooLong):  # a sound message: another group may have room for it
            self._outbox.bury(Letter(claimed.message, error.message, lease.job_id))
        self._fail(claimed, error)

    def _fail(self, claimed: Claimed, error: HortatorError) -> None:
        job_id = claimed.lease.job_id
        self._refusals.note(job_id, error.code)
        self.end(job_id, State.FAILED, Failure(code=error.code, message=error.message))

    # ---- from the engine to the store

    def on_events(self, events: Iterable[Event]) -> None:
        """Take what the group reports."""
        for event in events:
            match event:
                case Stepped():
                    self._stepped(event)
                case Ready():
                    self._ready(event)
                case Down():
                    self._down(event)

    def _ready(self, event: Ready) -> None:
        info = self._info = event.info
        self._stats = None
        self._claimer.at = self._beat_at = self._clock()  # from this beat on the model takes jobs
        logger.info(
            "group %s is ready after %.1f s%s: %s, epoch %d, %d sequences of up to %d tokens",
            self._settings.group, event.start_s, _spent(event), self._queue, event.epoch,
            info.max_num_seqs, info.max_model_len,
        )  # fmt: skip

    def _stepped(self, event: Stepped) -> None:
        report = event.report
        self._stats = report.stats
        self._gauges.count(report.step, sum(len(gain.token_ids) for gain in report.gains))
        self._claimer.stepped(report.step)
        for handle, token_ids, logprobs, tops in report.gains:
            found = self._by_handle.get(handle)
            if found is None:
                continue  # cancelled, or ended by a stop string, a step or two ago
            live, strand = found
            self._unjournalled.add(live)
            if strand.output.feed(token_ids, logprobs, tops):
                self._leave_engine(strand)
                self._finish(live, strand, FinishReason.STOP)
        for handle, finish in report.finished:
            if found := self._by_handle.pop(handle, None):
                self._finish(*found, _REASONS[finish])
        for fault in report.faults:
            if found := self._by_handle.pop(fault.handle, None):
                live, _ = found
                failure = Failure(code=fault.code, message=fault.message)
                self._end(live, Outcome(live.lease, State.FAILED, failure=failure))
        self._probation()

    def _probation(self) -> None:
        """A suspect that got beyond the point where its group died is cleared, and others may join it."""
        lease = self._claimer.suspect()
        live = self._live.get(lease.job_id) if lease else None
        if live and live.passed(self._settings.probation_tokens):
            self._outbox.clear(live.lease)
            self._claimer.let_join(live.lease)
            live.cleared = True

    def _down(self, event: Down) -> None:
        """The engine has lost everything: hand all jobs back with the tokens that they have."""
        if self._live:  # why, the supervisor has said
            logger.warning("group %s is down: %d jobs go back", self._settings.group, len(self._live))
        self._info = self._stats = None
        self._admits, self._cancels = [], []
        reason = ReleaseReason.DRAINED if event.by_pause else ReleaseReason.CRASHED
        self._return(list(self._live.values()), reason, "the group went down")
        if event.permanent:
            self.fatal = event.reason

    def _finish(self, live: Live, strand: Strand, reason: FinishReason) -> None:
        strand.end(reason)
        if live.done:
            self._succeed(live)

    def _succeed(self, live: Live) -> None:
        self._end(live, Outcome(live.lease, State.SUCCEEDED, result=live.result()))

    def end(self, job_id: str, state: State, failure: Failure) -> bool:
        """End a job of ours from outside: revoked, refused, timed out.  False if it is not here."""
        if live := self._live.get(job_id):
            self._end(live, Outcome(live.lease, state, failure=failure))
            return True
        claimed = self._taken.pop(job_id, None)
        if claimed is not None:
            self._outbox.commit(Outcome(claimed.lease, state, failure=failure))
            self._claimer.let_join(claimed.lease)
        return claimed is not None

    def cancel_elsewhere(self, job_id: str) -> None:
        """A job that was revoked is not here: it may be queued, or with another leader, who learns it by renewing."""
        try:
            self._link.call(self._store.cancel, [job_id])
        except StoreUnavailable:
            logger.warning("job %s is not cancelled: Redis is away", job_id)

    def _end(self, live: Live, outcome: Outcome) -> None:
        self._forget(live)
        chunks = live.take()
        for chunk in chunks[:-1]:
            self._outbox.append(live.lease, chunk)
        self._outbox.commit(replace(outcome, rest=chunks[-1]) if chunks else outcome)

    def _forget(self, live: Live) -> None:
        del self._live[live.lease.job_id]
        self._unjournalled.discard(live)
        self._claimer.let_join(live.lease)
        for strand in live.strands:
            self._leave_engine(strand)

    def _leave_engine(self, strand: Strand) -> None:
        """Unless it has left by itself."""
        if self._by_handle.pop(strand.handle, None) and self._info is not None:
            self._cancel(strand.handle)

    def _cancel(self, handle: int) -> None:
        """Tell the engine, unless it has never heard of the job."""
        unsent = [request for request in self._admits if request.handle != handle]
        if len(unsent) == len(self._admits):
            self._cancels.append(handle)
        self._admits = unsent

    # ---- handing back

    def drain(self) -> None:
        """Claim nothing more."""
        self._draining = True
        self._beat_at = self._clock()

    def stop(self, *, again: bool = False) -> None:
        """Claim nothing more, and say that the end is near; `again`: only of this life."""
        self._ending = "restarting" if again else "stopping"
        self.drain()

    def resume(self) -> None:
        """Claim again after `drain`; a group that stops goes on stopping."""
        self._draining = False
        self._beat_at = self._clock()

    def consume(self, wanted: bool) -> None:
        """Whether Celery takes jobs at all: its word, beside `drain` and `resume`, which are ours."""
        self._unwanted = not wanted
        self._beat_at = self._clock()

    def leave(self) -> None:
        """Tell the fleet that this group ends; without it the group would pass for alive a while longer."""
        self._refusals.flush()
        if not self._tenure.held:  # what beats under this name is another leader
            return
        with contextlib.suppress(StoreUnavailable):
            self._link.call(self._store.beat, dataclasses.replace(self.beat(), state="gone"))
            self._tenure.leave()

    def hand_back(self, leases: Iterable[Lease] | None = None, *, reason: str = "draining") -> None:
        """Return jobs (default: all) to the queue at once, with their tokens; the attempt is not charged."""
        wanted = {lease.job_id for lease in leases} if leases is not None else {*self._live, *self._taken}
        live = [live for job_id, live in self._live.items() if job_id in wanted]
        self._return(live, ReleaseReason.DRAINED, reason)
        for claimed in [claimed for job_id, claimed in self._taken.items() if job_id in wanted]:
            del self._taken[claimed.lease.job_id]
            self._claimer.let_join(claimed.lease)
            self._outbox.release([claimed.lease], ReleaseReason.DRAINED)
            self._watcher.gone(claimed.lease, reason)

    def _return(self, jobs: list[Live], reason: ReleaseReason, why: str) -> None:
        for live in jobs:
            self._forget(live)
            self._journal(live)
        self._outbox.release([live.lease for live in jobs], reason)
        for live in jobs:
            self._watcher.gone(live.lease, why)

    # ---- time

    def tick(self) -> None:
        """Everything that is due."""
        now = self._ticked_at = self._clock()
        self._expire(now)
        for due in (self._check, self._keep_leases, self._beat, self._sweep):
            with contextlib.suppress(StoreUnavailable):
                due(now)

    def wake_in(self) -> float:
        """Seconds until `tick`, `take` or `flush` has something to do."""
        now = self._clock()
        at = min(self._beat_at, self._ticked_at + LONGEST_SLEEP_S)
        if self._live:
            at = min(at, self._renew_at)
        if self._unjournalled:
            at = min(at, self._journal_at)
        if self._outbox:
            at = min(at, self._deliver_at)
        if self._deadlines:
            at = min(at, self._deadlines[0][0])
        if self.room().limit:
            at = min(at, self._claimer.at)
        return max(at - now, self._ticked_at + self._shortest_sleep_s - now, 0.0)

    @property
    def _shortest_sleep_s(self) -> float:
        """Steps of a well filled group bring turns, which do what is due by then: no need for turns between."""
        return LONGEST_SLEEP_S if self._crowded or self._link.away else 0.001

    def _check(self, _now: float) -> None:
        """Refuse a Redis that would lose jobs, and take the group's name, before the first claim."""
        if self._entitled:
            return
        try:
            if not self._sound:
                self._link.call(self._store.check)
        except (StoreUnsuitable, StoreForbidden) as error:
            self.fatal = error.message
        else:
            self._sound = True
            self._keep_name()

    def _keep_name(self) -> bool:
        """Whether it is ours; a leader that may not have its name must end."""
        held = self._tenure.keep()
        self.fatal = self.fatal or self._tenure.refusal
        return held

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            outcome = heapq.heappop(self._deadlines)[2]
            live = self._live.get(outcome.lease.job_id)
            if live is not None and live.lease == outcome.lease:
                self._end(live, outcome)

    def _keep_leases(self, now: float) -> None:
        """Renew every lease in one call; the reply brings cancels and losses."""
        leases = [live.lease for live in self._live.values()] + self._outbox.leases
        if not leases or now < self._renew_at:
            return
        try:
            signals = self._link.call(
                self._store.renew, leases, owner=self._settings.group, lease_s=self._settings.lease_s
            )
        except StoreUnavailable:
            self._cut_off(now)
            raise
        for live in self._live.values():
            live.leased_at = now
        self._renew_at = now + self._renew_every_s
        self._obey(signals.cancelled, signals.lost)

    def _cut_off(self, now: float) -> None:
        """Stop what we have had no right to run for long; somebody else may be running it already.

        If nobody is, because Redis was away for everybody, the hand-back arrives before any sweeper may call us dead
        (sweeper.py), and the job goes on uncharged: nothing crashed.  Otherwise the store fences it.
        """
        outage_s = self._settings.outage_s
        late = [live for live in self._live.values() if now - live.leased_at > outage_s]
        if late:
            logger.warning("%d leases could not be renewed for %g s: stopping", len(late), outage_s)
            self._return(late, ReleaseReason.DRAINED, "its lease could not be renewed")

    def _obey(self, cancelled: frozenset[str], lost: frozenset[str]) -> None:
        for job_id in lost:
            if job_id in self._live:
                self._lose(self._live[job_id], "another attempt owns it")
        for job_id in cancelled:
            self.end(job_id, State.CANCELLED, Failure(code="cancelled", message="the job was cancelled"))

    def _lose(self, live: Live, why: str) -> None:
        self._forget(live)
        self._outbox.drop([live.lease.job_id])
        self._watcher.gone(live.lease, why)

    def _beat(self, now: float) -> None:
        """Tell the fleet that this group lives."""
        if now < self._beat_at:
            return
        self._beat_at = now + BEAT_EVERY_S
        self._gauges.turn_over()
        self._refusals.turn_over()
        if self._keep_name():
            self._link.call(self._store.beat, self.beat())

    def _sweep(self, now: float) -> None:
        """After leaders that live no more."""
        if now >= self._sweep_at and not self._link.away:
            self._sweep_at = now + SWEEP_EVERY_S
            self._sweeper.tick()

    # ---- out

    def flush(self) -> None:
        """Tell the engine, then the store."""
        self.submit()
        now = self._clock()
        for live in self._to_journal(now):
            self._journal(live)
        if self._outbox and (now >= self._deliver_at or self._draining):
            self._deliver()
            self._deliver_at = now + self._delivery_pause_s()

    def _to_journal(self, now: float) -> list[Live]:
        """Everything that Redis lacks, now and then; the first tokens of a job soon, for somebody may wait for them."""
        if not self._unjournalled:
            return []
        if now >= self._journal_at or self._draining:
            due = list(self._unjournalled)
            self._journal_at = now + self._journal_pause_s()
        elif now >= self._first_tokens_at:
            due = [live for live in self._unjournalled if live.unheard]
        else:
            return []
        self._first_tokens_at = now + self._journal_every_s
        self._unjournalled.difference_update(due)
        return due

    def _journal(self, live: Live) -> None:
        for chunk in live.take():
            self._outbox.append(live.lease, chunk)

    def _journal_pause_s(self) -> float:
        wanted_s = len(self._live) / JOURNAL_ENTRIES_PER_S
        return max(self._journal_every_s, min(wanted_s, LONGEST_JOURNAL_S))

    def _delivery_pause_s(self) -> float:
        """A row that is free is filled at the next step at the earliest; every other one is soon enough."""
        if not self._crowded:
            return 0.0
        return min(max(CROWDED_DELIVERY_S, 2 * self._claimer.step_s), LONGEST_DELIVERY_S)

    def submit(self) -> None:
        """Tell the engine.  What a group that is gone never had cannot have brought it down: it goes back uncharged."""
        if not self._admits and not self._cancels:
            return
        admits, cancels = self._admits, self._cancels
        self._admits, self._cancels = [], []
        if not self._group.submit(admit=admits, cancel=cancels):
            found = (self._by_handle.get(request.handle) for request in admits)
            never_had = {live.lease: live for live, _ in filter(None, found)}
            self._return(list(never_had.values()), ReleaseReason.DRAINED, "the group is going down")

    def _deliver(self) -> None:
        delivery = Delivery()
        with contextlib.suppress(StoreUnavailable):
            self._link.call(self._outbox.flush, delivery)
        for outcome, verdict in delivery.verdicts:
            self._watcher.ended(outcome, verdict)
        self._obey(delivery.cancelled, delivery.lost)


def _spent(event: Ready) -> str:
    """What a start's time was spent on, as rank 0 says."""
    told = event.info.details
    if not {"meet_s", "load_s"} <= told.keys():
        return ""
    start_s = max(0.0, event.start_s - float(told["meet_s"]) - float(told["load_s"]))
    return f" (start and import {start_s:.1f}, meet {told['meet_s']}, load {told['load_s']})"

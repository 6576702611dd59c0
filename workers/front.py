"""The heart of a leader: jobs between the store and the engine.  Knows nothing of Celery, and never waits.

    take -> admit -> (engine) -> on_events -> flush          tick: renew, deadlines, beat, sweep

Whoever drives it calls `on_events` when the group has something, `tick` when `wake_in` has passed, and after either
`take`, `admit` for what was taken, and `flush`.
"""

import contextlib
import hashlib
import heapq
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hortator.producer.errors import BadRequest, HortatorError, PromptTooLong, StoreUnavailable, StoreUnsuitable
from hortator.producer.schema import Failure, FinishReason, Job, Result, State, Usage
from hortator.producer.store import (
    Claim,
    Claimed,
    ClaimMode,
    GroupBeat,
    Lease,
    Outcome,
    ReleaseReason,
    Store,
    Verdict,
)
from hortator.producer.sweeper import Sweeper
from hortator.workers.engine.step import EngineInfo, EngineStats, Finish, Request, SamplingParams
from hortator.workers.envelope import Envelope, job_of, open_envelope
from hortator.workers.group import Event, Group, Ready, Stepped
from hortator.workers.link import Link
from hortator.workers.outbox import Delivery, Letter, Outbox
from hortator.workers.output import Output
from hortator.workers.settings import WorkerSettings
from hortator.workers.supervisor import Down
from hortator.workers.text import Text

logger = logging.getLogger("hortator.front")

# How soon a queue is asked again that gave less than there was room for: after a job, after none, after none for long.
EAGER_POLL_S, BUSY_POLL_S, IDLE_POLL_S = 0.002, 0.005, 0.020
BUSY_FOR_S = 2.0
AWAY_POLL_S = 0.05
OVERCLAIM = 0.25  # jobs beyond max_num_seqs that may wait inside the engine, so that a freed row is refilled at once
JOURNAL_EVERY_S = 0.03
BEAT_EVERY_S = 1.0


class Watcher(Protocol):
    """Who wants to know what becomes of the jobs: the pool, on behalf of Celery."""

    def ended(self, outcome: Outcome, verdict: Verdict) -> None:
        """The store has the outcome, or refused it because the job is no longer ours."""

    def gone(self, lease: Lease, reason: str) -> None:
        """The job left without an outcome: handed back, or lost."""


@dataclass(slots=True, eq=False)
class Live:
    """A job that the engine has."""

    lease: Lease
    handle: int
    output: Output
    num_prompt: int
    max_tokens: int
    leased_at: float
    num_inherited: int  # tokens of earlier attempts


@dataclass(slots=True)
class Alone:
    """A suspect that runs with nothing beside it."""

    lease: Lease
    to_its_end: bool


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
        self._journal_every_s = journal_every_s
        self._link = Link(clock)
        self._sweeper = Sweeper(store, settings.lease_s, clock=clock)
        self._outbox = Outbox(store, model=self._queue)
        self._handles = itertools.count(1)
        self._info: EngineInfo | None = None
        self._stats: EngineStats | None = None
        self._taken: dict[str, Claimed] = {}  # claimed, not admitted yet
        self._live: dict[str, Live] = {}
        self._by_handle: dict[int, Live] = {}
        self._unjournalled: dict[str, Live] = {}
        self._admits: list[Request] = []
        self._cancels: list[int] = []
        self._deadlines: list[tuple[float, int, Outcome]] = []  # (when, tie breaker, how it ends)
        self._alone: Alone | None = None
        self._waits_for_idle = False  # a suspect needs an empty group
        self._checked = False
        self._draining = False
        now = clock()
        self._redis_minus_clock_ms = 0.0
        self._claim_at = self._beat_at = self._renew_at = self._journal_at = now
        self._renew_every_s = min(settings.lease_s / 3, 1.0)
        self._claimed_at = now
        self._busy_until = 0.0
        self._num_steps = self._num_tokens = 0
        self._rates = (0.0, 0.0)
        self._counted_at = now

    # ---- what others may know

    @property
    def state(self) -> str:
        if self._draining:
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
    def busy(self) -> bool:
        """Something runs, or the store must still be told of something."""
        return bool(self._live or self._taken or self._outbox)

    def details(self) -> dict[str, Any]:
        """For people: the beat, `inspect stats`."""
        stats, failure = self._stats, self._group.last_failure
        steps_per_s, tokens_per_s = self._rates
        kv_use = 1 - stats.free_blocks / stats.total_blocks if stats and stats.total_blocks else 0.0
        return {
            "steps_per_s": round(steps_per_s, 1),
            "tokens_per_s": round(tokens_per_s, 1),
            "kv_use": round(kv_use, 3),
            "waiting": stats.waiting if stats else 0,
            "preemptions": stats.preemptions if stats else 0,
            "pids": list(self._group.pids.values()),
            "last_failure": str(failure) if failure else None,
            "redis_away": self._link.away,
        }

    # ---- from the store to the engine

    def room(self) -> int:
        """How many jobs to claim now."""
        if self._info is None or self._draining or self._alone or not self._checked:
            return 0
        if self._waits_for_idle and self._live:
            return 0
        spare = max(1, int(self.capacity * OVERCLAIM))
        if self._stats and self._stats.waiting >= spare:
            return 0  # rows are free, but not the KV blocks to fill them
        return self.capacity + spare - len(self._live) - len(self._taken)

    def take(self) -> Sequence[Claimed]:
        """Claim what there is room for, at most every few milliseconds while the queue is empty."""
        now, room = self._clock(), self.room()
        if room <= 0 or now < self._claim_at:
            return ()
        try:
            claim = self._claim(room)
        except StoreUnavailable:
            self._claim_at = now + IDLE_POLL_S
            return ()
        if claim.jobs:
            self._busy_until = now + BUSY_FOR_S
        if len(claim.jobs) < room:
            self._claim_at = now + self._poll_s(now, len(claim.jobs))
        return claim.jobs

    def _poll_s(self, now: float, num_claimed: int) -> float:
        if num_claimed:
            return EAGER_POLL_S
        return BUSY_POLL_S if now < self._busy_until else IDLE_POLL_S

    def _claim(self, room: int) -> Claim:
        before = self._clock()
        claim = self._link.call(
            self._store.claim,
            self._queue,
            owner=self._settings.group,
            limit=room,
            lease_s=self._settings.lease_s,
            idle=not self._live,
        )
        self._redis_minus_clock_ms = claim.now_ms - self._clock() * 1000
        if not self._live:
            self._renew_at = before + self._renew_every_s
        self._claimed_at = before
        self._waits_for_idle = claim.mode is ClaimMode.DRAIN
        if claim.mode is ClaimMode.ALONE:
            self._alone = Alone(claim.jobs[0].lease, claim.full_run_alone)
        self._taken.update((claimed.lease.job_id, claimed) for claimed in claim.jobs)
        return claim

    def open(self, claimed: Claimed) -> Envelope | None:
        """The message's envelope; None if it is not one of ours, and then it is buried and its job has failed."""
        try:
            return open_envelope(claimed.message)
        except BadRequest as error:
            self._refuse(claimed, error, bury=True)
            return None

    def admit(self, claimed: Claimed, envelope: Envelope) -> bool:
        """Give the job to the engine; False if it ended or left at once."""
        if self._info is None:
            self.hand_back([claimed.lease], reason="the group is down")
            return False
        try:
            live, request = self._prepare(claimed, envelope, self._info)
        except PromptTooLong as error:
            self._refuse(claimed, error, bury=False)
            return False
        except BadRequest as error:
            self._refuse(claimed, error, bury=True)
            return False
        except Exception as error:
            # A fault of ours that one job brings out must not end the worker and all other jobs with it.
            logger.exception("job %s cannot be prepared", claimed.lease.job_id)
            self._refuse(claimed, HortatorError(f"internal error: {type(error).__name__}"), bury=True)
            return False
        self._taken.pop(claimed.lease.job_id, None)
        self._live[claimed.lease.job_id] = self._by_handle[live.handle] = live
        reason = live.output.complete(max_tokens=live.max_tokens)
        if reason is not None:  # the attempt before died between its last token and its commit
            self._succeed(live, reason, in_engine=False)
            return False
        self._admits.append(request)
        return True

    def _prepare(self, claimed: Claimed, envelope: Envelope, info: EngineInfo) -> tuple[Live, Request]:
        job = job_of(envelope, model=self._queue)
        prompt = _tokens(job, self._text)
        max_tokens = _fit(job, prompt, info)
        sampling = job.sampling
        ends = frozenset(sampling.stop_token_ids) | frozenset(() if sampling.ignore_eos else info.eos_token_ids)
        output = Output(
            self._text.decoder(),
            ends=ends,
            stop=sampling.stop,
            journal=claimed.journal,
            logprobs=sampling.logprobs,
        )
        self._arm(claimed, job, envelope)
        handle = next(self._handles)
        num_inherited = len(output.token_ids)
        live = Live(claimed.lease, handle, output, len(prompt), max_tokens, self._claimed_at, num_inherited)
        params = _params(job, claimed.lease.job_id, max_tokens)
        return live, Request(handle, prompt, params, tuple(output.token_ids))

    def _arm(self, claimed: Claimed, job: Job, envelope: Envelope) -> None:
        deadline_ms = claimed.deadline_ms
        if deadline_ms is None and job.deadline_s is not None:  # sent by a plain Celery client
            deadline_ms = claimed.enqueued_ms + int(job.deadline_s * 1000)
        if deadline_ms is not None:
            at = (deadline_ms - self._redis_minus_clock_ms) / 1000
            failure = Failure(code="expired", message="the deadline passed before the job was finished")
            self._end_at(at, Outcome(claimed.lease, State.EXPIRED, failure=failure))
        if envelope.time_limit_s is not None:
            failure = Failure(code="time_limit", message=f"the time limit of {envelope.time_limit_s:g} s is over")
            self._end_at(self._clock() + envelope.time_limit_s, Outcome(claimed.lease, State.FAILED, failure=failure))

    def _end_at(self, at: float, outcome: Outcome) -> None:
        heapq.heappush(self._deadlines, (at, next(self._handles), outcome))

    def refuse(self, lease: Lease, error: HortatorError) -> None:
        """Celery can do nothing with a message that was taken."""
        claimed = self._taken.get(lease.job_id)
        if claimed is not None and claimed.lease == lease:
            self._refuse(claimed, error, bury=True)

    def _refuse(self, claimed: Claimed, error: HortatorError, *, bury: bool) -> None:
        lease = claimed.lease
        if bury:
            self._outbox.bury(Letter(claimed.message, error.message, lease.job_id))
        logger.debug("job %s is refused: %s", lease.job_id, error.code)
        self.end(lease.job_id, State.FAILED, Failure(code=error.code, message=error.message))

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
        self._info, self._stats = event.info, None
        self._claim_at = self._clock()
        logger.info(
            "group %s is ready after %.1f s: %s, epoch %d, %d sequences of up to %d tokens",
            self._settings.group, event.start_s, self._queue, event.epoch,
            event.info.max_num_seqs, event.info.max_model_len,
        )  # fmt: skip

    def _stepped(self, event: Stepped) -> None:
        output, self._stats = event.output, event.stats
        self._num_steps += 1
        self._num_tokens += len(output.tokens)
        by_handle, unjournalled = self._by_handle, self._unjournalled
        for token in output.tokens:
            live = by_handle.get(token.handle)
            if live is None:
                continue  # cancelled, or ended by a stop string, a step or two ago
            unjournalled[live.lease.job_id] = live
            if live.output.feed(token.token_id, token.logprob):
                self._succeed(live, FinishReason.STOP)
        for handle, finish in output.finished:
            live = by_handle.get(handle)
            if live is not None:
                self._succeed(live, _REASONS[finish], in_engine=False)
        for fault in output.faults:
            live = by_handle.get(fault.handle)
            if live is not None:
                failure = Failure(code=fault.code, message=fault.message)
                self._end(live, Outcome(live.lease, State.FAILED, failure=failure), in_engine=False)
        if self._alone:
            self._probation(self._alone)

    def _probation(self, alone: Alone) -> None:
        """A suspect that got beyond the point where its group died is cleared, and others may join it."""
        live = self._live.get(alone.lease.job_id)
        if live is None or live.lease != alone.lease:
            self._alone = None
        elif not alone.to_its_end:
            num_new = len(live.output.token_ids) - live.num_inherited
            if num_new >= self._settings.probation_tokens:
                self._outbox.clear(alone.lease)
                self._alone = None

    def _down(self, event: Down) -> None:
        """The engine has lost everything: hand all jobs back with the tokens that they have."""
        if self._live or self._info:
            logger.warning("group %s is down: %s; %d jobs go back", self._settings.group, event.reason, len(self._live))
        else:
            logger.warning("group %s did not start: %s", self._settings.group, event.reason)
        self._info = self._stats = None
        self._admits, self._cancels = [], []
        self._return(list(self._live.values()), ReleaseReason.CRASHED, "the group went down")
        if event.permanent:
            self.fatal = event.reason

    def _succeed(self, live: Live, reason: FinishReason, *, in_engine: bool = True) -> None:
        output = live.output
        output.finish()
        result = Result.model_construct(
            text=output.text,
            token_ids=tuple(output.token_ids),
            finish_reason=reason,
            usage=Usage.model_construct(prompt_tokens=live.num_prompt, completion_tokens=len(output.token_ids)),
            logprobs=None if output.logprobs is None else tuple(output.logprobs),
        )
        self._end(live, Outcome(live.lease, State.SUCCEEDED, result=result), in_engine=in_engine)

    def end(self, job_id: str, state: State, failure: Failure) -> bool:
        """End a job of ours from outside: revoked, refused, timed out.  False if it is not here."""
        live = self._live.get(job_id)
        if live is not None:
            self._end(live, Outcome(live.lease, state, failure=failure))
            return True
        claimed = self._taken.pop(job_id, None)
        if claimed is not None:
            self._outbox.commit(Outcome(claimed.lease, state, failure=failure))
            self._not_alone(claimed.lease)
        return claimed is not None

    def cancel_elsewhere(self, job_id: str) -> None:
        """A job that was revoked is not here: it may be queued, or with another leader, who learns it by renewing."""
        try:
            self._link.call(self._store.cancel, [job_id])
        except StoreUnavailable:
            logger.warning("job %s is not cancelled: Redis is away", job_id)

    def _end(self, live: Live, outcome: Outcome, *, in_engine: bool = True) -> None:
        self._forget(live, in_engine=in_engine)
        self._outbox.append(live.lease, live.output.take())
        self._outbox.commit(outcome)

    def _forget(self, live: Live, *, in_engine: bool = True) -> None:
        del self._live[live.lease.job_id], self._by_handle[live.handle]
        self._unjournalled.pop(live.lease.job_id, None)
        self._not_alone(live.lease)
        if in_engine and self._info is not None:
            self._cancel(live.handle)

    def _cancel(self, handle: int) -> None:
        """Tell the engine, unless it has never heard of the job."""
        unsent = [request for request in self._admits if request.handle != handle]
        if len(unsent) == len(self._admits):
            self._cancels.append(handle)
        self._admits = unsent

    def _not_alone(self, lease: Lease) -> None:
        if self._alone and self._alone.lease == lease:
            self._alone = None

    # ---- handing back

    def hand_back(self, leases: Iterable[Lease] | None = None, *, reason: str = "draining") -> None:
        """Return jobs (default: all) to the queue at once, with their tokens; the attempt is not charged."""
        wanted = None if leases is None else {lease.job_id for lease in leases}
        live = [live for job_id, live in self._live.items() if wanted is None or job_id in wanted]
        self._return(live, ReleaseReason.DRAINED, reason)
        taken = [claimed for job_id, claimed in self._taken.items() if wanted is None or job_id in wanted]
        for claimed in taken:
            del self._taken[claimed.lease.job_id]
            self._not_alone(claimed.lease)
            self._outbox.release([claimed.lease], ReleaseReason.DRAINED)
            self._watcher.gone(claimed.lease, reason)

    def drain(self) -> None:
        """Claim nothing more."""
        self._draining = True

    def _return(self, jobs: list[Live], reason: ReleaseReason, why: str) -> None:
        for live in jobs:
            self._forget(live)
            self._outbox.append(live.lease, live.output.take())
        self._outbox.release([live.lease for live in jobs], reason)
        for live in jobs:
            self._watcher.gone(live.lease, why)

    # ---- time

    def tick(self) -> None:
        """Everything that is due."""
        now = self._clock()
        self._expire(now)
        for due in (self._check, self._keep_leases, self._beat):
            try:
                due(now)
            except StoreUnavailable:
                continue

    def wake_in(self) -> float:
        """Seconds until `tick` and `take` have something to do."""
        now = self._clock()
        at = min(self._beat_at, self._renew_at if self._live else now + 1.0)
        if self._unjournalled:
            at = min(at, self._journal_at)
        if self._deadlines:
            at = min(at, self._deadlines[0][0])
        if self.room() > 0:
            at = min(at, self._claim_at)
        return max(at - now, AWAY_POLL_S if self._link.away else 0.001)

    def _check(self, _now: float) -> None:
        """Refuse a Redis that would lose jobs, before the first claim."""
        if self._checked:
            return
        try:
            self._link.call(self._store.check)
        except StoreUnsuitable as error:
            self.fatal = error.message
        else:
            self._checked = True

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
        """Stop what we have no right to run any more; somebody else may be running it already."""
        late = [live for live in self._live.values() if now - live.leased_at > self._settings.lease_s]
        if late:
            logger.warning("%d leases could not be renewed for %g s: stopping", len(late), self._settings.lease_s)
        for live in late:
            self._lose(live, "its lease could not be renewed")

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
        """Tell the fleet that this group lives, and sweep after those that do not."""
        if now < self._beat_at:
            return
        self._beat_at = now + BEAT_EVERY_S
        self._count_rates(now)
        self._link.call(self._store.beat, self.beat())
        self._sweeper.tick()

    def beat(self) -> GroupBeat:
        return GroupBeat(
            group=self._settings.group,
            model=self._queue,
            running=len(self._live),
            capacity=self.capacity,
            epoch=self._group.epoch,
            state=self.state,
            info=self.details(),
        )

    def _count_rates(self, now: float) -> None:
        seconds = max(now - self._counted_at, 1e-3)
        self._rates = (self._num_steps / seconds, self._num_tokens / seconds)
        self._num_steps = self._num_tokens = 0
        self._counted_at = now

    # ---- out

    def flush(self) -> None:
        """Tell the engine, then the store."""
        if self._admits or self._cancels:
            self._group.submit(admit=self._admits, cancel=self._cancels)
            self._admits, self._cancels = [], []
        self._collect_tokens()
        if self._outbox:
            self._deliver()

    def _collect_tokens(self) -> None:
        now = self._clock()
        if self._unjournalled and (now >= self._journal_at or self._draining):
            for live in self._unjournalled.values():
                self._outbox.append(live.lease, live.output.take())
            self._unjournalled.clear()
            self._journal_at = now + self._journal_every_s

    def _deliver(self) -> None:
        delivery = Delivery()
        with contextlib.suppress(StoreUnavailable):
            self._link.call(self._outbox.flush, delivery)
        for outcome, verdict in delivery.verdicts:
            self._watcher.ended(outcome, verdict)
        self._obey(delivery.cancelled, delivery.lost)


_REASONS = {Finish.STOP: FinishReason.STOP, Finish.LENGTH: FinishReason.LENGTH}


def _tokens(job: Job, text: Text) -> tuple[int, ...]:
    if job.token_ids is not None:
        return job.token_ids
    if job.messages is not None:
        return text.encode_chat(job.messages)
    assert job.prompt is not None
    return text.encode(job.prompt)


def _fit(job: Job, prompt: Sequence[int], info: EngineInfo) -> int:
    """max_tokens as far as the model's context goes; raises if the job can never run on this group."""
    if not prompt:
        raise BadRequest("the prompt has no tokens")
    if job.token_ids is not None and max(prompt) >= info.vocab_size:
        raise BadRequest(f"token id {max(prompt)} is not in the vocabulary of {info.vocab_size}")
    room = info.max_model_len - len(prompt)
    if room < 1:
        raise PromptTooLong(
            f"the prompt has {len(prompt)} tokens; the limit is {info.max_model_len - 1}"
            f" (max_model_len {info.max_model_len}, and one to generate)"
        )
    max_tokens = min(job.sampling.max_tokens, room)
    if len(prompt) + max_tokens > info.kv_tokens:
        raise PromptTooLong(
            f"prompt ({len(prompt)}) and max_tokens ({max_tokens}) need {len(prompt) + max_tokens} tokens;"
            f" the KV pool holds {info.kv_tokens}: lower max_tokens or shorten the prompt"
        )
    return max_tokens


def _params(job: Job, job_id: str, max_tokens: int) -> SamplingParams:
    wanted = job.sampling
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        top_k=wanted.top_k,
        min_p=wanted.min_p,
        seed=seed_of(job_id) if wanted.seed is None else wanted.seed,
        stop_token_ids=wanted.stop_token_ids,
        ignore_eos=wanted.ignore_eos,
        logprobs=wanted.logprobs,
    )


def seed_of(job_id: str) -> int:
    """The seed of a job that names none: the same on every attempt and every group."""
    return int.from_bytes(hashlib.blake2b(job_id.encode(), digest_size=8).digest(), "big") >> 1

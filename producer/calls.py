"""Every call to Redis as a value: which script, which arguments, how to read the reply (replies.py).  No I/O is done
here, so that the blocking store and the asyncio one are the same store.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, TypeVar

from . import journal, message, replies
from .names import STEP_OF, Names
from .rules import CLAIM_BYTES, CLAIM_JOBS, ROOM_COUNTS_S, Rules
from .schema import SCHEMA_VERSION, Chunk, Failure, Job, State, Status
from .script import Call
from .server import refuse_no_room
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

MAX_JOBS_PER_CALL = 250
MAX_BYTES_PER_CALL = 2**20
MAX_IDS_PER_CALL = 500
STATUSES_BYTES = 2**20  # of one reply's results: what a producer's patience for one answer is enough for


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
        return self._call("enqueue", header + args, functools.partial(replies.receipts, jobs, job_ids))

    def cancel(self, job_ids: Sequence[str], tenant: str | None) -> Iterator[Call[list[State | None]]]:
        return self._by_ids("cancel", job_ids, tenant, lambda _, state: State(state.decode()))

    def statuses(self, job_ids: Sequence[str], tenant: str | None) -> Iterator[Call[list[Status | None]]]:
        """As many calls as the size of the results asks for: each is told of the first ones that fit in a reply."""
        told = 0

        def read(some: Sequence[str], reply: list[Any]) -> list[Status | None]:
            nonlocal told
            told += len(reply)
            return replies.each(some[: len(reply)], replies.status, reply)

        while told < len(job_ids):
            some = job_ids[told : told + MAX_IDS_PER_CALL]
            ids = [job_id if message.is_job_id(job_id) else "" for job_id in some]
            args = [tenant or "", STATUSES_BYTES, *ids]
            yield self._call("statuses", args, functools.partial(read, some))

    def ended(self, job_ids: Sequence[str], tenant: str | None) -> Iterator[Call[list[str]]]:
        return self._by_some("ended", job_ids, tenant, lambda ids, reply: [ids[place] for place in reply])

    def _by_ids(
        self, name: str, job_ids: Sequence[str], tenant: str | None, one: Callable[[str, Any], T]
    ) -> Iterator[Call[list[T | None]]]:
        return self._by_some(name, job_ids, tenant, lambda ids, reply: replies.each(ids, one, reply))

    def _by_some(
        self, name: str, job_ids: Sequence[str], tenant: str | None, read: Callable[[Sequence[str], Any], T]
    ) -> Iterator[Call[T]]:
        """Calls of a few hundred ids.  Something that is no id at all is asked as '' and found nowhere."""
        for start in range(0, len(job_ids), MAX_IDS_PER_CALL):
            some = job_ids[start : start + MAX_IDS_PER_CALL]
            ids = [job_id if message.is_job_id(job_id) else "" for job_id in some]
            yield self._call(name, [tenant or "", *ids], functools.partial(read, some))

    def chunks(self, job_id: str, after: int) -> Call[list[Chunk]]:
        known = job_id if message.is_job_id(job_id) else ""
        return self._call("chunks", [known, max(after, 0)], functools.partial(replies.chunks, job_id, after))

    # leaders

    def claim(self, model: str, owner: str, limit: int, lease_s: float, idle: bool, *, surplus: int = 0) -> Call[Claim]:
        owner = f"{owner}#{self._instance}".replace(" ", "_")
        args = [
            model,
            owner,
            os.urandom(6).hex(),
            self._seen.get(owner, "-"),
            limit,
            _ms(lease_s),
            int(idle),
            SCHEMA_VERSION,
            surplus,
            _ms(ROOM_COUNTS_S),
            CLAIM_JOBS,
            CLAIM_BYTES,
        ]
        return self._call("claim", args, functools.partial(self._claimed, owner))

    def _claimed(self, owner: str, reply: list[Any]) -> Claim:
        claim = replies.claim(reply)
        if claim.jobs:
            self._seen[owner] = reply[replies.CLAIM_TOKEN].decode()
        return claim

    def append(self, appends: Sequence[Append]) -> Call[Signals]:
        args: list[Any] = []
        for a in appends:
            after = a.chunk.index + len(a.chunk.token_ids)
            args += (a.lease.job_id, a.lease.attempt, a.chunk.index, after, journal.encode_chunk(a.chunk))
        return self._call("append", args, replies.signals)

    def renew(self, leases: Sequence[Lease], lease_s: float) -> Call[Signals]:
        return self._call("renew", [_ms(lease_s), *_flat(leases)], replies.signals)

    def commit(self, outcomes: Sequence[Outcome]) -> Call[list[Verdict]]:
        args = [part for outcome in outcomes for part in _outcome_args(outcome)]
        return self._call("commit", args, replies.verdicts)

    def release(self, leases: Sequence[Lease], reason: ReleaseReason) -> Call[None]:
        return self._call("release", [reason.value, *_flat(leases)], replies.nothing)

    def clear(self, lease: Lease) -> Call[None]:
        return self._call("clear", _flat([lease]), replies.nothing)

    def beat(self, beat: GroupBeat) -> Call[None]:
        said = {name: getattr(beat, name) for name in GroupBeat.__slots__}
        text = json.dumps(said, separators=(",", ":"))
        args = [beat.group, beat.model, text, beat.state, beat.room, _ms(ROOM_COUNTS_S)]
        return self._call("beat", args, replies.nothing)

    def hold(self, holder: Holder, replacing: str, *, leave: bool = False) -> Call[Holder | None]:
        text = json.dumps(asdict(holder), separators=(",", ":"))
        args = [holder.group, holder.life, text, _ms(self.rules.beat_ttl_s), replacing, int(leave)]
        return self._call("hold", args, replies.holder)

    # anybody

    def sweep(self, limit: int, expired_before_ms: int | None) -> Call[SweepReport]:
        before = "" if expired_before_ms is None else expired_before_ms
        return self._call("sweep", [limit, before, _ms(self.rules.conviction_grace_s)], replies.sweep_report)

    def ready(self) -> Call[None]:
        return self._call("ready", [self.rules.memory_headroom], refuse_no_room)

    def queues(self) -> Call[list[QueueInfo]]:
        return self._call("queues", [_ms(self.rules.beat_ttl_s)], replies.queues)

    def bury(self, model: str, raw: bytes, reason: str, job_id: str | None) -> Call[str]:
        return self._call("bury", [model, job_id or "", reason, raw], lambda reply: str(reply.decode()))

    def dead_letters(self, limit: int, before: str | None) -> Call[list[DeadLetter]]:
        return self._call("letters", [max(limit, 1), before or ""], replies.letters)

    def count_dead_letters(self) -> Call[int]:
        return self._call("count_letters", [], int)

    def dead_letter(self, letter_id: str) -> Call[DeadLetter | None]:
        return self._call("letter", [letter_id], replies.one_letter)

    def replay(self, letter_ids: Sequence[str]) -> Call[list[str]]:
        once = list(dict.fromkeys(letter_ids))

        def read(reply: list[Any]) -> list[str]:
            job_ids = dict(zip(once, replies.replayed(reply), strict=True))
            return [job_ids[letter_id] for letter_id in letter_ids]

        return self._call("replay", once, read)

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


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _flat(leases: Iterable[Lease]) -> list[Any]:
    return [part for lease in leases for part in (lease.job_id, lease.attempt)]


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

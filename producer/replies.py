"""What the answers of the scripts mean."""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from . import journal
from .errors import BadRequest, JobFailed, UnknownJob
from .journal import DamagedJournal
from .refused import cut_letter, idempotency_conflict, queue_full, unknown_model
from .schema import Chunk, Failure, Job, Result, State, Status, Timings
from .server import refuse_no_room
from .store import (
    Claim,
    Claimed,
    ClaimMode,
    DeadLetter,
    GroupBeat,
    Holder,
    Lease,
    QueueInfo,
    Receipt,
    Signals,
    SweepReport,
    Verdict,
)

T = TypeVar("T")

_labels = TypeAdapter(dict[str, str], config=ConfigDict(strict=True))

CLAIM_TOKEN = 4  # where the name of a claim's reply stands in it


def nothing(_: Any) -> None:
    return None


def _text(raw: bytes | None) -> str:
    return "" if raw is None else raw.decode(errors="replace")


def _int(raw: bytes | int | None) -> int | None:
    """None also for what is no whole number: somebody damaged the record."""
    try:
        return None if raw is None else int(raw)
    except ValueError:
        return None


def each(ids: Sequence[str], one: Callable[[str, Any], T], reply: list[Any]) -> list[T | None]:
    return [None if row == b"" else one(job_id, row) for job_id, row in zip(ids, reply, strict=True)]


def receipts(jobs: list[Job], job_ids: list[str], reply: list[Any]) -> list[Receipt]:
    kind, *rest = reply
    if kind == b"ok":
        known = {rest[i]: rest[i + 1].decode() for i in range(0, len(rest), 2)}
        return [Receipt(known.get(i, job_id), i in known) for i, job_id in enumerate(job_ids)]
    refuse_no_room(reply)
    job, job_id = jobs[rest[0]], job_ids[rest[0]]
    if kind == b"unknown_model":
        raise unknown_model(job.model, [_text(name) for name in rest[1:]], job_id)
    if kind == b"conflict":
        raise idempotency_conflict(job_id)
    if kind == b"taken":
        raise BadRequest("this job id cannot be used: leave ids to hortator", job_id=job_id)
    whose = f"model {job.model!r}" if kind == b"full_model" else f"tenant {job.tenant!r} on model {job.model!r}"
    raise queue_full(whose, rest[1], rest[2] / 1000, job_id)


def claim(reply: list[Any]) -> Claim:
    mode, full, more, now, _, *jobs = reply
    return Claim(ClaimMode(mode.decode()), tuple(map(_claimed, jobs)), int(now), bool(full), bool(more))


def _claimed(row: list[Any]) -> Claimed:
    job_id, attempt, raw, tenant, enqueued, deadline, entries = row
    damage = None
    try:
        read = tuple(journal.read_chunks(entries))
    except DamagedJournal as error:
        read, damage = (), damaged_journal(error)
    return Claimed(
        Lease(job_id.decode(), int(attempt)), raw or b"", _text(tenant), int(enqueued), _int(deadline), read, damage
    )


def damaged_journal(error: DamagedJournal) -> str:
    return f"its journal in Redis was damaged ({error}); send the job anew"


def chunks(job_id: str, after: int, entries: list[bytes]) -> list[Chunk]:
    try:
        return journal.from_token(journal.read_chunks(entries, after), after)
    except DamagedJournal as error:
        text = f"job {job_id}: its journal in Redis was damaged ({error}), so its tokens cannot be streamed"
        raise JobFailed(text, job_id=job_id, reason="damaged") from error


def signals(reply: list[list[bytes]]) -> Signals:
    cancelled, lost = reply
    if not cancelled and not lost:
        return Signals()
    return Signals(frozenset(_text(one) for one in cancelled), frozenset(_text(one) for one in lost))


def verdicts(reply: list[int]) -> list[Verdict]:
    return [Verdict.COMMITTED if one else Verdict.FENCED for one in reply]


def status(job_id: str, row: list[Any]) -> Status:
    state, failure = State.FAILED, None
    try:
        state, metadata = State(_text(row[0])), _labels.validate_json(row[10]) if row[10] else {}
    except ValueError:
        metadata, failure = {}, Failure(code="damaged", message="its record in Redis was damaged; send the job anew")
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
        "metadata": metadata,
        "failure": failure,
    }
    if state is State.SUCCEEDED:
        fields["result"], fields["failure"] = _result(row[14] if len(row) > 14 else None)
    elif state.terminal and failure is None:
        fields["failure"] = Failure(code=_text(row[11]), message=_text(row[12]))
    return Status.model_construct(**fields)


def _result(meta: bytes | None) -> tuple[Result | None, Failure | None]:
    """Celery's key holds the result, and anybody with Celery may delete it (`forget`) or write over it."""
    try:
        return Result.model_validate(json.loads(meta or b"")["result"]), None
    except (ValueError, KeyError, TypeError, ValidationError):
        return None, Failure(code="result_gone", message="the result's Celery key was deleted or written over")


def sweep_report(reply: list[Any]) -> SweepReport:
    now, *groups = reply
    requeued, expired, poisoned, damage = (tuple(_text(one) for one in group) for group in groups)
    return SweepReport(requeued=requeued, expired=expired, poisoned=poisoned, now_ms=int(now), damage=damage)


def _beats(said: Iterable[bytes]) -> Iterator[GroupBeat]:
    """What groups said of themselves; what no group can have said is passed by."""
    for one in said:
        with contextlib.suppress(ValueError, TypeError):
            yield GroupBeat(**json.loads(one))


def queues(reply: list[Any]) -> list[QueueInfo]:
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


def letters(reply: list[Any]) -> list[DeadLetter]:
    return [_letter(row) for row in reply]


def one_letter(reply: list[Any]) -> DeadLetter | None:
    return _letter(reply[0]) if reply else None


def _letter(row: list[Any]) -> DeadLetter:
    letter_id, model, job_id, reason, raw, at, size = row
    return DeadLetter(_text(letter_id), _text(model), _text(job_id) or None, _text(reason), raw, int(at), int(size))


def replayed(reply: list[Any]) -> list[str]:
    kind, *rest = reply
    if kind == b"unknown":
        raise UnknownJob(f"there is no dead letter {_text(rest[0])!r}; nothing was replayed")
    if kind == b"cut":
        raise cut_letter(_text(rest[0]), int(rest[1]), int(rest[2]))
    return [_text(one) for one in rest]


def holder(reply: list[Any]) -> Holder | None:
    return Holder(**json.loads(reply[1]) | {"renewals": int(reply[0])}) if reply else None

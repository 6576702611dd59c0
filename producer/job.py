"""From what a caller says to a job, and from a status to what a caller gets; shared by both clients."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypedDict

from pydantic import ValidationError

from .arguments import count, got_type, seconds
from .errors import (
    BadRequest,
    ConfigError,
    JobCancelled,
    JobExpired,
    JobFailed,
    StoreUnavailable,
    UnknownJob,
)
from .problems import listed
from .schema import Choice, Chunk, Job, Priority, Result, Sampling, State, Status

MIN_POLL_S = 0.005
MAX_POLL_S = 0.25
POLL_PER_JOB_S = 0.0002  # who watches many jobs hears of one every few milliseconds anyway
FEW, LITTLE_NEWS = 16, 2.5  # news of less than a sixteenth of the jobs: the wait grows, to so many times the shortest
POLL_SHARE = 0.05  # at most this share of the time goes into asking
MAX_SHARE_S = 1.0  # but a question that took long because something stood still is not waited for so many times again


class JobFields(TypedDict, total=False):
    """What `enqueue` takes beside prompt and model.  None is as good as left out."""

    messages: Sequence[Any] | None
    token_ids: Sequence[int] | None
    sampling: Sampling | dict[str, Any] | None
    priority: Priority | str | None
    deadline_s: float | None
    idempotency_key: str | None
    tenant: str | None
    metadata: dict[str, str] | None


def new_job(prompt: str | None, *, model: str, tenant: str, fields: JobFields) -> Job:
    """The job, or BadRequest naming every wrong field (and never repeating the prompt)."""
    if problem := misplaced(fields):
        raise BadRequest(problem)
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return Job(**({"tenant": tenant} | given | {"prompt": prompt, "model": model}))
    except ValidationError as error:
        raise BadRequest(listed(error.errors(include_url=False, include_context=False), got=got_type)) from None


def describe(error: ValidationError) -> str:
    """`sampling.max_tokens: Input should be ...`: every wrong field, without its value."""
    return listed(error.errors(include_url=False, include_context=False, include_input=False))


def misplaced(names: Iterable[str]) -> str:
    """Of sampling parameters that stand beside the prompt, where they would be ignored: what to do.  Else nothing."""
    found = [name for name in names if name in Sampling.model_fields]
    return f"{', '.join(found)}: write it inside sampling" if found else ""


def failure_of(status: Status) -> JobFailed | None:
    """What to raise for a job that ended without a result."""
    if status.result is not None or not status.state.terminal:
        return None
    kind = {State.CANCELLED: JobCancelled, State.EXPIRED: JobExpired}.get(status.state, JobFailed)
    code, text = (
        ("failed", "no reason was recorded")
        if status.failure is None
        else (
            status.failure.code,
            status.failure.message,
        )
    )
    return kind(f"job {status.id} {_end_of(status.state, code, text)}", job_id=status.id, reason=code)


def _end_of(state: State, code: str, text: str) -> str:
    """`failed (poison): why`, and nothing twice: code and text may say no more than the state."""
    said = "was cancelled" if state is State.CANCELLED else state.value
    reason = "" if code == state.value else f" ({code})"
    return f"{said}{reason}" + ("" if text in (state.value, f"the job {said}") else f": {text}")


def result_of(status: Status) -> Result:
    """The result of a terminal job, or what stands in its place, raised."""
    failure = failure_of(status)
    if failure is not None:
        raise failure
    assert status.result is not None
    return status.result


def outcome_of(status: Status) -> Result | JobFailed | None:
    """As a value: the result, the error, or None while the job is not done."""
    return status.result or failure_of(status)


def unknown(job_id: str, *, gone: bool) -> UnknownJob:
    text = "its record has expired" if gone else "no such job was issued to this tenant"
    return UnknownJob(f"job {job_id!r:.140}: {text}", job_id=job_id, gone=gone)


class Pace:
    """How long to wait between two questions: short while things move, longer while nothing does."""

    def __init__(self, timeout_s: float | None = None) -> None:
        self._give_up = None if timeout_s is None else time.monotonic() + seconds("timeout_s", timeout_s)
        self._delay = MIN_POLL_S
        self._asked = 0.0

    def asking(self) -> None:
        self._asked = time.monotonic()

    def delay(self, *, news: int, jobs: int = 1) -> float | None:
        """Seconds to wait before asking again about so many jobs, after that much news; None when the time is up."""
        now = time.monotonic()
        shortest = MIN_POLL_S + jobs * POLL_PER_JOB_S
        if news * FEW >= jobs:
            self._delay = min(shortest, MAX_POLL_S)
        else:
            longest = min(LITTLE_NEWS * shortest, MAX_POLL_S) if news else MAX_POLL_S
            self._delay = min(max(shortest, 1.5 * self._delay), longest)
        share = (now - self._asked) * (1 / POLL_SHARE - 1)
        delay = max(self._delay, min(share, MAX_SHARE_S + jobs * POLL_PER_JOB_S))
        if self._give_up is None:
            return delay
        left = self._give_up - now
        return min(delay, left) if left > 0 else None


class Patience:
    """Store errors that a waiting call bears with: Redis restarts, and waiting goes on.  Each outage is told of once,
    as it is found."""

    def __init__(self, patience_s: float, on_outage: Callable[[StoreUnavailable], None] | None = None) -> None:
        self._patience_s = patience_s
        self._on_outage = on_outage
        self._since: float | None = None
        self._problem: StoreUnavailable | None = None

    def good(self) -> None:
        self._since = self._problem = None

    def bear(self, error: StoreUnavailable) -> None:
        """Raise the error if the store has been away for too long, or waiting cannot help."""
        now = time.monotonic()
        begins = self._since is None
        self._since = now if self._since is None else self._since
        self._problem = error
        if isinstance(error, ConfigError) or now - self._since > self._patience_s:
            raise error
        if begins and self._on_outage is not None:
            self._on_outage(error)

    def too_late(self, waiting_for: object) -> TimeoutError:
        """What to raise when the time is up; if the store did not answer last, that is said, and the cause."""
        why = "" if self._problem is None else f": {self._problem}"
        error = TimeoutError(f"time is up, still waiting for {waiting_for}{why}")
        error.__cause__ = self._problem
        return error


class Follower:
    """Where one reader of a job's stream stands."""

    def __init__(self, job_id: str, after: int) -> None:
        self.job_id = job_id
        self.after = count("after", after)
        self._from_start = after == 0
        self._read: dict[int, tuple[int, int]] = {}  # answer -> its tokens and characters so far

    def behind(self, status: Status) -> bool:
        return status.num_tokens > self.after

    def take(self, chunks: Iterable[Chunk]) -> list[Chunk]:
        """The chunks, counted as read."""
        taken = list(chunks)
        for chunk in taken:
            self.after = chunk.index + len(chunk.token_ids)
            tokens, chars = self._read.get(chunk.choice or 0, (0, 0))
            self._read[chunk.choice or 0] = (tokens + len(chunk.token_ids), chars + len(chunk.text))
        return taken

    def rest(self, result: Result) -> list[Chunk]:
        """What the journal does not hold any more, out of the result; whoever comes late without the text so far gets
        UnknownJob, for a text cannot be cut at tokens."""
        if result.usage.completion_tokens <= self.after:
            return []
        if not self._from_start:
            raise UnknownJob(
                f"job {self.job_id}: its journal has expired; read its result", job_id=self.job_id, gone=True
            )
        chunks, index = [], self.after
        answers: Sequence[Result | Choice] = result.choices or (result,)
        for number, answer in enumerate(answers):
            chunk = self._unread(answer, index, number)
            if result.choices:
                chunk = chunk.model_copy(update={"choice": number})
            index += len(chunk.token_ids)
            chunks.append(chunk)
        return self.take([chunk for chunk in chunks if chunk.token_ids])

    def _unread(self, answer: Result | Choice, index: int, number: int) -> Chunk:
        tokens, chars = self._read.get(number, (0, 0))
        return Chunk(
            index=index,
            token_ids=answer.token_ids[tokens:],
            text=answer.text[chars:],
            logprobs=None if answer.logprobs is None else answer.logprobs[tokens:],
            top_logprobs=None if answer.top_logprobs is None else answer.top_logprobs[tokens:],
        )

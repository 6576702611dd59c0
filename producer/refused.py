"""The errors of what a store refuses, in words for whoever asked."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from .errors import BadRequest, HortatorError, IdempotencyConflict, QueueFull, UnknownModel
from .store import Receipt


@contextlib.contextmanager
def naming_jobs(receipts: list[Receipt], job_ids: Sequence[str], *, minted: bool) -> Iterator[None]:
    """An error on the way through an enqueue carries the receipts of what was accepted before it and the index of the
    refused job.  Its id, if it was minted for this call, goes: nobody will ever find a job under it."""
    try:
        yield
    except HortatorError as error:
        error.accepted = tuple(receipts)
        if error.job_id in job_ids:
            error.index = job_ids.index(error.job_id)
        if minted:
            error.job_id = None
        raise


def unknown_model(model: str, known: Iterable[str], job_id: str) -> UnknownModel:
    names = ", ".join(sorted(known)) or "none yet: start a worker first"
    return UnknownModel(
        f"no group serves model {model!r}, nor did lately (one that starts counts once it is ready); "
        f"known models: {names}",
        job_id=job_id,
    )


def idempotency_conflict(job_id: str) -> IdempotencyConflict:
    return IdempotencyConflict("this idempotency key was used with another body: use a new key", job_id=job_id)


def queue_full(whose: str, limit: int, retry_after_s: float, job_id: str) -> QueueFull:
    return QueueFull(
        f"the queue of {whose} is at its limit of {limit} jobs: try again in {retry_after_s:.0f} s",
        retry_after_s=retry_after_s,
        job_id=job_id,
    )


def cut_letter(letter_id: str, kept: int, size: int) -> BadRequest:
    return BadRequest(
        f"only {kept} of {size} bytes of dead letter {letter_id!r} were kept: send the job anew; nothing was replayed"
    )

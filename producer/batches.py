"""A long enqueue, a thousand jobs at a time, and which of them are in; shared by both clients."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from .errors import BadRequest, HortatorError, IterableFailed
from .schema import Job
from .store import Receipt

MANY = 1000  # jobs taken off the iterable at a time

H = TypeVar("H")  # a client's handle on one job


class Batches(Generic[H]):
    """Iterate over it for lists of jobs, and enqueue each inside `accepting`.  Where the iterable fails, or gives what
    is no job, the jobs before that are handed out first, and then the iteration raises."""

    def __init__(self, jobs: Iterable[Job], handle: Callable[[Job, Receipt], H]) -> None:
        if isinstance(jobs, Job) or not isinstance(jobs, Iterable):
            raise BadRequest(f"jobs: wanted is a list or another iterable of Job, got {type(jobs).__name__}")
        self._jobs: Iterator[object] = iter(jobs)
        self._handle = handle
        self._problem: HortatorError | None = None
        self.handles: list[H] = []

    def __iter__(self) -> Iterator[list[Job]]:
        while some := self._take():
            yield some
        if self._problem is not None:
            self._problem.accepted = tuple(self.handles)
            raise self._problem

    @contextmanager
    def accepting(self, jobs: list[Job]) -> Iterator[list[Receipt]]:
        """Put the receipts of these jobs into the list.  An error tells what is in, of the batches before as well."""
        receipts: list[Receipt] = []
        before = len(self.handles)
        try:
            yield receipts
        except HortatorError as error:
            self._accept(jobs, error.accepted)
            error.accepted = tuple(self.handles)
            error.index = None if error.index is None else before + error.index
            if self.handles:
                error.add_note(f"enqueue_many: the first {len(self.handles)} jobs are in, see `accepted`")
            raise
        self._accept(jobs, receipts)

    def _take(self) -> list[Job]:
        some: list[Job] = []
        while self._problem is None and len(some) < MANY:
            try:
                job = next(self._jobs)
            except StopIteration:
                break
            except Exception as error:
                self._stop(IterableFailed, f"the iterable raised {type(error).__name__} for", len(some), cause=error)
                break
            if not isinstance(job, Job):
                self._stop(BadRequest, f"wanted is a Job, got {type(job).__name__} as", len(some))
                break
            some.append(job)
        return some

    def _stop(self, kind: type[HortatorError], what: str, taken: int, *, cause: Exception | None = None) -> None:
        index = len(self.handles) + taken
        self._problem = kind(f"{what} jobs[{index}]; the {index} before it are in (`accepted`): go on from there")
        self._problem.index = index
        self._problem.__cause__ = cause

    def _accept(self, jobs: list[Job], receipts: Iterable[Receipt]) -> None:
        self.handles += map(self._handle, jobs, receipts)

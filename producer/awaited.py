"""Handles on jobs that are waited for; shared by both clients."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Generic, TypeVar

from .arguments import several
from .errors import UnknownJob
from .job import result_of
from .schema import Result, Status

MAX_NAMED = 3

Key = tuple[str, str]  # tenant, job id
End = Status | UnknownJob


class Handle:
    """One accepted job.  `duplicate`: the idempotency key was known, and this is the job that has it."""

    def __init__(self, job_id: str, *, tenant: str, duplicate: bool = False) -> None:
        self.id = job_id
        self.tenant = tenant
        self.duplicate = duplicate
        self.end: End | None = None  # how the job ended, which never changes

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r})"

    def known_result(self) -> Result:
        """Of a job that has ended; raises what stands in the result's place."""
        assert self.end is not None
        if isinstance(self.end, UnknownJob):
            raise self.end
        return result_of(self.end)


H = TypeVar("H", bound=Handle)


class Awaited(Generic[H]):
    """Several handles may be on one job, and one id may be asked for by two tenants."""

    def __init__(self, handles: Iterable[H], kind: type[H]) -> None:
        self._handles: dict[Key, list[H]] = {}
        for handle in dict.fromkeys(several("handles", handles, kind, f"a handle ({kind.__name__}, as of `job(ID)`)")):
            self._handles.setdefault((handle.tenant, handle.id), []).append(handle)

    def __len__(self) -> int:
        """Of jobs, not handles."""
        return len(self._handles)

    def __str__(self) -> str:
        ids = [job_id for _, job_id in islice(self._handles, MAX_NAMED)]
        if len(self) == 1:
            return f"job {ids[0]}"
        more = len(self) - len(ids)
        return f"{len(self)} jobs ({', '.join(ids)}{f' and {more} more' if more else ''})"

    def ids(self) -> dict[str, list[str]]:
        """By tenant."""
        found: dict[str, list[str]] = {}
        for tenant, job_id in self._handles:
            found.setdefault(tenant, []).append(job_id)
        return found

    def end(self, ends: Mapping[Key, End]) -> list[H]:
        """The handles of these jobs, told how they ended and awaited no longer."""
        ended: list[H] = []
        for key, end in ends.items():
            for handle in self._handles.pop(key):
                handle.end = end
                ended.append(handle)
        return ended

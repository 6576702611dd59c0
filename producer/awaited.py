"""Handles on jobs that are waited for; shared by both clients."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Generic, Protocol, TypeVar

from .errors import UnknownJob
from .schema import Status

MAX_NAMED = 3

Key = tuple[str, str]  # tenant, job id
End = Status | UnknownJob


class Handle(Protocol):
    """What is awaited of a handle."""

    id: str
    tenant: str

    def finish(self, end: End) -> None: ...


H = TypeVar("H", bound=Handle)


class Awaited(Generic[H]):
    """Several handles may be on one job, and one id may be asked for by two tenants."""

    def __init__(self, handles: Iterable[H]) -> None:
        self._handles: dict[Key, list[H]] = {}
        for handle in dict.fromkeys(handles):
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
                handle.finish(end)
                ended.append(handle)
        return ended

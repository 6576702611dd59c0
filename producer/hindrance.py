"""Why a job of a queue waits.  Pure; from what the store knows of the queue and what its groups say of themselves."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from .store import GroupBeat, QueueInfo

KV_FULL = 0.9
MAX_SHOWN = 3


class Why(StrEnum):
    """Stable; match on this."""

    NO_GROUP = "no_group"
    NOT_READY = "not_ready"
    DRAINING = "draining"
    SUSPECTS = "suspects"
    FULL = "full"
    MEMORY = "memory"


@dataclass(frozen=True, slots=True)
class Hindrance:
    """What stands between a job and a group; `text` is for people and says what to do where something can be done."""

    why: Why
    text: str


def hindrance(queue: QueueInfo) -> Hindrance | None:
    """Why a job that is sent now would wait; None if some group has room for it."""
    if not queue.groups:
        left = f"; {counted(queue.running, 'job')} of a dead one go on with it" if queue.running else ""
        return Hindrance(Why.NO_GROUP, f"no group is alive: start one (hortator up, hortator worker){left}")
    ready = [beat for beat in queue.groups if beat.state == "ready"]
    if not ready:
        return _nobody_ready(queue.groups)
    if queue.suspects:
        return Hindrance(
            Why.SUSPECTS, f"{counted(queue.suspects, 'job')} of a crashed batch must run alone first, each for a moment"
        )
    if all(_starved(beat) for beat in ready):
        return Hindrance(Why.MEMORY, f"the KV cache of {_names(ready)} is full: jobs wait for blocks, not for rows")
    if all(_full(beat) for beat in ready):
        rows = sum(beat.capacity for beat in ready)
        return Hindrance(Why.FULL, f"all {counted(rows, 'row')} of {counted(len(ready), 'group')} are taken")
    return None


def queue_facts(queue: QueueInfo) -> dict[str, Any]:
    """A queue as programs are shown it, over HTTP and by `status --json` alike."""
    found = hindrance(queue)
    return asdict(queue) | {"hindrance": asdict(found) if found else None}


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _nobody_ready(groups: Sequence[GroupBeat]) -> Hindrance:
    if all(beat.state == "draining" for beat in groups):
        does = "drains and takes" if len(groups) == 1 else "drain and take"
        return Hindrance(Why.DRAINING, f"{_names(groups)} {does} nothing: hortator resume, or restart")
    told = [
        f"{beat.group} is {beat.state}" + (f": {beat.info['last_failure']}" if beat.info.get("last_failure") else "")
        for beat in groups[:MAX_SHOWN]
    ]
    return Hindrance(Why.NOT_READY, "no group is ready: " + "; ".join(told))


def _full(beat: GroupBeat) -> bool:
    """By its rows: a job with several answers takes as many."""
    return beat.running >= beat.capacity or (not beat.room and _waiting(beat))


def _starved(beat: GroupBeat) -> bool:
    kv_use = beat.info.get("kv_use")
    return isinstance(kv_use, int | float) and kv_use >= KV_FULL and _waiting(beat)


def _waiting(beat: GroupBeat) -> bool:
    """Some of its sequences have no row or no blocks yet."""
    waiting = beat.info.get("waiting")
    return isinstance(waiting, int) and waiting > 0


def _names(groups: Sequence[GroupBeat]) -> str:
    more = len(groups) - MAX_SHOWN
    return ", ".join(beat.group for beat in groups[:MAX_SHOWN]) + (f" and {more} more" if more > 0 else "")

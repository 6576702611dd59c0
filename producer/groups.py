"""The groups that are alive, by their names, for whoever steers them or waits for them."""

import time
from collections.abc import Callable, Mapping, Sequence

from .errors import StoreUnavailable
from .store import GroupBeat, QueueInfo

SILENCE_S = 30.0
"""For so long who waits for groups anyway waits for a Redis that is away, too, as the groups do."""

POLL_S = 0.25
DEFAULT_GRACE_S = 30.0
ENDING = ("stopping", "restarting")
"""States of a group that hears nothing more in this life."""


def by_name(
    look: Callable[[], Sequence[QueueInfo]], *, patience_s: float = 0.0, on_away: Callable[[str], None] | None = None
) -> dict[str, GroupBeat]:
    """As the groups last said of themselves; `look` is a store's or a client's `queues`, `on_away` hears what a Redis
    that is waited for says.

    Raises StoreUnavailable if Redis stays away for longer than `patience_s`."""
    until = time.monotonic() + patience_s
    while True:
        try:
            return {beat.group: beat for queue in look() for beat in queue.groups}
        except StoreUnavailable as problem:
            if time.monotonic() >= until:
                raise
            if on_away is not None:
                on_away(problem.message)
            time.sleep(POLL_S)


def ending(groups: Mapping[str, GroupBeat]) -> dict[str, GroupBeat]:
    """Those that were told to stop, or to start anew."""
    return {name: beat for name, beat in groups.items() if beat.state in ENDING}


def grace_s(beat: GroupBeat) -> float:
    """How long it may take to finish what it runs; leaders of versions that do not say have the default."""
    said = beat.info.get("grace_s")
    return float(said) if isinstance(said, int | float) else DEFAULT_GRACE_S

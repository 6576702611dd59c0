"""What ranks print goes to the front's log, but no faster than a disk can bear: one that prints in a loop would fill it
within minutes."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

BURST_BYTES = 1 << 20
BYTES_PER_S = 16 * 1024

log = logging.getLogger("hortator.rank")


@dataclass(slots=True)
class _Share:
    """What one rank may still print."""

    left: float
    since: float
    num_dropped: int = 0


class RankLog:
    """A LineSink.  What a rank prints beyond its burst and rate is counted instead, and told when there is room again.

    Lines of one rank come from one thread at a time.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._shares: dict[int, _Share] = {}

    def __call__(self, rank: int, text: str) -> None:
        now = self._clock()
        share = self._shares.setdefault(rank, _Share(BURST_BYTES, now))
        share.left = min(BURST_BYTES, share.left + (now - share.since) * BYTES_PER_S)
        share.since = now
        wanted = max(len(text), BYTES_PER_S if share.num_dropped else 0)  # rather some lines together than one at times
        if share.left < wanted:
            share.num_dropped += 1
        else:
            self._tell_dropped(rank, share)
            share.left -= len(text)
            log.info("[rank %d] %s", rank, text)

    def flush(self) -> None:
        """A life of the group is over: say now what was dropped."""
        for rank, share in self._shares.items():
            self._tell_dropped(rank, share)

    @staticmethod
    def _tell_dropped(rank: int, share: _Share) -> None:
        if share.num_dropped:
            log.warning("[rank %d] (hortator: %d lines came too fast and were dropped)", rank, share.num_dropped)
            share.num_dropped = 0

"""Who may call a leader dead: only one that could itself have heard of it."""

import logging
import time
from collections.abc import Callable, Iterable

from .errors import StoreUnavailable
from .store import Store, SweepReport

logger = logging.getLogger("hortator.sweeper")

MAX_TOLD = 1000  # damaged keys that are remembered as logged

GAP_S = 1.5  # a longer silence, on whichever side, breaks the contact; a shorter one leaves leaders the time to renew


class Sweeper:
    """Sweeps a store again and again without taking an outage of Redis for dead leaders.

    While Redis is away nobody can renew, so after an outage all leases look expired.  Two rules prevent the take-over:
    leases count as expired only after this sweeper has been in unbroken contact for longer than a lease, and only if
    they had run out by its previous contact already.  Call `tick` a few times a second.
    """

    def __init__(self, store: Store, lease_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._lease_s = lease_s
        self._clock = clock
        self._longest_gap_s = max(lease_s / 3, GAP_S)
        self._since = clock()  # start of the unbroken contact
        self._last = clock()
        self._last_ms = 0  # the last contact on the store's clock
        self._told: dict[str, None] = {}  # damage that the log has, oldest first

    def tick(self) -> SweepReport:
        """One sweep; nothing (and no error) while the store is unavailable."""
        started = self._clock()
        if started - self._last > self._longest_gap_s:
            self._since = started  # we were not looking, or stopped
        trusted = started - self._since > self._lease_s
        try:
            report = self._store.sweep(expired_before_ms=self._last_ms if trusted else 0)
        except StoreUnavailable:
            self._since = self._last = self._clock()
            self._last_ms = 0
            return SweepReport()
        self._last = self._clock()
        self._last_ms = report.now_ms
        self._tell(report.damage)
        if self._last - started > self._longest_gap_s:
            self._since = self._last  # Redis was stopped meanwhile
        return report

    def _tell(self, damage: Iterable[str]) -> None:
        """Log each damaged key once."""
        for one in damage:
            if one not in self._told:
                self._told[one] = None
                logger.warning("damaged in Redis, passed by or dropped: %s", one)
        while len(self._told) > MAX_TOLD:
            del self._told[next(iter(self._told))]

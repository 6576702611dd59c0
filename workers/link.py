"""The way to the store as the front sees it: open, or away for a moment."""

import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from hortator.producer.errors import StoreUnavailable

logger = logging.getLogger("hortator.front")

P = ParamSpec("P")
T = TypeVar("T")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 1.0


class Link:
    """Calls the store unless it failed a moment ago, and says in the log when it goes and when it is back."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._away_since: float | None = None
        self._retry_at = 0.0
        self._pause_s = FIRST_PAUSE_S

    @property
    def away(self) -> bool:
        return self._away_since is not None

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Raises StoreUnavailable at once while the last failure is fresh: a hung Redis must not hang the front."""
        if self._clock() < self._retry_at:
            raise StoreUnavailable("Redis was away a moment ago")
        try:
            result = function(*args, **kwargs)
        except StoreUnavailable as error:
            self._lost(error)
            raise
        self._found()
        return result

    def _lost(self, error: StoreUnavailable) -> None:
        now = self._clock()
        if self._away_since is None:
            self._away_since = now
            logger.warning("Redis does not answer; results are kept and sent later: %s", error)
        self._retry_at = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def _found(self) -> None:
        if self._away_since is not None:
            logger.info("Redis is back after %.1f s", self._clock() - self._away_since)
            self._away_since = None
            self._pause_s = FIRST_PAUSE_S

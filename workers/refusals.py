"""Refused jobs in the log: a line each, but a producer that sends nothing else must not fill the disk."""

import logging
from collections import Counter
from collections.abc import Callable

logger = logging.getLogger("hortator.front")

PERIOD_S = 60.0
LINES_A_PERIOD = 20


class Refusals:
    """Tells the first few of a period; the others are counted by code, and told in one line when it is over."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since = clock()
        self._num_told = 0
        self._untold = Counter[str]()

    def note(self, job_id: str, code: str) -> None:
        self.turn_over()
        if self._num_told < LINES_A_PERIOD:
            self._num_told += 1
            logger.info("job %s is refused: %s", job_id, code)
        else:
            self._untold[code] += 1

    def turn_over(self) -> None:
        """Call it now and then, for the end of a period that nothing follows."""
        now = self._clock()
        if now - self._since < PERIOD_S:
            return
        self._since, self._num_told = now, 0
        self.flush()

    def flush(self) -> None:
        """Tell what was only counted."""
        if self._untold:
            codes = ", ".join(f"{code} {number}" for code, number in self._untold.most_common())
            logger.info("%d more jobs were refused: %s", self._untold.total(), codes)
            self._untold.clear()

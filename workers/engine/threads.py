"""How many threads a step uses on a CPU: as few as take no longer.

Threads shorten matrix products and nothing else.  In a step of single tokens through a small model little time goes
there; more threads then gain nothing, spin while they wait for each other, and keep cores from the front, Redis and
other ranks.  What counts as small depends on the model, the machine and whatever else runs there, so the steps
themselves are timed: now and then some of them, every other one, use half or twice as many threads.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import TypeVar

import torch

SLACK = 1.05  # fewer threads may take so much longer
PAIRS = 5  # steps with each number of threads, in turn
SOON, LATER = 16, 1_024  # steps until it is tried again: after a change, then ever more

T = TypeVar("T")


class Threads:
    """Runs steps with as many threads as they deserve; those of more than `small` tokens with all of torch's.

    Each rank decides for itself: how a step is cut among threads changes nothing of what ranks must share.
    """

    def __init__(self, *, small: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._most = self.few = torch.get_num_threads()
        self._small = small
        self._clock = clock
        self._patience = self._pause = SOON
        self._falling = True
        self._times: dict[int, list[float]] = {}
        self._choose_other()

    def run(self, num_tokens: int, step: Callable[[], T]) -> T:
        """What `step` returns."""
        if self._most == 1:
            return step()
        if num_tokens > self._small:
            torch.set_num_threads(self._most)
            return step()
        number = self._turn()
        torch.set_num_threads(number)
        begun = self._clock()
        outcome = step()
        self._took(number, self._clock() - begun)
        return outcome

    def _turn(self) -> int:
        """How many threads are this step's."""
        if self._pause:
            return self.few
        return min(self._times, key=lambda number: len(self._times[number]))

    def _took(self, number: int, seconds: float) -> None:
        if self._pause:
            self._pause -= 1
            return
        self._times[number].append(seconds)
        if all(len(times) == PAIRS for times in self._times.values()):
            self._decide()

    def _decide(self) -> None:
        fewer, more = sorted(self._times)
        enough = median(self._times[fewer]) <= SLACK * median(self._times[more])
        before, self.few = self.few, fewer if enough else more
        if self.few == before:
            self._falling = not self._falling
        self._pause = self._patience = SOON if self.few != before else min(LATER, 2 * self._patience)
        self._choose_other()

    def _choose_other(self) -> None:
        """The number to compare with: half or twice as many, on in the direction that was better."""
        if self.few == (1 if self._falling else self._most):
            self._falling = not self._falling
        other = self.few // 2 if self._falling else min(self._most, 2 * self.few)
        self._times = {self.few: [], other: []}

"""Those who wait, and whose turn it is.  Pure Python and deterministic, as scheduler.py, which decides whether there is
room for them."""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice, takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .scheduler import Sequence

CLASS_WEIGHTS = (8, 4, 1)
"""Share of the admissions that each priority class gets while all of them wait."""
LOOK_AHEAD = 16
"""How many of a class are looked at for the best to admit next, and how often any of them may be passed over."""


class Lines:
    """A line for each priority class, in the order of arrival, and before it those of the class who were preempted."""

    def __init__(self, num_cached: "Callable[[Sequence], int]") -> None:
        """`num_cached`: how many blocks of a sequence need not be computed, as things are."""
        self._num_cached = num_cached
        self._returning: tuple[deque[Sequence], ...] = tuple(deque() for _ in CLASS_WEIGHTS)
        self._waiting: tuple[deque[Sequence], ...] = tuple(deque() for _ in CLASS_WEIGHTS)
        self._credits = [0] * len(CLASS_WEIGHTS)

    def __iter__(self) -> "Iterator[Sequence]":
        """In no particular order beyond: preempted ones first, then by class and arrival."""
        return (sequence for line in (*self._returning, *self._waiting) for sequence in line)

    def join(self, sequence: "Sequence") -> None:
        """At the end of its class."""
        self._waiting[sequence.request.priority].append(sequence)

    def come_back(self, sequence: "Sequence", *, first: bool) -> None:
        """Before all of its class that wait; first or last among those who came back."""
        returning = self._returning[sequence.request.priority]
        if first:
            returning.appendleft(sequence)
        else:
            returning.append(sequence)

    def leave(self, sequence: "Sequence") -> None:
        """It waits no longer, and took no turn."""
        line = self._returning if self.returns(sequence) else self._waiting
        line[sequence.request.priority].remove(sequence)

    def take_turn(self, sequence: "Sequence") -> None:
        """It leaves because it is admitted: who came before it was passed over, and its class has had its share."""
        chosen = sequence.request.priority
        if not self._returning[chosen]:
            for passed in takewhile(lambda s: s is not sequence, self._waiting[chosen]):
                passed.overtaken += 1
            self._charge(chosen)
        self.leave(sequence)

    def returns(self, sequence: "Sequence") -> bool:
        """It was preempted."""
        return sequence in self._returning[sequence.request.priority]

    def is_empty(self, chosen: int) -> bool:
        """Nobody of this class waits."""
        return not self._returning[chosen] and not self._waiting[chosen]

    def next_class(self, *, above: int) -> int | None:
        """That of a preempted sequence, or by smooth weighted round robin over the classes that wait: none starves."""
        classes = range(above)
        for c in classes:
            if self._returning[c]:
                return c
        waiting = [c for c in classes if self._waiting[c]]
        return max(waiting, key=lambda c: self._credits[c] + CLASS_WEIGHTS[c], default=None)

    def next_in(self, chosen: int) -> "Sequence":
        """Who was preempted, then the nearest deadline, then the longest cached prefix, then who came first; nobody is
        passed over for ever."""
        if returning := self._returning[chosen]:
            return returning[0]
        line = self._waiting[chosen]
        if len(line) == 1 or line[0].overtaken >= LOOK_AHEAD:  # nobody was overtaken more often than the first
            return line[0]
        return max(islice(line, LOOK_AHEAD), key=self._urgency)

    def _urgency(self, sequence: "Sequence") -> tuple[float, int]:
        deadline = sequence.request.deadline_ms
        return (-deadline if deadline else float("-inf"), self._num_cached(sequence))

    def _charge(self, chosen: int) -> None:
        waiting = [c for c, line in enumerate(self._waiting) if line or c == chosen]
        for c in waiting:
            self._credits[c] += CLASS_WEIGHTS[c]
        self._credits[chosen] -= sum(CLASS_WEIGHTS[c] for c in waiting)

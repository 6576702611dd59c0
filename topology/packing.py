"""Who goes where: groups onto the free slots of hosts, so that little is left in pieces too small to use.  Pure.

A group is `count` units of `width` slots; a unit stays on one host.  The hardest groups are placed first (bin packing
by decreasing size).  A group that fits one host gets the fullest host that has room; a larger one takes the emptiest
hosts, for the fewest borders, and its last part again the fullest that has room.  Equal input gives equal output.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Demand:
    """One group.  `kinds`: the kinds of host that will do."""

    width: int
    count: int
    kinds: frozenset[int]

    @property
    def slots(self) -> int:
        return self.width * self.count


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive units of one group on one host."""

    host: int
    units: int


class FreeSlots:
    """How many slots of each host are free, and which host has how many.  Hosts are numbered; `kinds` tells them apart
    where a group is particular about them."""

    def __init__(self, free: Sequence[int], kinds: Sequence[int]) -> None:
        self._free = list(free)
        self._kinds = kinds
        self._heaps: dict[tuple[int, int], list[int]] = {}
        """Hosts by kind and number of free slots, lowest first; entries no longer true are dropped when met."""
        for host in range(len(free)):
            self._note(host)

    def __getitem__(self, host: int) -> int:
        return self._free[host]

    def take(self, host: int, slots: int) -> None:
        """Negative `slots` gives them back."""
        self._free[host] -= slots
        self._note(host)

    def fullest_with(self, slots: int, kinds: Iterable[int]) -> int | None:
        """The host with the fewest free slots that are enough."""
        return next(self._hosts(lambda free: free >= slots, kinds, reverse=False), None)

    def emptiest(self, kinds: Iterable[int]) -> int | None:
        return next(self._hosts(lambda free: free > 0, kinds, reverse=True), None)

    def _note(self, host: int) -> None:
        heapq.heappush(self._heaps.setdefault((self._kinds[host], self._free[host]), []), host)

    def _hosts(self, wanted: Callable[[int], bool], kinds: Iterable[int], *, reverse: bool) -> Iterator[int]:
        """The first host of each count of free slots, over all kinds."""
        kinds = frozenset(kinds)
        counts = {free for kind, free in self._heaps if kind in kinds and wanted(free)}
        for free in sorted(counts, reverse=reverse):
            if hosts := [host for kind in kinds if (host := self._first(kind, free)) is not None]:
                yield min(hosts)

    def _first(self, kind: int, free: int) -> int | None:
        heap = self._heaps.get((kind, free), [])
        while heap and self._free[heap[0]] != free:
            heapq.heappop(heap)
        return heap[0] if heap else None


def pack(demands: Sequence[Demand], free: Sequence[int], kinds: Sequence[int]) -> list[tuple[Part, ...] | None]:
    """The parts of each group in the order of hosts; None for groups that found no room.

    Several orders are tried, and the first that places all is taken, else the one that places most slots.
    """
    best: list[tuple[Part, ...] | None] = []
    most = -1
    for order in _orders(demands):
        slots = FreeSlots(free, kinds)
        placed: list[tuple[Part, ...] | None] = [None] * len(demands)
        refused: set[Demand] = set()  # what found no room once finds none later
        for index in order:
            if demands[index] not in refused:
                placed[index] = _place(demands[index], slots)
                if placed[index] is None:
                    refused.add(demands[index])
        filled = sum(demand.slots for demand, parts in zip(demands, placed, strict=True) if parts is not None)
        if filled > most:
            best, most = placed, filled
        if not refused:
            break
    return best


def _orders(demands: Sequence[Demand]) -> Iterator[list[int]]:
    indices = range(len(demands))
    yield sorted(indices, key=lambda i: (-demands[i].width, -demands[i].slots, i))
    yield sorted(indices, key=lambda i: (-demands[i].slots, -demands[i].width, i))
    yield list(indices)


def _place(demand: Demand, slots: FreeSlots) -> tuple[Part, ...] | None:
    """Takes what it needs, or nothing."""
    parts: list[Part] = []
    left = demand.count
    while left:
        host = slots.fullest_with(left * demand.width, demand.kinds)
        host = slots.emptiest(demand.kinds) if host is None else host
        units = 0 if host is None else min(left, slots[host] // demand.width)
        if host is None or not units:
            for part in parts:
                slots.take(part.host, -part.units * demand.width)
            return None
        slots.take(host, units * demand.width)
        parts.append(Part(host, units))
        left -= units
    return tuple(sorted(parts, key=lambda part: part.host))

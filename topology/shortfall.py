"""What to say when a fleet does not fit its hosts: the numbers, and the nearest plan that does.  Pure."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from .advice import Change, changed, cut, group_sizes, worded
from .fleet import ModelSpec
from .ground import Ground, Placement, Shapes

_SHOWN_HOSTS = 6
_MAX_TRIES = 60


@dataclass(frozen=True, slots=True)
class Shortfall:
    """A fleet of `models` whose groups could not all be placed: `placed` has what could."""

    models: tuple[ModelSpec, ...]
    ground: Ground
    shapes: Shapes
    placed: Sequence[Placement | None]

    def __str__(self) -> str:
        nearest = [wording for wording in (self._fewer_replicas(), self._other_cut()) if wording]
        end = f"what fits: {', or '.join(nearest)}" if nearest else "use more hosts, or fewer models"
        return f"{self._numbers()}: {end}"

    # --- the numbers

    def _numbers(self) -> str:
        needed, available = _slots(self.models), sum(self.ground.free)
        wanted = ", ".join(
            f"{spec.name} {spec.replicas} x tp {spec.tensor_parallel_size} x pp {spec.pipeline_parallel_size}"
            for spec in self.models
        )
        if needed > available:
            hosts = self._hosts(self.ground.free)
            return f"the fleet needs {self._count(needed)} ({wanted}), but there are {available} ({hosts})"
        return f"{self._no_room()}; the fleet needs {needed} of {self._count(available)} ({wanted})"

    def _no_room(self) -> str:
        """Enough slots in all, but in pieces that are too small, or of GPUs that are."""
        spec = next(spec for spec, parts in zip(self._owners(), self.placed, strict=True) if parts is None)
        demand = self.ground.demand(spec, self.shapes.get(spec.name))
        left = self._left()
        usable = [n if kind in demand.kinds else 0 for n, kind in zip(left, self.ground.kinds, strict=True)]
        together = (
            "" if demand.width == 1 else f", each {demand.width} on one host" if demand.count > 1 else " on one host"
        )
        memory = " with enough memory" if sum(usable) < sum(left) else ""
        return (
            f"a group of {spec.name} needs {self._count(demand.slots)}{together}, but beside the others "
            f"{sum(usable)}{memory} are left ({self._hosts(usable)})"
        )

    def _owners(self) -> Iterator[ModelSpec]:
        """The model of each group."""
        return (spec for spec in self.models for _ in range(spec.replicas))

    def _left(self) -> list[int]:
        left = self.ground.free
        for spec, parts in zip(self._owners(), self.placed, strict=True):
            for part in parts or ():
                left[part.host] -= part.units * self.ground.demand_width(spec)
        return left

    def _hosts(self, counts: Sequence[int]) -> str:
        """Per host while they are few; else how many hosts have how many."""
        some = [(host.address, count) for host, count in zip(self.ground.hosts, counts, strict=True) if count]
        if len(some) <= _SHOWN_HOSTS:
            return ", ".join(f"{address}: {count}" for address, count in some) or "none on any host"
        return ", ".join(f"{hosts} hosts with {count}" for count, hosts in sorted(Counter(n for _, n in some).items()))

    def _count(self, slots: int) -> str:
        noun = "slot" if all(spec.device == "cpu" for spec in self.models) else "GPU"
        return f"{slots} {noun}{'' if slots == 1 else 's'}"

    # --- the nearest plan

    def _fits(self, models: Sequence[ModelSpec]) -> bool:
        return _slots(models) <= sum(self.ground.free) and None not in self.ground.place(models, self.shapes)

    def _fewer_replicas(self) -> str | None:
        """All models scaled down alike, then each raised as far as it goes."""
        scale = min(1.0, sum(self.ground.free) / _slots(self.models))
        models = [_with_replicas(spec, max(1, int(spec.replicas * scale))) for spec in self.models]
        if not self._fits(models):
            models = [_with_replicas(spec, 1) for spec in self.models]
            if not self._fits(models):
                return None
        for number, spec in enumerate(self.models):
            models[number] = self._raised(models, number, spec.replicas)
        pairs = zip(self.models, models, strict=True)
        return " and ".join(f"{b.name} with replicas={b.replicas}" for a, b in pairs if b.replicas < a.replicas)

    def _raised(self, models: Sequence[ModelSpec], number: int, most: int) -> ModelSpec:
        """The model with as many replicas as fit beside the others: a search by halves between what fits and `most`."""
        low, high = models[number].replicas, most
        while low < high:
            middle = (low + high + 1) // 2
            tried = [*models]
            tried[number] = _with_replicas(models[number], middle)
            low, high = (middle, high) if self._fits(tried) else (low, middle - 1)
        return _with_replicas(models[number], low)

    def _other_cut(self) -> str | None:
        """Other groups of one model, all replicas kept: of one that lacks room if that helps, else of a large one."""
        short = {spec.name for spec, parts in zip(self._owners(), self.placed, strict=True) if parts is None}
        order = sorted(self.models, key=lambda spec: (spec.name not in short, -spec.world_size * spec.replicas))
        tries = ((spec, change) for spec in order for change in self._cuts(spec))
        for spec, change in islice(tries, _MAX_TRIES):
            if self._fits([changed(other, change) if other is spec else other for other in self.models]):
                return f"{spec.name} with {worded(change)}"
        return None

    def _cuts(self, spec: ModelSpec) -> list[Change]:
        """Fewer ranks, or as many in narrower units, which fill gaps better.  Fewest settings changed first."""
        shape = self.shapes.get(spec.name)
        asked = spec.tensor_parallel_size, spec.pipeline_parallel_size
        if shape is not None:
            sizes = group_sizes(shape, spec, max_tp=self.ground.widest)
        else:  # only what is sure to divide what `asked` divides
            sizes = [(tp, pp) for tp in range(1, asked[0] + 1) if asked[0] % tp == 0 for pp in range(1, asked[1] + 1)]
        smaller = [pair for pair in sizes if (pair[0] * pair[1], pair[0]) < (spec.world_size, asked[0])]
        smaller.sort(key=lambda pair: (pair[0] != asked[0], pair[1] != asked[1], -pair[0] * pair[1], pair))
        return [cut(spec, *pair) for pair in smaller]


def _with_replicas(spec: ModelSpec, replicas: int) -> ModelSpec:
    return changed(spec, {"replicas": replicas})


def _slots(models: Sequence[ModelSpec]) -> int:
    return sum(spec.world_size * spec.replicas for spec in models)

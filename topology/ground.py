"""The hosts as a plan sees them: free slots, and the memory of their GPUs.  Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from . import advice
from .errors import DoesNotFit
from .fleet import Fleet, ModelSpec
from .hostfilter import HostSlots
from .memory import MemoryFit, fit
from .modelshape import ModelShape
from .packing import Demand, Part, pack

Shapes = Mapping[str, ModelShape]
Placement = tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Ground:
    """Hosts in the hostfile's order; `kinds` numbers the sizes of GPU memory that there are."""

    hosts: tuple[HostSlots, ...]
    kinds: tuple[int, ...]  # of each host
    sizes: tuple[int | None, ...]  # of each kind, in bytes; None: not known
    widest: int  # slots of the largest host

    @classmethod
    def of(cls, fleet: Fleet, hosts: Sequence[HostSlots]) -> Self:
        found: dict[int | None, int] = {}
        kinds = tuple(found.setdefault(fleet.gpu_memory(host.address), len(found)) for host in hosts)
        return cls(tuple(hosts), kinds, tuple(found), max((len(host.slots) for host in hosts), default=0))

    @property
    def free(self) -> list[int]:
        return [len(host.slots) for host in self.hosts]

    def gpu_bytes(self, host: int) -> int | None:
        return self.sizes[self.kinds[host]]

    def suitable(self, spec: ModelSpec, shape: ModelShape | None) -> frozenset[int]:
        """The kinds of host whose GPUs are large enough for `spec`."""
        everything = range(len(self.sizes))
        if shape is None or spec.device == "cpu":
            return frozenset(everything)
        return frozenset(kind for kind in everything if advice.fits(shape, spec, self.sizes[kind]))

    def demand_width(self, spec: ModelSpec) -> int:
        """Slots that must be on one host: a stage's, unless no host is large enough."""
        return spec.tensor_parallel_size if spec.tensor_parallel_size <= self.widest else 1

    def demand(self, spec: ModelSpec, shape: ModelShape | None) -> Demand:
        """One group of `spec`."""
        width = self.demand_width(spec)
        return Demand(width, spec.world_size // width, self.suitable(spec, shape))

    def place(self, models: Sequence[ModelSpec], shapes: Shapes) -> list[Placement | None]:
        """A placement for each group of each model, in this order; None where there is no room."""
        demands = [self.demand(spec, shapes.get(spec.name)) for spec in models]
        groups = [demand for spec, demand in zip(models, demands, strict=True) for _ in range(spec.replicas)]
        return pack(groups, self.free, self.kinds)

    def check_memory(self, spec: ModelSpec, shape: ModelShape) -> None:
        """Raises DoesNotFit, with the numbers and what would fit, if no GPU is large enough, not even one of unknown
        size; BadModel if the model cannot be cut that way on any."""
        known = [size for size in self.sizes if size is not None and spec.device != "cpu"]
        largest = max(known) if len(known) == len(self.sizes) else None
        checked_fit(shape, spec, largest, max_tp=self.widest)


def checked_fit(shape: ModelShape, spec: ModelSpec, gpu_bytes: int | None, *, max_tp: int) -> MemoryFit:
    """What fits on GPUs that are all of this size.  Raises BadModel, and DoesNotFit that says what would."""
    try:
        return fit(shape, spec, [gpu_bytes] * spec.world_size)
    except DoesNotFit as problem:
        found = advice.for_memory(shape, spec, gpu_bytes, max_tp=max_tp)
        raise DoesNotFit(f"{problem}: {advice.listed(found)}") from None

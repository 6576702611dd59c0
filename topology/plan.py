"""The plan of a fleet: which rank of which group sits on which slot of which host, and what it needs there.  Pure.

Ranks of one stage (tensor parallel, many small messages) share a host where any host is large enough; stages (pipeline
parallel, one message a step) may be on different ones.  A host appears once in a group, with consecutive ranks.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import Literal, NamedTuple

from .address import canonical
from .errors import BadFleet, DoesNotFit
from .findings import counted, grouped, named
from .fleet import Fleet, ModelSpec, Table
from .ground import Ground, Placement, Shapes
from .hostfile import Host
from .hostfilter import HostSlots
from .memory import MemoryFit, fit, usable_bytes
from .shortfall import Shortfall
from .traffic import PLAN_HEADER_BYTES, SAMPLED_TOKEN_BYTES, Traffic, traffic

LinkKind = Literal["plan", "all_reduce", "hidden", "tokens"]
Per = Literal["token", "step", "sequence"]
LEADERS_PORTS = frozenset({"HORTATOR_CONTROL_PORT", "HORTATOR_STORE_PORT", "HORTATOR_KEEPER_PORT"})


class PlannedRank(Table):
    """One process.  Bytes are None where the model's sizes or the GPU's memory are not known."""

    rank: int
    tp_rank: int
    pp_rank: int
    host: str
    slot: int
    first_layer: int | None
    last_layer: int | None
    weight_bytes: int | None
    workspace_bytes: int | None
    kv_bytes: int | None
    needed_bytes: int | None
    available_bytes: int | None


class Link(Table):
    """What travels between these ranks: bytes a token of the step, or a step where `per` says so."""

    kind: LinkKind
    ranks: tuple[int, ...]
    size_bytes: int | None
    per: Per
    crosses_hosts: bool


class Seats(Table):
    """The slots of one host that one group has."""

    host: str
    devices: tuple[int, ...]


class PlannedGroup(Table):
    """One replica of one model."""

    name: str
    model: str
    replica: int
    device: Literal["auto", "cpu", "cuda"]
    tensor_parallel_size: int
    pipeline_parallel_size: int
    hosts: tuple[Seats, ...]  # in the order of the ranks; the leader is on the first
    ranks: tuple[PlannedRank, ...]
    links: tuple[Link, ...]
    max_model_len: int | None
    kv_tokens: int | None
    max_sequences: int | None  # of max_model_len tokens, at the same time

    @property
    def slot_noun(self) -> str:
        """What a rank sits on."""
        return "slot" if self.device == "cpu" else "GPU"


class PlannedHost(Table):
    """One host of the hostfile as far as it may be used."""

    address: str
    slots: tuple[int, ...]
    free: tuple[int, ...]
    gpu_memory_bytes: int | None


class Plan(Table):
    """Where everything runs."""

    hosts: tuple[PlannedHost, ...]
    groups: tuple[PlannedGroup, ...]
    num_slots: int
    num_free: int
    notes: tuple[str, ...]

    @property
    def slot_noun(self) -> str:
        """What the hosts have: slots, if no group wants a GPU."""
        return "GPU" if any(group.device != "cpu" for group in self.groups) else "slot"


def make_plan(fleet: Fleet, hosts: Sequence[HostSlots], shapes: Shapes) -> Plan:
    """Place every group of `fleet` on `hosts`; `shapes` has the sizes of the models that are known, by name.

    Raises DoesNotFit, with the numbers and the nearest plan that fits, and BadModel.  Equal input, equal plan.
    """
    ground = Ground.of(fleet, hosts)
    for spec in fleet.models:
        if spec.name in shapes:
            ground.check_memory(spec, shapes[spec.name])
    placed = ground.place(fleet.models, shapes)
    if None in placed:
        raise DoesNotFit(str(Shortfall(fleet.models, ground, shapes, placed)))
    builder = _Builder(ground, shapes)
    wishes = [(spec, replica) for spec in fleet.models for replica in range(spec.replicas)]
    groups = tuple(builder.group(*wish, parts) for wish, parts in zip(wishes, placed, strict=True) if parts is not None)
    check_ports(fleet, groups)
    planned = builder.hosts()
    return Plan(
        hosts=planned,
        groups=groups,
        num_slots=sum(len(host.slots) for host in planned),
        num_free=sum(len(host.free) for host in planned),
        notes=tuple(_notes(fleet, ground, shapes)),
    )


def check_hosts(fleet: Fleet, hosts: Sequence[Host]) -> None:
    """A [hosts.…] table for a host that there is not is a mistake in its name."""
    known = {canonical(host.address) for host in hosts}
    if strange := [address for address in fleet.hosts if address not in known]:
        raise BadFleet(f"fleet file: hosts.{strange[0]}: the hostfile has no such host: correct the name, or remove it")


def check_ports(fleet: Fleet, groups: Iterable["PlannedGroup"]) -> None:
    """One port of [environment] cannot be that of two leaders on one host."""
    fixed = [name for name in fleet.environment if name.upper() in LEADERS_PORTS and fleet.environment[name] != "0"]
    by_host = grouped({group.name: group.hosts[0].host for group in groups})
    for host, names in by_host.items():
        if fixed and len(names) > 1:
            raise BadFleet(
                f"fleet file: environment.{fixed[0]}: {named(names)} have their leaders on {host}, and one port is only"
                " one leader's: leave it out (ports are chosen when a group starts)"
            )


class _Builder:
    """Hands out slots, lowest first, and says what each rank needs."""

    def __init__(self, ground: Ground, shapes: Shapes) -> None:
        self._ground = ground
        self._shapes = shapes
        self._used = [0] * len(ground.hosts)
        self._fits: dict[tuple[str, tuple[int | None, ...]], tuple[MemoryFit, Traffic]] = {}

    def group(self, spec: ModelSpec, replica: int, parts: Placement) -> PlannedGroup:
        width = self._ground.demand_width(spec)
        seats = [(part.host, self._take(part.host, part.units * width)) for part in parts]
        places = [(host, slot) for host, slots in seats for slot in slots]
        sizes = tuple(None if spec.device == "cpu" else self._ground.gpu_bytes(host) for host, _ in places)
        found = self._fit(spec, sizes)
        return PlannedGroup(
            name=spec.group(replica),
            model=spec.name,
            replica=replica,
            device=spec.device,
            tensor_parallel_size=spec.tensor_parallel_size,
            pipeline_parallel_size=spec.pipeline_parallel_size,
            hosts=tuple(Seats(host=self._address(host), devices=slots) for host, slots in seats),
            ranks=tuple(
                self._rank(spec, rank, place, size, found)
                for rank, (place, size) in enumerate(zip(places, sizes, strict=True))
            ),
            links=tuple(_links(spec, [host for host, _ in places], found[1] if found else None)),
            max_model_len=found[0].max_model_len if found else spec.max_model_len,
            kv_tokens=found[0].kv_tokens if found else None,
            max_sequences=found[0].max_sequences if found else None,
        )

    def hosts(self) -> tuple[PlannedHost, ...]:
        return tuple(
            PlannedHost(
                address=host.address,
                slots=host.slots,
                free=host.slots[self._used[number] :],
                gpu_memory_bytes=self._ground.gpu_bytes(number),
            )
            for number, host in enumerate(self._ground.hosts)
        )

    def _address(self, host: int) -> str:
        return self._ground.hosts[host].address

    def _take(self, host: int, count: int) -> tuple[int, ...]:
        first = self._used[host]
        self._used[host] += count
        return self._ground.hosts[host].slots[first : first + count]

    def _fit(self, spec: ModelSpec, sizes: tuple[int | None, ...]) -> tuple[MemoryFit, Traffic] | None:
        shape = self._shapes.get(spec.name)
        if shape is None:
            return None
        key = spec.name, sizes
        if key not in self._fits:
            found = fit(shape, spec, sizes)
            self._fits[key] = found, traffic(shape, spec, found.ranks)
        return self._fits[key]

    def _rank(
        self,
        spec: ModelSpec,
        rank: int,
        place: tuple[int, int],
        size: int | None,
        found: tuple[MemoryFit, Traffic] | None,
    ) -> PlannedRank:
        pp_rank, tp_rank = divmod(rank, spec.tensor_parallel_size)
        memory = found[0].ranks[rank] if found else None
        return PlannedRank(
            rank=rank,
            tp_rank=tp_rank,
            pp_rank=pp_rank,
            host=self._address(place[0]),
            slot=place[1],
            first_layer=memory.layers.start if memory else None,
            last_layer=memory.layers.stop - 1 if memory else None,
            weight_bytes=memory.weight_bytes if memory else None,
            workspace_bytes=memory.workspace_bytes if memory else None,
            kv_bytes=found[0].kv_bytes(memory) if found and memory else None,
            needed_bytes=found[0].needed_bytes(memory) if found and memory else None,
            available_bytes=None if size is None else usable_bytes(size, spec),
        )


def _links(spec: ModelSpec, hosts: Sequence[int], known: Traffic | None) -> Iterator[Link]:
    """`hosts`: of each rank."""

    def link(kind: LinkKind, ranks: Sequence[int], size: int | None, per: Per = "token") -> Link:
        crosses = len({hosts[rank] for rank in ranks}) > 1
        return Link(kind=kind, ranks=tuple(ranks), size_bytes=size, per=per, crosses_hosts=crosses)

    tp_size, pp_size = spec.tensor_parallel_size, spec.pipeline_parallel_size
    everyone = range(spec.world_size)
    if spec.world_size == 1:
        return
    yield link("plan", everyone, PLAN_HEADER_BYTES, "step")
    stages = [everyone[stage * tp_size : (stage + 1) * tp_size] for stage in range(pp_size)]
    if tp_size > 1:
        for number, stage in enumerate(stages):
            yield link("all_reduce", stage, known.all_reduce_bytes[number] if known else None)
    for stage, following in pairwise(stages):
        yield link("hidden", [*stage, *following], known.hidden_bytes if known else None)
    yield link(
        "tokens",
        [stages[-1][0], *(rank for rank in everyone if rank != stages[-1][0])],
        SAMPLED_TOKEN_BYTES,
        "sequence",
    )


def _notes(fleet: Fleet, ground: Ground, shapes: Shapes) -> Iterator[str]:
    """What a reader should know before he trusts the plan."""
    for spec in fleet.models:
        noun = "slot" if spec.device == "cpu" else "GPU"
        if spec.name not in shapes:
            yield f"{spec.name}: its sizes are not known here: memory and traffic were not checked"
        if spec.tensor_parallel_size > ground.widest:
            yield (
                f"{spec.name}: no host has {counted(spec.tensor_parallel_size, noun)}: tensor parallel ranks talk "
                f"across hosts in every layer, which is slow; a larger pipeline_parallel_size is likely better"
            )
    unknown = sum(ground.sizes[kind] is None for kind in ground.kinds)
    if unknown and any(spec.device != "cpu" for spec in fleet.models):
        which = "any host" if unknown == len(ground.hosts) else f"{unknown} of {len(ground.hosts)} hosts"
        yield f"the GPU memory of {which} is not known: set gpu_memory_bytes in the fleet file to have it checked"


class Block(NamedTuple):
    """The ranks of one stage of a group on one host."""

    group: PlannedGroup
    pp_rank: int
    ranks: tuple[PlannedRank, ...]


def blocks_by_host(plan: Plan) -> dict[str, list[Block]]:
    """What a picture shows, in the order of the slots."""
    found: dict[str, list[Block]] = {host.address: [] for host in plan.hosts}
    for group in plan.groups:
        for (host, pp_rank), ranks in groupby(group.ranks, key=lambda rank: (rank.host, rank.pp_rank)):
            found[host].append(Block(group, pp_rank, tuple(ranks)))
    for blocks in found.values():
        blocks.sort(key=lambda block: block.ranks[0].slot)
    return found

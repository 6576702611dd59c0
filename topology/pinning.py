"""A plan that leaves running groups where they are.  Pure."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Protocol

from .errors import DoesNotFit
from .fleet import Fleet
from .ground import Shapes
from .hostfilter import HostSlots
from .plan import Plan, PlannedGroup, Seats, make_plan


class Place(Protocol):
    """Devices of one host, wherever they are told."""

    @property
    def host(self) -> str: ...
    @property
    def devices(self) -> tuple[int, ...]: ...


Running = Mapping[str, tuple[Seats, ...]]


def plan_around(fleet: Fleet, hosts: Sequence[HostSlots], shapes: Shapes, running: Running) -> Plan:
    """As `make_plan`, but groups of `running` keep their seats, those that the fleet lacks too, and the others get what
    is left.  If the others do not fit then, it is the plan for empty hosts."""
    wanted = make_plan(fleet, hosts, shapes)
    if not running:
        return wanted
    stay = {group.name for group in wanted.groups if _fits_its_seats(group, running)}
    missing = [group for group in wanted.groups if group.name not in stay]
    try:
        rest = _rest(fleet, hosts, running, shapes, missing)
    except DoesNotFit:
        return wanted
    groups = [rest[group.name] if group.name in rest else seated(group, running[group.name]) for group in wanted.groups]
    return _with_groups(wanted, groups)


def overlaps(group: PlannedGroup, running: Running) -> list[str]:
    """Running groups on slots that this one is to get."""
    wanted = slots_of(group.hosts)
    return [name for name, seats in running.items() if name != group.name and wanted & slots_of(seats)]


def slots_of(seats: Sequence[Place]) -> set[tuple[str, int]]:
    return {(seat.host, device) for seat in seats for device in seat.devices}


def seated(group: PlannedGroup, seats: tuple[Seats, ...]) -> PlannedGroup:
    """The same group on other slots."""
    places = [(seat.host, device) for seat in seats for device in seat.devices]
    ranks = tuple(
        rank.model_copy(update={"host": host, "slot": slot})
        for rank, (host, slot) in zip(group.ranks, places, strict=True)
    )
    return group.model_copy(update={"hosts": seats, "ranks": ranks})


def _fits_its_seats(group: PlannedGroup, running: Running) -> bool:
    return group.name in running and len(slots_of(running[group.name])) == len(group.ranks)


def _left(hosts: Sequence[HostSlots], running: Running) -> list[HostSlots]:
    taken = {slot for seats in running.values() for slot in slots_of(seats)}
    left = [
        HostSlots(host.address, tuple(slot for slot in host.slots if (host.address, slot) not in taken))
        for host in hosts
    ]
    return [host for host in left if host.slots]


def _rest(
    fleet: Fleet, hosts: Sequence[HostSlots], running: Running, shapes: Shapes, missing: Sequence[PlannedGroup]
) -> dict[str, PlannedGroup]:
    """The missing groups on what is left.  A stage that would fit on an empty host is not cut in pieces."""
    if not missing:
        return {}
    by_model: dict[str, list[PlannedGroup]] = defaultdict(list)
    for group in missing:
        by_model[group.model].append(group)
    models = tuple(
        spec.model_copy(update={"replicas": len(by_model[spec.name])}) for spec in fleet.models if spec.name in by_model
    )
    left = _left(hosts, running)
    widest, widest_left = (max((len(host.slots) for host in some), default=0) for some in (hosts, left))
    if any(widest_left < spec.tensor_parallel_size <= widest for spec in models):
        raise DoesNotFit("no host has room for a whole stage")
    placed: dict[str, list[PlannedGroup]] = defaultdict(list)
    for group in make_plan(fleet.model_copy(update={"models": models}), left, shapes).groups:
        placed[group.model].append(group)
    return {
        group.name: there.model_copy(update={"name": group.name, "replica": group.replica})
        for model, groups in by_model.items()
        for group, there in zip(groups, placed[model], strict=True)
    }


def _with_groups(plan: Plan, groups: Sequence[PlannedGroup]) -> Plan:
    used = {slot for group in groups for slot in slots_of(group.hosts)}
    hosts = tuple(
        host.model_copy(update={"free": tuple(slot for slot in host.slots if (host.address, slot) not in used)})
        for host in plan.hosts
    )
    return plan.model_copy(
        update={"hosts": hosts, "groups": tuple(groups), "num_free": sum(len(host.free) for host in hosts)}
    )

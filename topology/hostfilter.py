"""Which slots of which hosts are used: DeepSpeed's --include, --exclude, --num_nodes and --num_gpus.  Pure.

    worker-0@worker-1:0,2          all of worker-0, slots 0 and 2 of worker-1
    [2001:db8::1]:0                an IPv6 address with slots goes in brackets (DeepSpeed cannot name one)

As in DeepSpeed the result keeps the hostfile's order, and include and exclude stand alone.  Stricter: more nodes or
GPUs than there are is an error rather than fewer or too many processes, and so is a filter that leaves nothing.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .address import canonical, shown
from .errors import BadHostfile
from .hostfile import Host

_BRACKETED = re.compile(r"\[(?P<host>[^\[\]]*)\](?::(?P<slots>.*))?", re.DOTALL)
_MAX_FILTER_CHARS = 1 << 20


@dataclass(frozen=True, slots=True)
class HostSlots:
    """The slots of one host that may be used, in ascending order."""

    address: str
    slots: tuple[int, ...]


def filter_hosts(
    hosts: Iterable[Host],
    *,
    include: str = "",
    exclude: str = "",
    num_nodes: int | None = None,
    num_gpus: int | None = None,
) -> tuple[HostSlots, ...]:
    """What may be used of `hosts`: at least one slot.  Raises BadHostfile, naming filter and problem."""
    _check_exclusive(include, exclude, num_nodes, num_gpus)
    every = [HostSlots(host.address, tuple(range(host.slots))) for host in hosts]
    if include:
        return _keep_some(every, _parse(include, every, "--include"))
    if exclude:
        return _leave_out(every, _parse(exclude, every, "--exclude"))
    return _cap(every, num_nodes, num_gpus)


def _check_exclusive(include: str, exclude: str, num_nodes: int | None, num_gpus: int | None) -> None:
    if include and exclude:
        raise BadHostfile("--include and --exclude cannot be given together: include what is left, or exclude the rest")
    if (include or exclude) and (num_nodes is not None or num_gpus is not None):
        raise BadHostfile("--num_nodes and --num_gpus cannot be given with --include or --exclude: use one of the two")


def _keep_some(every: Iterable[HostSlots], wanted: Mapping[str, tuple[int, ...]]) -> tuple[HostSlots, ...]:
    return tuple(
        HostSlots(host.address, wanted[host.address] or host.slots) for host in every if host.address in wanted
    )


def _leave_out(every: Iterable[HostSlots], unwanted: Mapping[str, tuple[int, ...]]) -> tuple[HostSlots, ...]:
    left = []
    for host in every:
        out = (unwanted[host.address] or host.slots) if host.address in unwanted else ()
        if slots := tuple(slot for slot in host.slots if slot not in out):
            left.append(HostSlots(host.address, slots))
    if not left:
        raise BadHostfile("--exclude leaves no slot on any host: exclude less")
    return tuple(left)


def _cap(every: list[HostSlots], num_nodes: int | None, num_gpus: int | None) -> tuple[HostSlots, ...]:
    if num_nodes is not None and not 1 <= num_nodes <= len(every):
        raise BadHostfile(f"--num_nodes {num_nodes}: the hostfile has {len(every)} hosts; give 1 to {len(every)}")
    used = every[:num_nodes]
    if num_gpus is None:
        return tuple(used)
    poorest = min(used, key=lambda host: len(host.slots))
    if not 1 <= num_gpus <= len(poorest.slots):
        raise BadHostfile(
            f"--num_gpus {num_gpus}: host {poorest.address} has {len(poorest.slots)} slots; "
            f"give 1 to {len(poorest.slots)}, or leave the host out"
        )
    return tuple(HostSlots(host.address, host.slots[:num_gpus]) for host in used)


def _parse(text: str, every: Iterable[HostSlots], option: str) -> dict[str, tuple[int, ...]]:
    """Slots by address; none means the whole host."""
    if len(text) > _MAX_FILTER_CHARS:
        raise BadHostfile(f"{option} has {len(text)} characters: the limit is {_MAX_FILTER_CHARS}")
    known = {canonical(host.address): host for host in every}
    chosen: dict[str, tuple[int, ...]] = {}
    for part in text.split("@"):
        name, slots_text = _split(part)
        host = known.get(name.lower()) or known.get(_canonical_or_same(name))
        if host is None:
            raise BadHostfile(
                f"{option}: host {shown(name)} of {shown(part)} is not in the hostfile: check its spelling"
            )
        slots = _parse_slots(slots_text, host, option) if slots_text is not None else ()
        if host.address in chosen and not (slots and chosen[host.address]):
            raise BadHostfile(f"{option}: host {host.address} is named whole and a second time: name it once")
        chosen[host.address] = tuple(sorted({*chosen.get(host.address, ()), *slots}))
    return chosen


def _split(part: str) -> tuple[str, str | None]:
    """Host and slots, the latter None if there is no colon."""
    if match := _BRACKETED.fullmatch(part):
        return match["host"], match["slots"]
    if part.count(":") > 1:
        return part, None
    name, colon, slots = part.partition(":")
    return name, slots if colon else None


def _canonical_or_same(name: str) -> str:
    try:
        return canonical(name)
    except ValueError:
        return name


def _parse_slots(text: str, host: HostSlots, option: str) -> tuple[int, ...]:
    slots = []
    for number in text.split(","):
        if not (number.isascii() and number.isdecimal() and len(number) <= 6):
            raise BadHostfile(f"{option}: {shown(number)} is no slot of {host.address}: give numbers, as in HOST:0,1")
        if int(number) not in host.slots:
            raise BadHostfile(f"{option}: host {host.address} has no slot {number}: it has 0 to {host.slots[-1]}")
        slots.append(int(number))
    return tuple(slots)

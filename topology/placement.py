"""Which rank of a group runs on which host and device.  Pure.

Ranks are numbered stage by stage (mesh.py), and hosts are filled in order: so the ranks of a tensor parallel group sit
together, and pipeline stages follow each other from host to host.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .address import address_problem, shown, unbracketed
from .errors import BadPlacement

_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,14}")
_LIST = re.compile(r"\s*\[\s*[{\]]")  # "[fd00::1]:2" is none
MAX_RANKS = 65_000


@dataclass(frozen=True, slots=True)
class Node:
    """One host's share of a group: a rank on each device.  `interface`: what its ranks talk over; None: found out."""

    host: str
    devices: tuple[int, ...]
    interface: str | None = None


@dataclass(frozen=True, slots=True)
class Seat:
    """Where one rank runs."""

    rank: int
    host: str
    device: int
    interface: str | None


@dataclass(frozen=True, slots=True)
class Share:
    """A host with the numbers of its ranks."""

    node: Node
    ranks: tuple[int, ...]


def read_nodes(value: object) -> tuple[Node, ...]:
    """`nodeA:2,nodeB:2` (that many ranks on devices 0, 1 …), or a list of {"host", "devices" or "ranks", "interface"},
    as such or as JSON.  Raises BadPlacement, which says which entry and why."""
    if isinstance(value, str):
        value = _from_json(value) if _LIST.match(value) else _from_compact(value)
    if not isinstance(value, Sequence):
        raise BadPlacement(f"hosts is {value!r}: give host:ranks,host:ranks or a list of objects")
    nodes = tuple(item if isinstance(item, Node) else _from_object(item) for item in value)
    names = [node.host for node in nodes]
    for name in names:
        if names.count(name) > 1:
            raise BadPlacement(f"host {name} is named twice: give all of its ranks in one entry")
    return nodes


def seats(nodes: Sequence[Node]) -> tuple[Seat, ...]:
    """One seat for each rank, in the order of the hosts."""
    places = [(node, device) for node in nodes for device in node.devices]
    return tuple(Seat(rank, node.host, device, node.interface) for rank, (node, device) in enumerate(places))


def shares(nodes: Sequence[Node]) -> tuple[Share, ...]:
    """The same by host."""
    first, found = 0, []
    for node in nodes:
        found.append(Share(node, tuple(range(first, first + len(node.devices)))))
        first += len(node.devices)
    return tuple(found)


def check_host(host: str) -> str:
    """The host, if it is a name or an address, which never begins with '-'.  Raises BadPlacement."""
    if problem := address_problem(host):
        raise BadPlacement(f"hosts: {problem}")
    return host


def _from_json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadPlacement(f"hosts is not JSON: {error}") from None


def _from_compact(text: str) -> list[dict[str, Any]]:
    entries = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        host, _, count = part.rpartition(":")
        if not host or not count.isascii() or not count.isdecimal():
            raise BadPlacement(f"{part!r} in hosts: write host:ranks, as in nodeA:2,nodeB:2")
        entries.append({"host": unbracketed(host), "ranks": int(count)})
    return entries


def _from_object(item: object) -> Node:
    if not isinstance(item, Mapping) or not isinstance(item.get("host"), str):
        raise BadPlacement(f"{item!r} in hosts has no host: give objects with host and devices")
    host, interface = check_host(item["host"]), item.get("interface")
    if unknown := sorted(set(item) - {"host", "devices", "ranks", "interface"}):
        raise BadPlacement(f"host {host}: unknown entry {unknown[0]!r}")
    if interface is not None and not (isinstance(interface, str) and _INTERFACE.fullmatch(interface)):
        raise BadPlacement(f"host {host}: {shown(str(interface))} is not the name of a network interface")
    return Node(host, _devices(host, item), interface)


def _devices(host: str, item: Mapping[str, Any]) -> tuple[int, ...]:
    ranks, devices = item.get("ranks"), item.get("devices")
    if devices is None and isinstance(ranks, int) and 0 < ranks <= MAX_RANKS:
        return tuple(range(ranks))
    if not isinstance(devices, Sequence) or not devices or not all(type(d) is int and d >= 0 for d in devices):
        raise BadPlacement(f"host {host}: give the number of its ranks (at least 1), or a list of its devices")
    if len(set(devices)) < len(devices) or ranks not in (None, len(devices)):
        raise BadPlacement(f"host {host}: devices {list(devices)} hold one rank each")
    return tuple(devices)

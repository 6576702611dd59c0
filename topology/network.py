"""The network interfaces of this host: addresses, speed, and whether RDMA (InfiniBand, RoCE) sits on them."""

import re
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import psutil
from pydantic import BaseModel, ConfigDict, StringConstraints

SYS_INFINIBAND = Path("/sys/class/infiniband")


_NAME = r"^[A-Za-z0-9._:@-]{1,32}$"  # a host says it, and people are told to put it into an environment
InterfaceName = Annotated[str, StringConstraints(pattern=_NAME)]


class Interface(BaseModel):
    """`speed_mbit` 0: the driver does not say (virtual ones never do)."""

    model_config = ConfigDict(frozen=True)

    name: InterfaceName
    addresses: tuple[str, ...]
    up: bool
    speed_mbit: int = 0
    mtu: int = 0

    @property
    def loopback(self) -> bool:
        return any(address == "::1" or address.startswith("127.") for address in self.addresses)


class RdmaPort(BaseModel):
    """One port of an RDMA device.  `netdev`: the interface over the same card, where there is one."""

    model_config = ConfigDict(frozen=True)

    device: InterfaceName
    port: int
    active: bool
    rate: str
    link_layer: str
    netdev: str | None = None


def read_interfaces() -> tuple[Interface, ...]:
    """All interfaces that have an address, loopback included; those whose names need quotes are left out."""
    stats = psutil.net_if_stats()
    found = []
    for name, addresses in sorted(psutil.net_if_addrs().items()):
        known = tuple(a.address.partition("%")[0] for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6))
        if known and name in stats and re.match(_NAME, name):
            at = stats[name]
            found.append(Interface(name=name, addresses=known, up=at.isup, speed_mbit=max(at.speed, 0), mtu=at.mtu))
    return tuple(found)


def read_rdma(root: Path = SYS_INFINIBAND) -> tuple[RdmaPort, ...]:
    """RDMA ports as the kernel lists them; none where there is no such device."""
    return tuple(_rdma_port(port) for port in sorted(root.glob("*/ports/*")))


def carrying(interfaces: Iterable[Interface], addresses: Iterable[str]) -> Interface | None:
    """The interface that has one of these addresses."""
    wanted = set(addresses)
    return next((one for one in interfaces if wanted & set(one.addresses)), None)


def interface_of(address: str) -> str | None:
    """The name of this host's interface with that address (or name); None if there is none: gloo and NCCL have to be
    told."""
    found = carrying(read_interfaces(), addresses_of(address))
    return found.name if found else None


def addresses_of(name: str) -> tuple[str, ...]:
    """What this host's resolver makes of a name; nothing if it does not know it."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return ()
    return tuple(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))


def _rdma_port(port: Path) -> RdmaPort:
    device = port.parent.parent
    nets = sorted(path.name for path in (device / "device" / "net").glob("*"))
    return RdmaPort(
        device=device.name,
        port=int(port.name),
        active="ACTIVE" in _text(port / "state"),
        rate=_text(port / "rate"),
        link_layer=_text(port / "link_layer"),
        netdev=nets[0] if nets else None,
    )


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""

"""Which network interface carries an address: gloo and NCCL have to be told."""

import socket

import psutil


def interface_of(address: str) -> str | None:
    """The interface of this host with that address (or name); None if there is none."""
    try:
        wanted = {item[4][0] for item in socket.getaddrinfo(address, None)}
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(item.address.partition("%")[0] in wanted for item in addresses):
            return str(name)
    return None

"""The connecting end: dial the front, prove each other the key, and probe past a connection that is stuck."""

import contextlib
import socket
from typing import Any

from .errors import BadFrame, LeaderLost
from .frames import Framer, Kind

PROBE_TIMEOUT_S = 0.25
"""For each of its steps: a link that is down shows in the first, and one of 200 ms there and back is not down."""
_RECEIVE_BYTES = 65536


def dial(address: tuple[str, int], *, key: bytes, epoch: int, timeout_s: float) -> tuple[socket.socket, Framer]:
    """A connection on which both ends have a key of their own.  Raises LeaderLost."""
    framer = Framer(key, epoch=epoch, front=False)
    sock = None
    try:
        sock = socket.create_connection(address, timeout=timeout_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        framer.rekey(_challenge(sock, framer))
    except (OSError, BadFrame) as error:
        if sock is not None:
            sock.close()
        raise LeaderLost(f"no control connection to the front at {address[0]}:{address[1]}: {error}") from error
    return sock, framer


def probe(address: tuple[str, int], *, key: bytes, epoch: int, rank: int, payload: dict[str, Any]) -> bool:
    """Whether the front answers a beat on a fresh connection, right now.

    After a cut TCP tries again at growing intervals: a link that was down for 2 s may look dead for 4.  A new
    connection goes through as soon as the link is up, and tells both ends that the other one lives.
    """
    with contextlib.suppress(LeaderLost, OSError, BadFrame):
        sock, framer = dial(address, key=key, epoch=epoch, timeout_s=PROBE_TIMEOUT_S)
        with sock:
            sock.sendall(framer.seal(Kind.PROBE, rank=rank, payload=payload))
            return any(frame.kind is Kind.BEAT for frame in framer.feed(sock.recv(_RECEIVE_BYTES)))
    return False


def _challenge(sock: socket.socket, framer: Framer) -> bytes:
    """The nonce that the front sends first, and with which it proves that it knows the key."""
    while data := sock.recv(_RECEIVE_BYTES):
        for frame in framer.feed(data):
            return bytes.fromhex(frame.payload["nonce"])
    raise BadFrame("it closed the connection")

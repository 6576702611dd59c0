"""The listening end of a port on which frames come in: sockets, buffers, strangers; what frames mean is not known here.

Bytes of strangers cost them their own connection and nothing else: half frames wait in their own small buffer, and
whoever has not said something valid within HELLO_TIMEOUT_S is dropped.  A host that sends many crowds out its own.
"""

import contextlib
import secrets
import selectors
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .errors import BadFrame, PortTaken
from .frames import FRONT, MAX_PAYLOAD_BYTES, Frame, Framer, Kind

HELLO_TIMEOUT_S = 2.0
MAX_STRANGERS = 128
MAX_STRANGE_PAYLOAD_BYTES = 64 * 1024
ACCEPTED_AT_A_TIME = 128
"""As many as the backlog holds: in a flood of connections one that belongs here must not wait for many turns."""
MAX_UNSENT_BYTES = 256 * 1024
MAX_REASONS = 100  # strangers may make them up
NONCE_BYTES = 16
_RECEIVE_BYTES = 65536


@dataclass(eq=False, slots=True)
class Connection:
    """One peer; a stranger until its owner gives it a `member` number."""

    sock: socket.socket
    framer: Framer
    accepted: float
    host: str
    member: int | None = None
    unsent: bytearray = field(default_factory=bytearray)


class Wire:
    """Calls `on_frame(connection, frame)` for what verifies, and `on_lost(member, reason)` when a member's connection
    ends.  One thread calls `poll` in a loop."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        heartbeat_s: float,
        on_frame: Callable[[Connection, Frame], None],
        on_lost: Callable[[int, str], None],
    ) -> None:
        self._heartbeat_s = heartbeat_s
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._listener = listen(host, port)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self.connections: set[Connection] = set()
        self.rejected: Counter[str] = Counter()
        """Connections that were dropped before or instead of joining, by reason."""
        self.begin(epoch=0, key=secrets.token_bytes(32))

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._listener.getsockname()[:2]
        return host, port

    def begin(self, *, epoch: int, key: bytes, expected: int = 0) -> None:
        """Drop everybody; from now on frames are those of `epoch` and `key`, and so many may come at the same time."""
        for connection in self.connections:
            self._selector.unregister(connection.sock)
            connection.sock.close()
        self.connections.clear()
        self._epoch, self._key = epoch, key
        self._max_strangers = MAX_STRANGERS + expected
        self._next_beat = self._polled = time.monotonic()

    def poll(self, timeout_s: float) -> float:
        """Serve the connections for up to `timeout_s`, returning early on traffic.

        Returns for how long this process was held up beyond that: for so long nobody's silence proves anything.
        """
        due = max(0.0, min(timeout_s, self._next_beat - time.monotonic()))
        for key, events in self._selector.select(due):
            if key.data is None:
                self._accept()
            elif key.data in self.connections:
                self._serve(key.data, events)
        now = time.monotonic()
        pause_s = now - self._polled - due
        self._polled = now
        for connection in [c for c in self.connections if c.member is None]:
            if now - connection.accepted > HELLO_TIMEOUT_S:
                self.drop(connection, "no HELLO in time")
        if now >= self._next_beat:
            self._next_beat = now + self._heartbeat_s
            for connection in [c for c in self.connections if c.member is not None]:
                self.send(connection, Kind.BEAT)
        return pause_s if pause_s > self._heartbeat_s else 0.0

    def send(self, connection: Connection, kind: Kind, payload: dict[str, Any] | None = None) -> None:
        connection.unsent += connection.framer.seal(kind, rank=FRONT, payload=payload)
        self._flush(connection)

    def drop(self, connection: Connection, reason: str) -> None:
        """Close it; if it was a member's, its owner hears of it."""
        if connection not in self.connections:
            return
        self.connections.remove(connection)
        self._selector.unregister(connection.sock)
        connection.sock.close()
        if connection.member is None:
            known = reason in self.rejected or len(self.rejected) < MAX_REASONS
            self.rejected[reason if known else "other"] += 1
        else:
            self._on_lost(connection.member, reason)

    def release(self, connection: Connection) -> None:
        """Close a connection that has done what it came for."""
        self.connections.discard(connection)
        self._selector.unregister(connection.sock)
        connection.sock.close()

    def close(self) -> None:
        self.begin(epoch=0, key=secrets.token_bytes(32))
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            for _ in range(ACCEPTED_AT_A_TIME):
                sock, (host, *_) = self._listener.accept()
                self._greet(sock, host)
        strangers = [c for c in self.connections if c.member is None]
        while len(strangers) > self._max_strangers:
            crowds = Counter(c.host for c in strangers)
            one_too_many = min(strangers, key=lambda c: (-crowds[c.host], c.accepted))
            strangers.remove(one_too_many)
            self.drop(one_too_many, "too many strangers")

    def _greet(self, sock: socket.socket, host: str) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        framer = Framer(self._key, epoch=self._epoch, front=True)
        framer.max_payload_bytes = MAX_STRANGE_PAYLOAD_BYTES
        connection = Connection(sock, framer, time.monotonic(), host)
        self.connections.add(connection)
        self._selector.register(sock, selectors.EVENT_READ, connection)
        nonce = secrets.token_bytes(NONCE_BYTES)
        self.send(connection, Kind.CHALLENGE, {"nonce": nonce.hex()})
        framer.rekey(nonce)

    def _serve(self, connection: Connection, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._flush(connection)
        if not events & selectors.EVENT_READ:
            return
        try:
            data = connection.sock.recv(_RECEIVE_BYTES)
            for frame in connection.framer.feed(data):
                self._on_frame(connection, frame)
                if connection not in self.connections:
                    return
                if connection.member is not None:
                    connection.framer.max_payload_bytes = MAX_PAYLOAD_BYTES
        except BlockingIOError:
            return
        except BadFrame as error:
            self.drop(connection, str(error))
        except (TypeError, ValueError, LookupError) as error:
            self.drop(connection, f"bad payload: {error}")
        except OSError:
            self.drop(connection, "connection lost")
        else:
            if not data:
                self.drop(connection, "closed")

    def _flush(self, connection: Connection) -> None:
        try:
            if connection.unsent:
                del connection.unsent[: connection.sock.send(connection.unsent)]
        except BlockingIOError:
            pass
        except OSError:
            return  # the read side sees the end of the connection
        if len(connection.unsent) > MAX_UNSENT_BYTES:
            self.drop(connection, "does not read")
        elif connection in self.connections:
            write = selectors.EVENT_WRITE if connection.unsent else 0
            self._selector.modify(connection.sock, selectors.EVENT_READ | write, connection)


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; PortTaken says which port and what to do."""
    try:
        return socket.create_server((host, port), backlog=128)
    except OSError as error:
        reason = error.strerror or str(error)
        raise PortTaken(f"cannot listen on {host}:{port}: {reason}; choose another port, or 0 for any") from None

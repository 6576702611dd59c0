"""The front's end of the control connections: it lets ranks in, watches them, and relays WAKE.

One thread calls `poll` in a loop.  Bytes of strangers cost them their own connection and nothing else: half frames wait
in their own buffer, and whoever has not said a valid HELLO within HELLO_TIMEOUT_S is dropped.
"""

import contextlib
import secrets
import selectors
import socket
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from .errors import BadFrame, PortTaken
from .frames import FRONT, Frame, Framer, Kind
from .vitals import Cause, Trouble, Vitals, silent, stalled

HELLO_TIMEOUT_S = 2.0
MAX_STRANGERS = 32
MAX_UNSENT_BYTES = 256 * 1024
NONCE_BYTES = 16
_RECEIVE_BYTES = 65536


@dataclass(eq=False, slots=True)
class _Connection:
    sock: socket.socket
    framer: Framer
    accepted: float
    rank: int | None = None
    unsent: bytearray = field(default_factory=bytearray)


class ControlServer:
    """Listens for the ranks of one group, epoch after epoch."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        heartbeat_s: float = 1.0,
        heartbeat_timeout_s: float = 3.0,
        stall_timeout_s: float = 5.0,
    ) -> None:
        self._heartbeat_s = heartbeat_s
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._listener = listen(host, port)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._connections: set[_Connection] = set()
        self.rejected: Counter[str] = Counter()
        """Connections that were dropped before or instead of joining, by reason."""
        self.begin(epoch=0, key=secrets.token_bytes(32), world_size=0)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._listener.getsockname()[:2]
        return host, port

    def begin(self, *, epoch: int, key: bytes, world_size: int) -> None:
        """Forget the last epoch and expect `world_size` ranks that know `key`."""
        self._close_connections()
        self._epoch, self._key, self._world_size = epoch, key, world_size
        self._members: dict[int, _Connection] = {}
        self.vitals: dict[int, Vitals] = {}
        self._hellos: dict[int, dict[str, Any]] = {}
        self._infos: dict[int, dict[str, Any]] = {}
        self._welcomed = False
        self._troubles: list[Trouble] = []
        self._next_beat = self._polled = time.monotonic()

    @property
    def info(self) -> dict[str, Any] | None:
        """What rank 0 said of itself in READY, once all ranks are ready."""
        return self._infos[0] if self._world_size and len(self._infos) == self._world_size else None

    def poll(self, timeout_s: float) -> list[Trouble]:
        """Serve the connections for up to `timeout_s`, returning early on traffic; what has gone wrong since."""
        due = max(0.0, min(timeout_s, self._next_beat - time.monotonic()))
        for key, events in self._selector.select(due):
            if key.data is None:
                self._accept()
            elif key.data in self._connections:
                self._serve(key.data, events)
        self._judge(time.monotonic(), expected_s=due)
        troubles, self._troubles = self._troubles, []
        return troubles

    def stop(self) -> None:
        """Tell every rank to exit."""
        for connection in list(self._members.values()):
            self._send(connection, Kind.STOP)

    def close(self) -> None:
        self._close_connections()
        self._selector.close()
        self._listener.close()

    # --- connections

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            framer = Framer(self._key, epoch=self._epoch, front=True)
            connection = _Connection(sock, framer, time.monotonic())
            self._connections.add(connection)
            self._selector.register(sock, selectors.EVENT_READ, connection)
            nonce = secrets.token_bytes(NONCE_BYTES)
            self._send(connection, Kind.CHALLENGE, {"nonce": nonce.hex()})
            framer.rekey(nonce)
        strangers = sorted((c for c in self._connections if c.rank is None), key=lambda c: c.accepted)
        for connection in strangers[:-MAX_STRANGERS]:
            self._drop(connection, "too many strangers")

    def _serve(self, connection: _Connection, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._flush(connection)
        if not events & selectors.EVENT_READ:
            return
        try:
            data = connection.sock.recv(_RECEIVE_BYTES)
            for frame in connection.framer.feed(data):
                self._handle(connection, frame)
                if connection not in self._connections:
                    return
        except BlockingIOError:
            return
        except BadFrame as error:
            self._drop(connection, str(error))
        except (TypeError, ValueError) as error:
            self._drop(connection, f"bad payload: {error}")
        except OSError:
            self._drop(connection, "connection lost")
        else:
            if not data:
                self._drop(connection, "closed")

    def _send(self, connection: _Connection, kind: Kind, payload: dict[str, Any] | None = None) -> None:
        connection.unsent += connection.framer.seal(kind, rank=FRONT, payload=payload)
        self._flush(connection)

    def _flush(self, connection: _Connection) -> None:
        try:
            if connection.unsent:
                del connection.unsent[: connection.sock.send(connection.unsent)]
        except BlockingIOError:
            pass
        except OSError:
            return  # the read side sees the end of the connection
        if len(connection.unsent) > MAX_UNSENT_BYTES:
            self._drop(connection, "does not read")
        elif connection in self._connections:
            write = selectors.EVENT_WRITE if connection.unsent else 0
            self._selector.modify(connection.sock, selectors.EVENT_READ | write, connection)

    def _drop(self, connection: _Connection, reason: str) -> None:
        """Close it; if it was a rank's, that rank is gone."""
        if connection not in self._connections:
            return
        self._connections.remove(connection)
        self._selector.unregister(connection.sock)
        connection.sock.close()
        rank = connection.rank
        if rank is None:
            self.rejected[reason] += 1
        else:
            message = f"{self.vitals[rank].name} lost its control connection: {reason}"
            self._troubles.append(Trouble((rank,), Cause.GONE, message))

    def _close_connections(self) -> None:
        for connection in self._connections:
            self._selector.unregister(connection.sock)
            connection.sock.close()
        self._connections.clear()

    # --- frames

    def _handle(self, connection: _Connection, frame: Frame) -> None:
        if connection.rank is None:
            self._admit(connection, frame)
            return
        if frame.rank != connection.rank:
            self._drop(connection, f"speaks for rank {frame.rank}")
            return
        vitals = self.vitals[connection.rank]
        vitals.heard = time.monotonic()
        match frame.kind:
            case Kind.BEAT:
                _read_beat(vitals, frame.payload)
            case Kind.READY:
                vitals.ready = True
                self._infos[vitals.rank] = frame.payload
                self._compare(self._infos, vitals.rank, "limits")
            case Kind.WAKE if vitals.rank == 0:
                for rank, member in list(self._members.items()):
                    if rank != 0:
                        self._send(member, Kind.WAKE)
            case Kind.FAILED:
                self._note_failure(frame)
            case _:
                self._drop(connection, f"unexpected {frame.kind.name}")

    def _admit(self, connection: _Connection, frame: Frame) -> None:
        if frame.rank >= self._world_size:
            self._drop(connection, "unknown rank")
        elif frame.rank in self._members:
            self._drop(connection, "duplicate rank")
        elif frame.kind is Kind.FAILED:
            self._note_failure(frame)
            self._drop(connection, "failed before HELLO")
        elif frame.kind is not Kind.HELLO:
            self._drop(connection, f"{frame.kind.name} before HELLO")
        else:
            connection.rank = frame.rank
            self._members[frame.rank] = connection
            pid, host = int(frame.payload.get("pid", 0)), str(frame.payload.get("host", "?"))
            self.vitals[frame.rank] = Vitals(frame.rank, pid, host, time.monotonic())
            self._hellos[frame.rank] = frame.payload
            if self._compare(self._hellos, frame.rank, "fingerprint"):
                self._welcome()

    def _note_failure(self, frame: Frame) -> None:
        code, message = str(frame.payload.get("code")), str(frame.payload.get("message"))
        self._troubles.append(Trouble((frame.rank,), Cause.FAILED, message, code))

    def _compare(self, said: dict[int, dict[str, Any]], rank: int, entry: str) -> bool:
        """Hold what `rank` said against rank 0; refuse the rank that differs."""
        for other in [rank] if rank else sorted(said):
            if 0 not in said:
                return True
            difference = _difference(said[0].get(entry, {}), said[other].get(entry, {}))
            if difference:
                self._refuse(other, difference)
                return False
        return True

    def _refuse(self, rank: int, difference: str) -> None:
        message = f"{self.vitals[rank].name} does not run what rank 0 runs: {difference}"
        self._troubles.append(Trouble((rank,), Cause.REFUSED, message))
        self._send(self._members[rank], Kind.REFUSED, {"message": message})

    def _welcome(self) -> None:
        """Nobody goes on before everybody is here."""
        if self._welcomed or len(self._members) < self._world_size:
            return
        self._welcomed = True
        for connection in list(self._members.values()):
            self._send(connection, Kind.WELCOME, {"store": self._hellos[0].get("store")})

    # --- time

    def _judge(self, now: float, *, expected_s: float) -> None:
        pause_s = now - self._polled - expected_s
        self._polled = now
        if pause_s > self._heartbeat_s:  # this process was stopped: the ranks are not to blame for its silence
            for vitals in self.vitals.values():
                vitals.heard += pause_s
        for connection in [c for c in self._connections if c.rank is None]:
            if now - connection.accepted > HELLO_TIMEOUT_S:
                self._drop(connection, "no HELLO in time")
        if now >= self._next_beat:
            self._next_beat = now + self._heartbeat_s
            for connection in list(self._members.values()):
                self._send(connection, Kind.BEAT)
        alive = [self.vitals[rank] for rank, member in self._members.items() if member in self._connections]
        self._troubles += silent(alive, now=now, timeout_s=self._heartbeat_timeout_s)
        self._troubles += stalled(self.vitals.values(), timeout_s=self._stall_timeout_s)


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; PortTaken says which port and what to do."""
    try:
        return socket.create_server((host, port), backlog=128)
    except OSError as error:
        reason = error.strerror or str(error)
        raise PortTaken(f"cannot listen on {host}:{port}: {reason}; choose another port, or 0 for any") from None


def _read_beat(vitals: Vitals, payload: dict[str, Any]) -> None:
    vitals.busy = bool(payload.get("busy"))
    vitals.step = int(payload.get("step", 0))
    vitals.progress = int(payload.get("progress", 0))
    vitals.still_s = float(payload.get("still_s", 0.0))


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """The first entry that differs, or ''."""
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            return f"{name} is {theirs.get(name)!r}, on rank 0 it is {ours.get(name)!r}"
    return ""

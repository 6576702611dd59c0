"""The front's end of the control connections: it lets ranks in, watches them, and relays WAKE.

One thread calls `poll` in a loop.
"""

import time
from collections import Counter
from typing import Any

from .frames import Frame, Kind
from .vitals import Cause, Trouble, Vitals, silent, stalled
from .wire import HELLO_TIMEOUT_S, MAX_STRANGERS, MAX_UNSENT_BYTES, Connection, Wire, listen

__all__ = ["HELLO_TIMEOUT_S", "MAX_STRANGERS", "MAX_UNSENT_BYTES", "ControlServer", "listen"]


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
        self._silence_s = heartbeat_timeout_s + heartbeat_s  # a beat is only missed once it is due
        self._stall_timeout_s = stall_timeout_s
        self._wire = Wire(host, port, heartbeat_s=heartbeat_s, on_frame=self._handle, on_lost=self._lost)
        self.begin(epoch=0, key=bytes(32), world_size=0)

    @property
    def address(self) -> tuple[str, int]:
        return self._wire.address

    @property
    def rejected(self) -> Counter[str]:
        """Connections that were dropped before or instead of joining, by reason."""
        return self._wire.rejected

    def begin(self, *, epoch: int, key: bytes, world_size: int) -> None:
        """Forget the last epoch and expect `world_size` ranks that know `key`."""
        self._wire.begin(epoch=epoch, key=key, expected=world_size)
        self._world_size = world_size
        self._members: dict[int, Connection] = {}
        self.vitals: dict[int, Vitals] = {}
        self._hellos: dict[int, dict[str, Any]] = {}
        self._infos: dict[int, dict[str, Any]] = {}
        self._welcomed = False
        self._troubles: list[Trouble] = []

    @property
    def info(self) -> dict[str, Any] | None:
        """What rank 0 said of itself in READY, once all ranks are ready."""
        return self._infos[0] if self._world_size and len(self._infos) == self._world_size else None

    @property
    def absent(self) -> list[int]:
        """Ranks that have not said HELLO in this epoch."""
        return [rank for rank in range(self._world_size) if rank not in self._members]

    def poll(self, timeout_s: float) -> list[Trouble]:
        """Serve the connections for up to `timeout_s`, returning early on traffic; what has gone wrong since."""
        pause_s = self._wire.poll(timeout_s)
        for vitals in self.vitals.values():
            vitals.heard += pause_s
        present = self._wire.connections
        alive = [self.vitals[rank] for rank, member in self._members.items() if member in present]
        now = time.monotonic()
        self._troubles += silent(alive, now=now, timeout_s=self._silence_s)
        if all(now - vitals.heard < 2 * self._heartbeat_s for vitals in alive):  # else we may lack the culprit's word
            self._troubles += stalled(self.vitals.values(), timeout_s=self._stall_timeout_s)
        troubles, self._troubles = self._troubles, []
        return troubles

    def stop(self) -> None:
        """Tell every rank to exit."""
        for connection in list(self._members.values()):
            self._wire.send(connection, Kind.STOP)

    def close(self) -> None:
        self._wire.close()

    # --- frames

    def _lost(self, rank: int, reason: str) -> None:
        message = f"{self.vitals[rank].name} lost its control connection: {reason}"
        self._troubles.append(Trouble((rank,), Cause.GONE, message))

    def _handle(self, connection: Connection, frame: Frame) -> None:
        if connection.member is None:
            self._admit(connection, frame)
            return
        if frame.rank != connection.member:
            self._wire.drop(connection, f"speaks for rank {frame.rank}")
            return
        vitals = self.vitals[connection.member]
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
                        self._wire.send(member, Kind.WAKE)
            case Kind.FAILED:
                self._note_failure(frame)
            case _:
                self._wire.drop(connection, f"unexpected {frame.kind.name}")

    def _admit(self, connection: Connection, frame: Frame) -> None:
        if frame.rank >= self._world_size:
            self._wire.drop(connection, "unknown rank")
        elif frame.kind is Kind.PROBE and frame.rank in self._members:
            self._answer_probe(connection, frame)
        elif frame.rank in self._members:
            self._wire.drop(connection, "duplicate rank")
        elif frame.kind is Kind.FAILED:
            self._note_failure(frame)
            self._wire.drop(connection, "failed before HELLO")
        elif frame.kind is not Kind.HELLO:
            self._wire.drop(connection, f"{frame.kind.name} before HELLO")
        else:
            self._join(connection, frame)

    def _answer_probe(self, connection: Connection, frame: Frame) -> None:
        """The rank is alive and the network carries; its own connection may still wait for TCP to try again."""
        if self._members[frame.rank] in self._wire.connections:
            vitals = self.vitals[frame.rank]
            vitals.heard = time.monotonic()
            _read_beat(vitals, frame.payload)
            self._wire.send(connection, Kind.BEAT)
        self._wire.release(connection)

    def _join(self, connection: Connection, frame: Frame) -> None:
        connection.member = frame.rank
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
        self._wire.send(self._members[rank], Kind.REFUSED, {"message": message})

    def _welcome(self) -> None:
        """Nobody goes on before everybody is here."""
        if self._welcomed or len(self._members) < self._world_size:
            return
        self._welcomed = True
        for connection in list(self._members.values()):
            self._wire.send(connection, Kind.WELCOME, {"store": self._hellos[0].get("store")})


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

"""The front's end of the keepers: who has joined from which host, what they are to start, what became of it.

One thread calls `pump` often.  No keeper gets back in with ranks of an earlier launch: it joins with none, and those
ranks do not have the key of the present one.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from .frames import Frame, Kind
from .keeper import MUSTER_EPOCH
from .launch import LineSink
from .vitals import Cause, Trouble
from .wire import Connection, Wire

END_TIMEOUT_S = 5.0
SEE_OFF_S = 1.0


@dataclass(eq=False, slots=True)
class _Enlisted:
    """A keeper that has joined; `launched`: it has ranks of the present launch."""

    connection: Connection
    ranks: tuple[int, ...]
    name: str
    heard: float
    launched: bool = False
    last_words: str = ""


class Muster:
    """Gives every keeper the orders for its ranks, whenever it joins."""

    def __init__(self, host: str, port: int, *, key: bytes, heartbeat_s: float, heartbeat_timeout_s: float) -> None:
        self._timing = {"heartbeat_s": heartbeat_s, "heartbeat_timeout_s": heartbeat_timeout_s}
        self._silence_s = heartbeat_timeout_s + heartbeat_s
        self._wire = Wire(host, port, heartbeat_s=heartbeat_s, on_frame=self._handle, on_lost=self._lost)
        self._keepers: dict[int, _Enlisted] = {}
        self._orders: dict[int, Mapping[str, str]] = {}
        self._world_size = 0
        self._on_line: LineSink = lambda *_: None
        self._troubles: list[Trouble] = []
        self._num_lost = 0
        self.exits: dict[int, int] = {}
        self.token = ""
        """Keepers that were started with another one are sent away for good."""
        self.rekey(key)

    @property
    def address(self) -> tuple[str, int]:
        return self._wire.address

    def rekey(self, key: bytes) -> None:
        """Drop every keeper; those that know `key` may join."""
        self._keepers = {}
        self._wire.begin(epoch=MUSTER_EPOCH, key=key)

    def begin(self, orders: Mapping[int, Mapping[str, str]], *, world_size: int, on_line: LineSink) -> None:
        """Have these ranks started, with these additions to their environments: now, or when their keepers join."""
        self._orders, self._world_size, self._on_line = dict(orders), world_size, on_line
        self._troubles, self.exits, self._num_lost = [], {}, 0
        for keeper in list(self._keepers.values()):
            self._launch(keeper)

    @property
    def absent(self) -> list[int]:
        """Ranks that nobody has come for."""
        here = {rank for keeper in self._keepers.values() for rank in keeper.ranks}
        return sorted(self._orders.keys() - here)

    def pump(self, timeout_s: float = 0.0) -> None:
        """Serve the connections for up to `timeout_s`."""
        pause_s = self._wire.poll(timeout_s)
        now = time.monotonic()
        for keeper in list(self._keepers.values()):
            keeper.heard += pause_s
            if now - keeper.heard > self._silence_s:
                if keeper.launched:
                    keeper.last_words = f"silent for {now - keeper.heard:.1f} s: stopped or cut off"
                    self._note(keeper, Cause.SILENT)
                keeper.launched = False
                self._wire.drop(keeper.connection, "silent")

    def troubles(self) -> list[Trouble]:
        """What has gone wrong since the last call."""
        troubles, self._troubles = self._troubles, []
        return troubles

    def end(self) -> bool:
        """Have all ranks killed, and wait until their keepers say so, except for those that are silent already.

        Whether a keeper was lost in this launch, now or before."""
        self._orders = {}
        busy = [keeper for keeper in self._keepers.values() if keeper.launched]
        for keeper in busy:
            keeper.launched = False
            self._wire.send(keeper.connection, Kind.END)
        until = time.monotonic() + END_TIMEOUT_S
        while any(map(self._speaks, busy)) and time.monotonic() < until:
            self._wire.poll(0.02)
        left = [keeper for keeper in busy if keeper.connection in self._wire.connections]
        for keeper in left:
            self._wire.drop(keeper.connection, "does not end")
        self._troubles = []
        return bool(self._num_lost or left)

    def see_off(self) -> None:
        """Give keepers that come again after their launch the time to hear that they may go."""
        until = time.monotonic() + SEE_OFF_S
        while self.token and time.monotonic() < until:
            self._wire.poll(0.05)

    def close(self) -> None:
        self._wire.close()

    # --- frames

    def _handle(self, connection: Connection, frame: Frame) -> None:
        if connection.member is None:
            self._admit(connection, frame)
            return
        keeper = self._keepers[connection.member]
        keeper.heard = time.monotonic()
        match frame.kind:
            case Kind.LINES:
                for rank, text in frame.payload["lines"]:
                    self._on_line(int(rank), str(text))
            case Kind.EXITED if int(frame.payload["rank"]) in self._orders:
                self.exits[int(frame.payload["rank"])] = int(frame.payload["code"])
            case Kind.FAILED:
                keeper.last_words = str(frame.payload.get("message"))
            case _:
                pass

    def _admit(self, connection: Connection, frame: Frame) -> None:
        if frame.kind is Kind.PROBE and frame.rank in self._keepers:
            self._keepers[frame.rank].heard = time.monotonic()
            self._wire.send(connection, Kind.BEAT)
            self._wire.release(connection)
        elif frame.kind is not Kind.ENLIST:
            self._wire.drop(connection, f"{frame.kind.name} before ENLIST")
        else:
            self._enlist(connection, frame)

    def _enlist(self, connection: Connection, frame: Frame) -> None:
        said = frame.payload
        ranks = tuple(int(rank) for rank in said["ranks"])
        name = f"the keeper of {_ranks(ranks)} (pid {said.get('pid')} on {said.get('host')})"
        held = {rank for keeper in self._keepers.values() for rank in keeper.ranks}
        wrong = _disagreement(ranks, said.get("world_size"), self._world_size)
        if said.get("token", "") != self.token:
            wrong = "this keeper belongs to an earlier start of the group"
        if wrong:
            self._wire.send(connection, Kind.REFUSED, {"message": wrong})
            self._wire.drop(connection, wrong)
        elif not ranks or held & set(ranks) or frame.rank != ranks[0]:
            self._wire.drop(connection, "these ranks have a keeper")
        else:
            connection.member = frame.rank
            keeper = self._keepers[frame.rank] = _Enlisted(connection, ranks, name, time.monotonic())
            self._launch(keeper)

    def _launch(self, keeper: _Enlisted) -> None:
        """A keeper whose ranks the front starts itself only holds a place."""
        ranks = [(rank, dict(self._orders[rank])) for rank in keeper.ranks if rank in self._orders]
        if ranks:
            keeper.launched = True
            order = json.dumps({"ranks": ranks, "cwd": os.getcwd()} | self._timing).encode()
            veiled = keeper.connection.framer.veil(order)
            self._wire.send(keeper.connection, Kind.LAUNCH, {"order": veiled.hex()})

    def _lost(self, member: int, reason: str) -> None:
        keeper = self._keepers.pop(member)
        keeper.last_words = keeper.last_words or f"gone: {reason}"
        if keeper.launched:
            self._note(keeper, Cause.GONE)

    def _speaks(self, keeper: _Enlisted) -> bool:
        here = keeper.connection in self._wire.connections
        return here and time.monotonic() - keeper.heard < 2 * self._timing["heartbeat_s"]

    def _note(self, keeper: _Enlisted, cause: Cause) -> None:
        self._num_lost += 1
        self._troubles.append(Trouble(keeper.ranks, cause, f"{keeper.name}: {keeper.last_words}"))


def _disagreement(ranks: tuple[int, ...], said: object, world_size: int) -> str:
    """What is wrong with a keeper's idea of the group, or ''."""
    if said is not None and said != world_size:
        return f"this group has {world_size} ranks, but it was started with {said}: change one of them"
    if any(rank >= world_size for rank in ranks):
        return f"there is no rank {max(ranks)} in this group of {world_size}"
    return ""


def _ranks(ranks: tuple[int, ...]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"

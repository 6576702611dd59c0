"""A rank's end of its control connection: the tether that ends the process when its leader is gone."""

import contextlib
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from .dial import PROBE_TIMEOUT_S, dial, probe
from .errors import BadFrame, LeaderLost, Refused
from .frames import Frame, Kind
from .vitals import STARTUP_FACTOR

EXIT_STOPPED = 0
EXIT_LEADER_LOST = 69
TICK_S = 0.2
_RECEIVE_BYTES = 65536


def exit_process(code: int, reason: str) -> NoReturn:
    """End this process at once, whatever its other threads wait for."""
    if reason:
        print(f"hortator: {reason}", file=sys.stderr, flush=True)  # noqa: T201
    os._exit(code)


class ControlClient:
    """Connects, says HELLO, and from then on beats from a thread of its own.

    The rank's loop keeps `busy` and `step` up to date and gives `progress`, a counter that moves while work is done.
    """

    def __init__(
        self,
        address: tuple[str, int],
        *,
        key: bytes,
        epoch: int,
        rank: int,
        heartbeat_s: float = 1.0,
        timeout_s: float = 3.0,
        stall_timeout_s: float = 5.0,
        end: Callable[[int, str], None] = exit_process,
    ) -> None:
        self._address, self._key, self._epoch = address, key, epoch
        self._rank = rank
        self._heartbeat_s = heartbeat_s
        self._timeout_s = timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._end = end
        self._sending = threading.Lock()
        self._wakes = threading.Semaphore(0)
        self._answered = threading.Event()
        self._answer: Frame | None = None
        self._is_ready = False
        self.busy = False
        self.step = 0
        self.progress: Callable[[], int] = lambda: 0
        self._sock, self._framer = dial(address, key=key, epoch=epoch, timeout_s=timeout_s)

    def hello(self, *, fingerprint: dict[str, str], **more: Any) -> None:
        """Introduce this rank and start the thread that keeps the connection."""
        payload = {"pid": os.getpid(), "host": socket.gethostname(), "fingerprint": fingerprint} | more
        self._send(Kind.HELLO, payload)
        threading.Thread(target=self._run, name="hortator-tether", daemon=True).start()

    def wait_welcome(self, timeout_s: float) -> dict[str, Any]:
        """Wait until every rank of the group is there; what the front then says.  Raises Refused or LeaderLost."""
        if not self._answered.wait(timeout_s):
            raise LeaderLost(f"the group was not complete within {timeout_s:g} s")
        assert self._answer is not None
        if self._answer.kind is Kind.REFUSED:
            raise Refused(str(self._answer.payload.get("message", "refused")))
        return self._answer.payload

    def ready(self, info: dict[str, Any]) -> None:
        """This rank is loaded; `info` must be the same on all ranks."""
        self._is_ready = True
        self._send(Kind.READY, info)

    def wake(self) -> None:
        """Rank 0: let the peers leave `wait_wake`."""
        self._send(Kind.WAKE)

    def wait_wake(self) -> None:
        """A peer: sleep until rank 0 wakes the group.  A WAKE that came earlier is not lost."""
        self._wakes.acquire()

    def fail(self, code: str, message: str) -> None:
        """Say why this rank is about to exit.  Never raises."""
        with contextlib.suppress(OSError):
            self._send(Kind.FAILED, {"code": code, "message": message[:4000]})

    def close(self) -> None:
        """End the connection, and with it this rank in the eyes of the front."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _send(self, kind: Kind, payload: dict[str, Any] | None = None) -> None:
        with self._sending:
            self._sock.sendall(self._framer.seal(kind, rank=self._rank, payload=payload))

    # --- the thread

    def _run(self) -> None:
        try:
            self._keep()
        except (LeaderLost, OSError, BadFrame) as error:
            self._end(EXIT_LEADER_LOST, f"rank {self._rank} ends: {error}")
        self._sock.close()

    def _keep(self) -> None:
        pulse = _Pulse()
        heard = beaten = ticked = probed = time.monotonic()
        while True:
            readable = select.select([self._sock], [], [], TICK_S)[0]
            now = time.monotonic()
            if now - ticked > self._heartbeat_s + TICK_S:  # this process was stopped: silence proves nothing
                heard += now - ticked
            ticked = now
            if readable:
                if self._receive():
                    return
                heard = now
            bound_s = (self._timeout_s + self._heartbeat_s) * (1 if self._is_ready else STARTUP_FACTOR)
            if now - heard > bound_s:
                raise LeaderLost(f"the front has been silent for {now - heard:.1f} s")
            overdue = now - heard > self._heartbeat_s + 2 * TICK_S
            if overdue and now - probed > PROBE_TIMEOUT_S:
                probed = now
                answered, ticked = self._probe(pulse), time.monotonic()
                heard = ticked if answered else heard
            stalled = pulse.sample(self, now) >= self._stall_timeout_s and not pulse.told
            if stalled or now - beaten >= self._heartbeat_s:
                beaten, pulse.told = now, stalled or pulse.told
                self._send(Kind.BEAT, pulse.payload(self))

    def _probe(self, pulse: "_Pulse") -> bool:
        payload = pulse.payload(self)
        return probe(self._address, key=self._key, epoch=self._epoch, rank=self._rank, payload=payload)

    def _receive(self) -> bool:
        """Handle what has come; True when it was STOP."""
        data = self._sock.recv(_RECEIVE_BYTES)
        if not data:
            raise LeaderLost("the front closed the control connection")
        for frame in self._framer.feed(data):
            match frame.kind:
                case Kind.WAKE:
                    self._wakes.release()
                case Kind.WELCOME | Kind.REFUSED:
                    self._answer = frame
                    self._answered.set()
                case Kind.STOP:
                    self._end(EXIT_STOPPED, "")
                    return True
                case _:
                    pass
        return False


class _Pulse:
    """For how long the rank has stood still, counted in ticks so that a stopped machine does not look like a hang."""

    def __init__(self) -> None:
        self._seen = (-1, -1)
        self._sampled = time.monotonic()
        self.still_s = 0.0
        self.told = False

    def sample(self, client: ControlClient, now: float) -> float:
        seen = (client.step, client.progress())
        moved = seen != self._seen or not client.busy
        self.still_s = 0.0 if moved else self.still_s + min(now - self._sampled, 2 * TICK_S)
        self.told = self.told and not moved
        self._seen, self._sampled = seen, now
        return self.still_s

    def payload(self, client: ControlClient) -> dict[str, Any]:
        step, progress = self._seen
        still_s = round(self.still_s, 3)
        return {"busy": client.busy, "step": step, "progress": progress, "still_s": still_s}

"""One host's end of a launch: it joins the front, starts that host's ranks as its children, and ends them.

    python -m hortator.topology.keeper --stdin                                        (started by the ssh launcher)
    python -m hortator.topology.keeper --join HOST:PORT --secret-file FILE            (started by anything else)

Its ranks live as long as it holds the front's hand: they are killed when the front says so, when the front is silent or
gone, when standard input ends (--stdin), when whoever started the keeper ends, and by the kernel when the keeper itself
does.  The key comes from standard input or from a file, never from arguments or the environment.
"""

import argparse
import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any, NoReturn

from .dial import PROBE_TIMEOUT_S, dial, probe
from .errors import BadFrame, LeaderLost, Refused, TopologyError
from .frames import Framer, Kind
from .join import Place, place_of, read_secret
from .launch import LocalLauncher, RankCommand, threads_each
from .network import interface_of
from .variables import variable_problem
from .vitals import bearable_silence_s

MUSTER_EPOCH = 0
"""Frames between front and keepers carry this; those of ranks begin at 1."""
RANK_ARGV = (sys.executable, "-m", "hortator.workers.rank")
EXIT_CONFIG = 78
EXIT_LEADER_LOST = 69
DIAL_TIMEOUT_S = 5.0
REJOIN_S = 0.5
IDLE_SILENCE_S = 60.0  # the front pauses up to 30 s between two lives
TICK_S = 0.1
MAX_LINES = 10_000
LINES_PER_FRAME_BYTES = 64 * 1024  # JSON may make six bytes of one
MAX_UNSENT_BYTES = 1 << 20


class Ended(Exception):
    """The reason why this keeper's connection is over, and with it its ranks.  `told`: the front wanted it so."""

    def __init__(self, reason: str, *, told: bool = False) -> None:
        super().__init__(reason)
        self.told = told


class Rejoin(Enum):
    """When a keeper goes back to the front after its ranks have ended."""

    NEVER = auto()
    AFTER_END = auto()  # if the front itself ended the launch: it is alive and will begin another
    ALWAYS = auto()


@dataclass(frozen=True, slots=True)
class Errand:
    """Where to join, as whom, for how long.  `token`: of the start that this keeper belongs to."""

    address: tuple[str, int]
    key: bytes
    place: Place
    rejoin: Rejoin
    token: str = ""
    by_ssh: bool = False


class Keeper:
    """Serves one connection to the front after the other."""

    def __init__(self, errand: Errand, *, argv: Sequence[str] = RANK_ARGV, stdin: int | None = None) -> None:
        self._errand = errand
        self._argv = tuple(argv)
        self._stdin = stdin
        self._parent = os.getppid()
        self._wake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._terminated = False
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def run(self, patience_s: float) -> None:
        """Until there has been no front for `patience_s`, or for one connection only."""
        until = time.monotonic() + patience_s
        while True:
            try:
                self._serve()
            except Ended as end:
                again = {Rejoin.NEVER: False, Rejoin.AFTER_END: end.told, Rejoin.ALWAYS: True}[self._errand.rejoin]
                if not again or self._must_go():
                    if end.told or self._must_go():
                        return
                    raise LeaderLost(str(end)) from None
                print(f"hortator: {end}; joining again", file=sys.stderr, flush=True)  # noqa: T201
                until = time.monotonic() + patience_s
            except LeaderLost:
                if self._errand.rejoin is Rejoin.NEVER or self._must_go() or time.monotonic() > until:
                    raise
            time.sleep(REJOIN_S)

    def _serve(self) -> NoReturn:
        """One connection; no rank is left afterwards."""
        errand = self._errand
        sock, framer = dial(errand.address, key=errand.key, epoch=MUSTER_EPOCH, timeout_s=DIAL_TIMEOUT_S)
        launcher = LocalLauncher()
        try:
            _Watch(self, errand, sock, framer, launcher).keep()
        except (OSError, BadFrame, ValueError, LookupError) as error:
            raise Ended(f"the connection to the front broke: {error}") from None
        finally:
            launcher.kill()
            sock.close()

    def wait(self, sock: socket.socket, *, writing: bool) -> None:
        """Until something happens, TICK_S at most.  Raises Ended when this process has to go."""
        inputs: list[socket.socket | int] = [sock, self._wake, *([self._stdin] if self._stdin is not None else [])]
        readable = select.select(inputs, [sock] if writing else [], [], TICK_S)[0]
        if self._wake in readable:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake, 4096)
        if self._stdin is not None and self._stdin in readable and not os.read(self._stdin, 4096):
            self._terminated = True
            raise Ended("standard input has ended: the launching host is gone, or its ssh")
        if self._must_go():
            raise Ended("SIGTERM" if self._terminated else "the process that started this keeper is gone")

    def command(self, rank: int, env: dict[str, str]) -> RankCommand:
        return RankCommand(rank, self._argv, env)

    def _must_go(self) -> bool:
        return self._terminated or os.getppid() != self._parent

    def _on_sigterm(self, *_: object) -> None:
        self._terminated = True


class _Watch:
    """One connection to the front and the ranks that were started over it."""

    def __init__(
        self, keeper: Keeper, errand: Errand, sock: socket.socket, framer: Framer, launcher: LocalLauncher
    ) -> None:
        sock.setblocking(False)
        self._keeper, self._errand = keeper, errand
        self._sock, self._framer, self._launcher = sock, framer, launcher
        self._number = errand.place.ranks[0]
        self._unsent = bytearray()
        self._lines: deque[tuple[int, str]] = deque()
        self._num_dropped = 0
        self._told: set[int] = set()
        self._heartbeat_s, self._silence_s = 1.0, IDLE_SILENCE_S
        self._heard = self._beaten = self._probed = self._ticked = time.monotonic()

    def keep(self) -> NoReturn:
        place = self._errand.place
        self._send(
            Kind.ENLIST,
            {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "ranks": place.ranks,
                "world_size": place.world_size,
                "token": self._errand.token,
            },
        )
        try:
            while True:
                self._keeper.wait(self._sock, writing=bool(self._unsent))
                self._receive()
                self._tell()
                self._keep_time(time.monotonic())
                self._flush()
        except Ended as end:
            self._last_words(str(end))
            raise

    def _last_words(self, reason: str) -> None:
        """Kill, and say so; the front may be gone."""
        self._launcher.kill()
        with contextlib.suppress(OSError):
            self._send(Kind.FAILED, {"code": "keeper", "message": reason})
            self._flush()

    # --- from the front

    def _receive(self) -> None:
        try:
            data = self._sock.recv(65536)
        except BlockingIOError:
            return
        if not data:
            raise Ended("the front closed the connection")
        self._heard = time.monotonic()
        for frame in self._framer.feed(data):
            match frame.kind:
                case Kind.LAUNCH:
                    self._launch(json.loads(self._framer.veil(bytes.fromhex(frame.payload["order"]))))
                case Kind.END:
                    raise Ended("the front ended this launch", told=True)
                case Kind.REFUSED:
                    raise Refused(str(frame.payload.get("message")))
                case _:
                    pass

    def _launch(self, order: dict[str, Any]) -> None:
        if self._launcher.pids:
            raise BadFrame("a second launch on one connection")
        self._heartbeat_s = float(order["heartbeat_s"])
        timeout_s = float(order["heartbeat_timeout_s"])
        self._silence_s = bearable_silence_s(heartbeat_s=self._heartbeat_s, heartbeat_timeout_s=timeout_s)
        commands = [self._keeper.command(int(rank), self._environment(int(rank), env)) for rank, env in order["ranks"]]
        with contextlib.suppress(OSError):
            os.chdir(order["cwd"])
        self._launcher.launch(commands, on_line=self._on_line)

    def _environment(self, rank: int, env: dict[str, str]) -> dict[str, str]:
        """This process' own, without what is meant for the keeper; then what is found out here, then what was sent."""
        place = self._errand.place
        for name in env:
            if problem := variable_problem(name, by_ssh=self._errand.by_ssh):
                raise BadFrame(f"the front may not set {name}: {problem}")
        own = {name: value for name, value in os.environ.items() if not name.startswith("HORTATOR_")}
        interface = interface_of(self._sock.getsockname()[0])
        num_local = int(own.get("LOCAL_WORLD_SIZE") or own.get("LOCAL_SIZE") or len(place.ranks))
        found = {
            "LOCAL_RANK": str(place.devices[place.ranks.index(rank)]),
            "LOCAL_WORLD_SIZE": str(num_local),
            "OMP_NUM_THREADS": threads_each(num_local, own.get("OMP_NUM_THREADS")),
        }
        if interface is not None:
            found |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
        found = {name: own.get(name, value) if name.endswith("_IFNAME") else value for name, value in found.items()}
        return own | found | {name: str(value) for name, value in env.items()}

    # --- to the front

    def _on_line(self, rank: int, text: str) -> None:
        """Called by the thread that reads what ranks print."""
        if len(self._lines) < MAX_LINES:
            self._lines.append((rank, text))
        else:
            self._num_dropped += 1

    def _tell(self) -> None:
        while self._lines and len(self._unsent) < MAX_UNSENT_BYTES:
            batch, size = [], 0
            while self._lines and size < LINES_PER_FRAME_BYTES:
                batch.append(self._lines.popleft())
                size += len(batch[-1][1])
            self._send(Kind.LINES, {"lines": batch})
        if self._num_dropped and not self._lines:
            dropped, self._num_dropped = self._num_dropped, 0
            self._on_line(self._number, f"(hortator: {dropped} lines came too fast and were dropped)")
        for rank, code in self._launcher.exits().items():
            if rank not in self._told:
                self._told.add(rank)
                self._send(Kind.EXITED, {"rank": rank, "code": code})

    def _keep_time(self, now: float) -> None:
        if now - self._ticked > self._heartbeat_s + TICK_S:  # this process was stopped: silence proves nothing
            self._heard += now - self._ticked
        self._ticked = now
        silence_s = now - self._heard
        if silence_s > self._silence_s:
            raise Ended(f"the front has been silent for {silence_s:.1f} s")
        overdue = self._launcher.pids and silence_s > self._heartbeat_s + 2 * TICK_S
        if overdue and now - self._probed > PROBE_TIMEOUT_S:
            self._probed = now
            if probe(self._errand.address, key=self._errand.key, epoch=MUSTER_EPOCH, rank=self._number, payload={}):
                self._heard = time.monotonic()
            self._ticked = time.monotonic()
        if now - self._beaten >= self._heartbeat_s:
            self._beaten = now
            self._send(Kind.BEAT)

    def _send(self, kind: Kind, payload: dict[str, Any] | None = None) -> None:
        self._unsent += self._framer.seal(kind, rank=self._number, payload=payload)

    def _flush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                del self._unsent[: self._sock.send(self._unsent)]


# --- the command


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Exit codes: 0 ended as told, 69 no front, 78 wrong options or refused."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.join and options.secret_file is None:
        parser.error("--join needs --secret-file")
    try:
        keeper = _from_stdin() if options.stdin else _from_options(options)
        keeper.run(options.patience)
    except LeaderLost as error:
        _give_up(EXIT_LEADER_LOST, error)
    except TopologyError as error:
        _give_up(EXIT_CONFIG, error)
    raise SystemExit(0)


def _give_up(code: int, error: Exception) -> NoReturn:
    print(f"hortator: {error}", file=sys.stderr, flush=True)  # noqa: T201
    raise SystemExit(code)


def _from_stdin() -> Keeper:
    """One line of JSON; after that, standard input only has to stay open."""
    fd = sys.stdin.fileno()
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(fd, 1)
        if not byte:
            raise LeaderLost("standard input ended before it said where to join")
        line += byte
    try:
        said = json.loads(line)
        place = Place(tuple(said["ranks"]), tuple(said["devices"]))
        errand = Errand((said["host"], said["port"]), bytes.fromhex(said["key"]), place, Rejoin.NEVER, by_ssh=True)
    except (ValueError, LookupError, TypeError) as error:
        raise Refused(f"standard input does not say where to join: {type(error).__name__}") from None
    return Keeper(errand, stdin=fd)


def _from_options(options: argparse.Namespace) -> Keeper:
    place = place_of(os.environ, ranks=options.ranks, ranks_per_node=options.ranks_per_node)
    rejoin = Rejoin.AFTER_END if options.start else Rejoin.ALWAYS
    return Keeper(Errand(options.join, read_secret(options.secret_file), place, rejoin, options.start))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m hortator.topology.keeper", description="Keep ranks of a model group.")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--stdin", action="store_true", help="read where to join from standard input, for one launch")
    how.add_argument("--join", type=_address, metavar="HOST:PORT", help="where the leader waits (keeper_port)")
    parser.add_argument("--secret-file", type=Path, help="the same content as the leader's; chmod 600")
    parser.add_argument("--ranks", default="", metavar="N,N", help="default: RANK, SLURM_PROCID or as torchrun says")
    parser.add_argument("--ranks-per-node", type=int, default=0, help="keep all of this node's ranks (Kubernetes)")
    parser.add_argument("--start", default="", metavar="TOKEN", help="of the start that this process belongs to")
    parser.add_argument(
        "--patience", type=float, default=600.0, metavar="S", help="exit after so long without a leader"
    )
    return parser


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


if __name__ == "__main__":
    main()

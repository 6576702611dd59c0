"""Launches the ranks of a group, watches them, and starts them again: one thread of the front, for the front's life.

The group is one unit of failure.  Whatever goes wrong with one rank, all are killed, and the next epoch begins with new
processes and a new key.  The thread forks the ranks and must outlive them: they die with it (PR_SET_PDEATHSIG).
"""

import contextlib
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from hortator.topology.control import ControlServer
from hortator.topology.errors import TopologyError
from hortator.topology.frames import KEY_BYTES
from hortator.topology.launch import Launcher, describe_exit
from hortator.topology.vitals import Cause, Trouble, Vitals

from .engine.step import EngineInfo
from .launching import check_meeting_host, rank_commands
from .rank import Exit, read_description
from .ranklog import RankLog
from .settings import WorkerSettings
from .watch import Watch

TICK_S = 0.1
SETTLE_S = 0.1
"""One dead rank takes others along within milliseconds; look this long before saying which was the first."""
HEALTHY_S = 10.0
MAX_BACKOFF_S = 30.0

log = logging.getLogger("hortator.group")


@dataclass(frozen=True, slots=True)
class Live:
    """All ranks are ready; `sock` is the front's end of rank 0's pipe."""

    epoch: int
    info: EngineInfo
    start_s: float
    sock: socket.socket


@dataclass(frozen=True, slots=True)
class Down:
    """The group of this epoch is gone, every process of it.  `permanent`: a configuration error, not tried again."""

    epoch: int
    reason: str
    permanent: bool
    retry_in_s: float | None
    by_pause: bool = False  # the ranks gave up a front that had been stopped: nothing that they ran is to blame


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a life ended."""

    reason: str
    permanent: bool = False
    by_pause: bool = False


@dataclass(frozen=True, slots=True)
class Outage:
    """How the group last went down: what comes after it, until the group is ready again, are failed tries to rise."""

    reason: str
    epoch: int
    at: float  # seconds since 1970


class Supervisor:
    """`post` is called from the thread, with Live and Down in turn; `environment` is what ranks may inherit."""

    def __init__(
        self,
        settings: WorkerSettings,
        launcher: Launcher,
        post: Callable[[Live | Down], None],
        *,
        environment: Mapping[str, str],
    ) -> None:
        self._settings = settings
        self._environment = environment
        self._launcher = launcher
        self._post = post
        self._closing = threading.Event()
        self._close_by = 0.0
        self._condemned: tuple[int, str] | None = None
        self._failed_starts = 0
        self._downs: list[float] = []
        self._ready_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="hortator-group", daemon=True)
        self.epoch = 0
        self.phase = "starting"
        self.pids: dict[int, int] = {}
        self._server: ControlServer | None = None
        self.last_failure: str | None = None
        self.outage: Outage | None = None
        self.given_up = False
        """It is down and will not be tried again."""
        self.rejected: Mapping[str, int] = {}
        """Connections to the control port that were turned away, by reason."""
        self._watch = Watch(settings.heartbeat_s, settings.heartbeat_timeout_s)
        self._rank_log = RankLog()

    @property
    def steady(self) -> bool:
        """All ranks have beaten lately, and this process has watched them without a gap."""
        return self._watch.steady(time.monotonic())

    def start(self) -> None:
        self._thread.start()

    @property
    def members(self) -> dict[int, Vitals]:
        """The ranks of this epoch that have said HELLO, wherever they are."""
        return dict(self._server.vitals) if self._server is not None else {}

    def condemn(self, epoch: int, reason: str) -> None:
        """End that life, if it has not ended already; any thread may call it."""
        self._condemned = (epoch, reason)

    def close(self, *, timeout_s: float) -> None:
        """STOP, then SIGTERM, then SIGKILL; returns when no process is left."""
        self._close_by = time.monotonic() + timeout_s
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s + 5.0)

    # --- the thread

    def _run(self) -> None:
        s = self._settings
        try:
            check_meeting_host(s)
            server = ControlServer(
                s.meeting_host,
                s.control_port,
                heartbeat_s=s.heartbeat_s,
                heartbeat_timeout_s=s.heartbeat_timeout_s,
                stall_timeout_s=s.stall_timeout_s,
            )
        except TopologyError as error:
            self._report(Failure(f"control port: {error}", permanent=True))
            return
        self.rejected = server.rejected
        self._server = server
        with contextlib.closing(server), contextlib.closing(self._launcher):
            while not self._closing.is_set():
                failure = self._live_guarded(server)
                if failure is not None:
                    retry_in_s = self._report(self._within_budget(failure, time.monotonic()))
                    self._closing.wait(retry_in_s)
        self.phase = "closed"

    def _report(self, failure: Failure) -> float | None:
        """Post Down; the pause until the next try, None for ever."""
        self.phase = "down"
        self._rank_log.flush()
        self.last_failure, self.given_up = failure.reason, failure.permanent
        if self.outage is None or self._ready_since is not None:
            self.outage = Outage(failure.reason, self.epoch, time.time())
        retry_in_s = None if failure.permanent else self._backoff_s()
        if retry_in_s is not None:  # else the worker ends, and says it as its last word
            log.error("group of epoch %d is down: %s; next try in %g s", self.epoch, failure.reason, retry_in_s)
        self._post(Down(self.epoch, failure.reason, failure.permanent, retry_in_s, failure.by_pause))
        return retry_in_s

    def _within_budget(self, failure: Failure, now: float) -> Failure:
        """The same failure, final if the group has come down too often."""
        budget, window_s = self._settings.restart_budget, self._settings.restart_window_s
        self._downs = [down for down in self._downs if now - down < window_s] + [now]
        if not budget or len(self._downs) <= budget or failure.permanent:
            return failure
        reason = f"{failure.reason}; given up after {budget} restarts within {window_s:g} s (restart_budget)"
        return replace(failure, reason=reason, permanent=True)

    def _backoff_s(self) -> float:
        """Doubles while the group does not even get ready; a life of HEALTHY_S starts from the bottom again."""
        if self._ready_since is None:
            self._failed_starts += 1
        elif time.monotonic() - self._ready_since > HEALTHY_S:
            self._failed_starts = 0
        doublings = min(max(0, self._failed_starts - 1), 16)
        return min(self._settings.restart_backoff_s * 2.0**doublings, MAX_BACKOFF_S)

    def _live_guarded(self, server: ControlServer) -> Failure | None:
        """One life of the group, whatever happens in it; None if it was closed."""
        self.epoch += 1
        self.phase = "starting"
        self._ready_since = None
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._launch(server, theirs)
            return self._live(server, ours)
        except TopologyError as error:
            return Failure(str(error), permanent=True)
        except Exception as error:
            log.exception("the group's supervisor failed")
            return Failure(f"supervisor: {type(error).__name__}: {error}")
        finally:
            self._launcher.kill()
            self.pids = {}
            if self._ready_since is None:
                ours.close()

    def _launch(self, server: ControlServer, pipe: socket.socket) -> None:
        key = secrets.token_bytes(KEY_BYTES)
        world_size = self._settings.world_size
        server.begin(epoch=self.epoch, key=key, world_size=world_size)
        commands = rank_commands(
            self._settings,
            epoch=self.epoch,
            key=key,
            control=server.address,
            pipe=pipe,
            environment=self._environment,
        )
        self._launcher.launch(commands, on_line=self._rank_log)
        self.pids = self._launcher.pids

    def _live(self, server: ControlServer, pipe: socket.socket) -> Failure | None:
        started = time.monotonic()
        self._watch = Watch(self._settings.heartbeat_s, self._settings.heartbeat_timeout_s)
        while not self._closing.is_set():
            troubles = server.poll(TICK_S)
            heard = min((vitals.heard for vitals in server.vitals.values()), default=started)
            self._watch.look(time.monotonic(), heard, cpu_s=time.process_time())
            exits = self._launcher.exits()
            troubles = self._launcher.troubles() + troubles
            if self._condemned is not None and self._condemned[0] == self.epoch:
                troubles.append(Trouble((0,), Cause.GONE, self._condemned[1]))
            if troubles or exits:
                return self._diagnose(server, troubles)
            now = time.monotonic()
            if self._ready_since is None and server.info is not None:
                self._ready_since = now
                self.phase = "ready"
                self._post(Live(self.epoch, read_description(server.info), now - started, pipe))
            elif self._ready_since is None and now - started > self._settings.start_timeout_s:
                return Failure(f"not ready after {self._settings.start_timeout_s:g} s{_absent(self._launcher)}")
        self._dismiss(server)
        return None

    def _diagnose(self, server: ControlServer, troubles: list[Trouble]) -> Failure:
        paused = self._watch.paused(time.monotonic())
        settled = time.monotonic() + SETTLE_S
        while time.monotonic() < settled:
            troubles += server.poll(TICK_S / 10)
            self._launcher.exits()
            troubles = self._launcher.troubles() + troubles
        names = {rank: vitals.name for rank, vitals in server.vitals.items()}
        failure = verdict(troubles, self._launcher.exits(), names)
        return replace(failure, by_pause=paused and mere_consequence(troubles, self._launcher.exits()))

    def _dismiss(self, server: ControlServer) -> None:
        """Half of the time to obey STOP, a quarter to obey SIGTERM; who then is left gets killed."""
        left_s = max(0.0, self._close_by - time.monotonic())
        server.stop()
        self._wait_exits(server, time.monotonic() + left_s / 2)
        self._launcher.terminate()
        self._wait_exits(server, time.monotonic() + left_s / 4)

    def _wait_exits(self, server: ControlServer, until: float) -> None:
        while time.monotonic() < until:
            if len(self._launcher.exits()) + len(self._launcher.absent) >= self._settings.world_size:
                return
            server.poll(TICK_S / 10)


def verdict(troubles: list[Trouble], exits: Mapping[int, int], names: Mapping[int, str]) -> Failure:
    """The cause among what was seen: what ranks said of themselves, how processes ended, then mere silence.

    Ranks whose collective failed, or that lost their leader, are consequences and come last.
    """
    said = [t for t in troubles if t.cause in (Cause.REFUSED, Cause.FAILED)]
    for trouble in said:
        if trouble.cause is Cause.REFUSED or trouble.code == "config_error":
            return Failure(_named(trouble, names), permanent=True)
    for trouble in said:
        if trouble.code not in ("collective", "leader_lost"):
            return Failure(_named(trouble, names))
    for rank, code in sorted(exits.items()):
        if code not in (Exit.COLLECTIVE, Exit.LEADER_LOST):
            text = f"{names.get(rank, f'rank {rank}')} {describe_exit(code)}"
            return Failure(text, permanent=code == Exit.CONFIG)
    silences = [t for t in troubles if t.cause not in (Cause.REFUSED, Cause.FAILED)]
    silences.sort(key=lambda t: set(t.ranks) <= exits.keys())
    for trouble in [*silences, *said]:
        return Failure(_named(trouble, names))
    rank, code = min(exits.items())
    return Failure(f"rank {rank} {describe_exit(code)}")


def mere_consequence(troubles: list[Trouble], exits: Mapping[int, int]) -> bool:
    """Every rank that is gone lost its leader, or another rank that did: nobody died of what it ran."""
    codes = {trouble.code for trouble in troubles if trouble.cause is Cause.FAILED}
    ended = {*exits.values()} - {Exit.LEADER_LOST, Exit.COLLECTIVE}
    return not ended and codes <= {"collective", "leader_lost"} and not any(t.cause is Cause.REFUSED for t in troubles)


def _named(trouble: Trouble, names: Mapping[int, str]) -> str:
    if trouble.cause is not Cause.FAILED:
        return trouble.message
    (rank,) = trouble.ranks
    return f"{names.get(rank, f'rank {rank}')}: {trouble.message}"


def _absent(launcher: Launcher) -> str:
    """Whom the group has waited for in vain, if that is known."""
    absent = launcher.absent
    return f": nobody has come for rank {', '.join(map(str, absent))}" if absent else ""

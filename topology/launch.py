"""How the ranks of a group are started and ended.

`LocalLauncher` runs them as children of this process; remote.py has the one for several hosts.  The front does not know
the difference.
"""

import contextlib
import os
import re
import selectors
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Protocol

from .vitals import Trouble

MAX_LINE_BYTES = 64 * 1024
PARENT_VARIABLE = "HORTATOR_PARENT_PID"
"""Tells a rank whose child it is: it dies with that process."""
LineSink = Callable[[int, str], None]


@dataclass(frozen=True, slots=True)
class RankCommand:
    """One rank to start: never through a shell; secrets in `env`, never in `argv`."""

    rank: int
    argv: tuple[str, ...]
    env: Mapping[str, str]
    pass_fds: tuple[int, ...] = ()


class Launcher(Protocol):
    """Starts one set of ranks at a time.  All methods are called by one long-lived thread: PR_SET_PDEATHSIG of a child
    fires when the thread that forked it ends."""

    def launch(self, commands: Sequence[RankCommand], *, on_line: LineSink) -> None:
        """Start all; `on_line(rank, text)` gets what they print, from another thread."""

    @property
    def pids(self) -> dict[int, int]:
        """Rank to pid, of ranks on this host."""

    @property
    def absent(self) -> list[int]:
        """Ranks that are still to be started by somebody who has not come."""

    def exits(self) -> dict[int, int]:
        """Ranks known to have ended, with subprocess' returncode (negative: the signal).  Never blocks."""

    def troubles(self) -> list[Trouble]:
        """What else has gone wrong with the ranks or their hosts since the last call.  Never blocks."""

    def terminate(self) -> None:
        """Ask those that are left to go (SIGTERM)."""

    def kill(self) -> None:
        """End all of them with everything they started, and reap them.  Bounded; harmless when nothing runs."""

    def close(self) -> None:
        """Let go of what outlives a launch."""


def threads_each(num_ranks: int, said: str | None) -> str:
    """OMP_NUM_THREADS of each rank of this host: what somebody has said, if that is a number, or their share of the
    cores."""
    if re.match(r"\s*[1-9]", said or ""):
        return str(said)
    return str(max(1, len(os.sched_getaffinity(0)) // num_ranks))


class LocalLauncher:
    """Ranks as children of this process, each in a session of its own."""

    def __init__(self) -> None:
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._exits: dict[int, int] = {}

    def launch(self, commands: Sequence[RankCommand], *, on_line: LineSink) -> None:
        self._processes, self._exits = {}, {}
        outputs: dict[int, IO[bytes]] = {}
        try:
            for command in commands:
                process = _start(command)
                self._processes[command.rank] = process
                assert process.stdout is not None
                outputs[command.rank] = process.stdout
        finally:
            threading.Thread(target=read_lines, args=(outputs, on_line), name="rank-output", daemon=True).start()

    @property
    def pids(self) -> dict[int, int]:
        return {rank: process.pid for rank, process in self._processes.items()}

    @property
    def absent(self) -> list[int]:
        return []

    def exits(self) -> dict[int, int]:
        """Looks without reaping, so that pids stay ours until `kill`."""
        for rank, process in self._processes.items():
            if rank not in self._exits and (code := _exit_code(process.pid)) is not None:
                self._exits[rank] = code
        return dict(self._exits)

    def troubles(self) -> list[Trouble]:
        return []

    def terminate(self) -> None:
        for rank, process in self._processes.items():
            if rank not in self._exits:
                _signal_group(process.pid, signal.SIGTERM)

    def kill(self) -> None:
        for process in self._processes.values():
            _signal_group(process.pid, signal.SIGKILL)
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5.0)
        self._processes = {}

    def close(self) -> None:
        """Nothing outlives a launch."""


def describe_exit(returncode: int) -> str:
    """How a process ended, in words."""
    if returncode < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-returncode).name}"
        return f"was killed by signal {-returncode}"
    return f"exited with {returncode}"


def _start(command: RankCommand) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command.argv,
        env=dict(command.env) | {PARENT_VARIABLE: str(os.getpid())},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=command.pass_fds,
        start_new_session=True,
    )


def _exit_code(pid: int) -> int | None:
    try:
        info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0  # somebody else in this process has reaped it
    if info is None:
        return None
    return info.si_status if info.si_code == os.CLD_EXITED else -info.si_status


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def read_lines(outputs: dict[int, IO[bytes]], on_line: LineSink) -> None:
    """Pass on whole lines until all outputs have ended; an endless line is cut."""
    partial = dict.fromkeys(outputs, b"")
    with selectors.DefaultSelector() as selector:
        for rank, output in outputs.items():
            selector.register(output, selectors.EVENT_READ, rank)
        while selector.get_map():
            for key, _ in selector.select():
                rank = key.data
                data = os.read(key.fd, 65536)
                *lines, partial[rank] = (partial[rank] + data).split(b"\n")
                if len(partial[rank]) > MAX_LINE_BYTES or not data:
                    lines.append(partial[rank])
                    partial[rank] = b""
                for line in filter(None, lines):
                    on_line(rank, line.decode(errors="replace").rstrip())
                if not data:
                    selector.unregister(key.fileobj)
                    outputs[rank].close()

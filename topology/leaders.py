"""The leaders of one host: started detached from whoever asks, found again, stopped.

What is known of each lies in the fleet's directory on its host: `NAME.json` (which process) and `NAME.log` (what leader
and ranks say).  A process is known by its pid and the time of its start, which outlasts that it starts itself anew.
The environment of a leader holds the URL of Redis, so it is written nowhere.
"""

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints

from .errors import CannotStart

LOOK_S = 1.5
"""A leader with a wrong setting says so and ends within this."""

POLL_S = 0.05
GATE = Path(__file__).with_name("gate.py")
RANK_MODULE = "hortator.workers.rank"
TAIL_BYTES = 64 << 10

GroupName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")]


class Order(BaseModel):
    """What to start.  `argv` runs with `environment` over the host's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    group: GroupName
    argv: tuple[str, ...]
    environment: Mapping[str, str]


class Leader(BaseModel):
    """What is known of one: `pid` None while none runs."""

    model_config = ConfigDict(frozen=True)

    group: GroupName
    pid: int | None
    log: Path
    fresh: bool = False
    """It was started by this very call."""

    last_words: str = ""
    """The last line of the log of one that has ended."""


class Record(BaseModel):
    """The file: a process, told apart from a later one of the same number."""

    pid: int
    born: str


class Quarters:
    """The fleet's directory on this host; `~` is the home of whoever runs this."""

    def __init__(self, directory: Path) -> None:
        try:
            self.directory = directory.expanduser()
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except (OSError, RuntimeError) as error:
            raise CannotStart(f"the fleet's directory {directory} cannot be made: {error}") from None

    def start(self, order: Order) -> Leader:
        """Start it unless it runs.  Raises CannotStart with its last words if it ends at once."""
        with self._lock(order.group):
            if (leader := self.look(order.group)).pid is not None:
                return leader
            try:
                process = self._begin(order)
            except OSError as error:
                raise CannotStart(f"group {order.group} is not started: {error.filename}: {error.strerror}") from None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(LOOK_S)
            raise CannotStart(f"group {order.group} ended at once with {code}: {self._last_words(order.group)}")
        process.returncode = 0  # it is meant to be left running, of which Popen would warn
        return Leader(group=order.group, pid=process.pid, log=self.log(order.group), fresh=True)

    def _begin(self, order: Order) -> "subprocess.Popen[bytes]":
        """The process, which becomes the leader only when it has been recorded: an unknown one could not be ended."""
        self.log(order.group).touch(mode=0o600)
        held, go = os.pipe()
        try:
            with self.log(order.group).open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(GATE), str(held), *order.argv],
                    env=os.environ | dict(order.environment),
                    cwd=self.directory,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=(held,),
                )
            try:
                self._write(order.group, Record(pid=process.pid, born=birth(process.pid)))
            except OSError:
                process.kill()
                process.wait()
                raise
            os.write(go, b"1")
        finally:
            os.close(held)
            os.close(go)
        return process

    def _write(self, group: str, record: Record) -> None:
        """Whole, or not at all."""
        new = self.directory / f"{group}.json.new"
        try:
            new.write_text(record.model_dump_json())
        except OSError as error:
            error.filename = str(new)
            raise
        new.replace(self._record(group))

    def look(self, group: str) -> Leader:
        """The leader, if it runs."""
        pid = self._living(group)
        return Leader(
            group=group, pid=pid, log=self.log(group), last_words="" if pid is not None else self._last_words(group)
        )

    def stop(self, group: str, *, patience_s: float) -> bool:
        """End what still runs: SIGTERM, and SIGKILL when the patience is over.  True if there was anything to end."""
        pid = self._living(group)
        if pid is None:
            return False
        for number, wait_s in ((signal.SIGTERM, patience_s), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            until, told = time.monotonic() + wait_s, image(pid)
            while self._living(group) == pid:
                if time.monotonic() > until:
                    break
                if (now := image(pid)) != told:  # it had just started itself anew, and has not heard of it
                    told = now
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
                time.sleep(POLL_S)
            else:
                return True
        raise CannotStart(
            f"group {group}: process {pid} cannot be ended: is it stuck in the kernel (a dead mount, a GPU)?"
        )

    @staticmethod
    def left(pids: Iterable[int]) -> list[int]:
        """Those of these processes that still are ranks of some group."""
        return [pid for pid in pids if RANK_MODULE in _command(pid)]

    def log(self, group: str) -> Path:
        return self.directory / f"{group}.log"

    def tail(self, group: str, num_lines: int) -> list[str]:
        """The last lines of the log."""
        try:
            with self.log(group).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - max(TAIL_BYTES, 200 * num_lines)))
                return file.read().decode(errors="replace").splitlines()[-num_lines:] if num_lines else []
        except FileNotFoundError:
            return []

    def follow(self, group: str) -> Iterator[str]:
        """Whole lines that come from now on; '' now and then, so that the caller can look around.

        Begins again when the log was cut (logrotate's copytruncate) or another file has taken its place.
        """
        self.log(group).touch(mode=0o600)
        file = self.log(group).open("rb")
        file.seek(0, os.SEEK_END)
        rest = b""
        try:
            while True:
                *lines, rest = (rest + file.read(TAIL_BYTES)).split(b"\n")
                yield from (line.decode(errors="replace") for line in lines)
                if not lines:
                    yield ""
                    time.sleep(POLL_S)
                    with contextlib.suppress(FileNotFoundError):
                        there, ours = self.log(group).stat(), os.fstat(file.fileno())
                        if there.st_ino != ours.st_ino or there.st_size < file.tell():
                            file.close()
                            file, rest = self.log(group).open("rb"), b""
        finally:
            file.close()

    def _last_words(self, group: str) -> str:
        return next((line.strip()[:400] for line in reversed(self.tail(group, 40)) if line.strip()), "it said nothing")

    def _living(self, group: str) -> int | None:
        try:
            record = Record.model_validate_json(self._record(group).read_text())
        except (FileNotFoundError, ValueError):
            return None
        return record.pid if record.born and birth(record.pid) == record.born else None

    def _record(self, group: str) -> Path:
        return self.directory / f"{group}.json"

    @contextlib.contextmanager
    def _lock(self, group: str) -> Iterator[None]:
        """Two who start the same group at once start one."""
        with (self.directory / f"{group}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _command(pid: int) -> list[str]:
    """Its arguments; none if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def birth(pid: int) -> str:
    """When a process was made, by this boot's clock; '' if it has ended, a zombie too."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    fields = re.sub(r"^.*\) ", "", stat, flags=re.DOTALL).split()
    return "" if fields[0] == "Z" else f"{boot}:{fields[19]}"


def image(pid: int) -> str:
    """Where the kernel has put the program of a process, which is another place after each exec; '' if that cannot be
    seen."""
    try:
        fields = re.sub(r"^.*\) ", "", Path(f"/proc/{pid}/stat").read_text(), flags=re.DOTALL).split()
    except OSError:
        return ""
    return f"{fields[44]}:{fields[45]}"  # start_brk, arg_start

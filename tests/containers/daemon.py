"""The Docker that the tests use: the one that runs, else one of their own, which leaves nothing behind."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.containers.shell import run, succeeds

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0
CHAINS = ("DOCKER-USER", "DOCKER-ISOLATION-STAGE-1", "DOCKER-ISOLATION-STAGE-2", "DOCKER")


class Daemon:
    """`env` is what docker and docker-compose are to be run with."""

    def __init__(self) -> None:
        self.env = os.environ | {"DOCKER_CLI_HINTS": "false"}
        self.own = False
        self._directory: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._rules = ""
        self._bridge = False

    def __enter__(self) -> Self:
        if shutil.which("docker") is None:
            raise RuntimeError("there is no docker here: install it (Debian: docker.io and docker-compose)")
        if not succeeds(["docker", "info"], env=self.env):
            self._start()
        if not succeeds(["docker", "buildx", "version"], env=self.env):
            self.env["DOCKER_BUILDKIT"] = "0"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is None or self._directory is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._restore_network()
        shutil.rmtree(self._directory, ignore_errors=True)

    def docker(self, *arguments: str, timeout_s: float = 120.0, check: bool = True) -> str:
        return run("docker", *arguments, env=self.env, timeout_s=timeout_s, check=check)

    def _start(self) -> None:
        if shutil.which("dockerd") is None or os.geteuid() != 0:
            raise RuntimeError("no Docker answers; start it, or run this as root where dockerd is installed")
        self.own = True
        self._rules = run("iptables-save", check=False)
        self._bridge = Path("/sys/class/net/docker0").exists()
        self._directory = directory = Path(tempfile.mkdtemp(prefix="hortator-docker-"))
        self.env["DOCKER_HOST"] = f"unix://{directory}/docker.sock"
        with (directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "TERM", "dockerd"),
                    *("--data-root", str(directory / "data"), "--exec-root", str(directory / "exec")),
                    *("--pidfile", str(directory / "pid"), "--host", self.env["DOCKER_HOST"]),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until = time.monotonic() + START_TIMEOUT_S
        while not succeeds(["docker", "info"], env=self.env):
            if self._process.poll() is not None or time.monotonic() > until:
                said = (directory / "log").read_text(errors="replace")[-2000:]
                self.__exit__(None, None, None)
                raise RuntimeError(f"dockerd does not start:\n{said}")
            time.sleep(0.3)

    def _restore_network(self) -> None:
        """Undo what dockerd has done to this host's firewall and links and does not undo itself."""
        if ":DOCKER " in self._rules:
            return  # another Docker's
        for table in ("filter", "nat"):
            for rule in run("iptables-save", "-t", table, check=False).splitlines():
                words = rule.replace('"', "").split()
                ours = any(word in CHAINS or word.startswith(("docker0", "br-")) for word in words)
                if words[:1] == ["-A"] and (ours or "172.17.0.0/16" in words):
                    run("iptables", "-t", table, "-D", *words[1:], check=False)
            for chain in CHAINS:
                run("iptables", "-t", table, "-X", chain, check=False)
        if ":FORWARD DROP" not in self._rules:
            run("iptables", "-P", "FORWARD", "ACCEPT", check=False)
        if not self._bridge:
            run("ip", "link", "delete", "docker0", check=False)

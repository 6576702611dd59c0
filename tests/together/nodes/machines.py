"""Machines made of Linux namespaces: each has its own network, host name, processes, mounts and a real sshd as init.

    with Machines(directory, ["nodeA", "nodeB"]) as machines:
        machines["nodeA"].run("hostname")
        machines["nodeB"].link_down()

They hang on a bridge in one more network namespace, so nothing of this host's network is touched.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from hortator.topology.tied import tied

REPOSITORY = Path(__file__).resolve().parents[3]
PREFIX = "hortator-test-"
PROGRAMS = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "unshare": "util-linux",
}


def missing() -> str:
    """Why machines cannot be made here, or ''."""
    if os.geteuid() != 0:
        return "these tests make network namespaces, for which they must run as root"
    lacking = sorted({package for program, package in PROGRAMS.items() if find(program) is None})
    if lacking:
        return f"these tests need more programs: apt-get install {' '.join(lacking)}"
    probe = subprocess.run(
        ["unshare", "--net", "--uts", "--pid", "--ipc", "--mount", "--fork", "true"], capture_output=True, check=False
    )
    return "" if probe.returncode == 0 else f"no namespaces here: {probe.stderr.decode().strip()}"


def find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Machines(AbstractContextManager["Machines"]):
    """Any number of them, by name."""

    def __init__(self, directory: Path, names: list[str]) -> None:
        self.directory = directory
        self._prefix = f"{PREFIX}{os.getpid()}"
        self._switch = f"{self._prefix}-sw"
        self._machines = {name: Machine(self, name, number) for number, name in enumerate(names, start=1)}

    def __getitem__(self, name: str) -> "Machine":
        return self._machines[name]

    @property
    def identity_file(self) -> Path:
        return self.directory / "id"

    @property
    def known_hosts_file(self) -> Path:
        return self.directory / "known_hosts"

    def __enter__(self) -> Self:
        if reason := missing():
            raise RuntimeError(reason)
        self.directory.mkdir(parents=True, exist_ok=True)
        sweep()
        try:
            self._make_keys()
            self._make_network()
            for machine in self._machines.values():
                machine.boot()
            for machine in self._machines.values():
                machine.wait_for_sshd()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for machine in self._machines.values():
            machine.power_off()
            ip("netns", "del", machine.netns, check=False)
        ip("netns", "del", self._switch, check=False)

    def _make_keys(self) -> None:
        for name in ("id", "hostkey"):
            execute("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.directory / name))
        host_key = (self.directory / "hostkey.pub").read_text().split()[:2]
        machines = self._machines.values()
        self.known_hosts_file.write_text("".join(f"{m.name},{m.address} {' '.join(host_key)}\n" for m in machines))
        hosts = "".join(f"{m.address} {m.name}\n" for m in machines)
        (self.directory / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")

    def _make_network(self) -> None:
        ip("netns", "add", self._switch)
        ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        ip("-n", self._switch, "link", "set", "br0", "up")
        for machine in self._machines.values():
            ip("netns", "add", machine.netns)
            ip("-n", self._switch, "link", "add", machine.port, "type", "veth", "peer", "name", "eth0")
            ip("-n", self._switch, "link", "set", "eth0", "netns", machine.netns)
            ip("-n", self._switch, "link", "set", machine.port, "master", "br0", "up")
            ip("-n", machine.netns, "address", "add", f"{machine.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", machine.netns, "link", "set", device, "up")


class Machine:
    """One of them.  Processes on it are named by the pids that they have outside."""

    def __init__(self, machines: Machines, name: str, number: int) -> None:
        self._machines = machines
        self.name = name
        self.address = f"10.99.0.{number}"
        self.netns = f"{machines._prefix}-{number}"
        self.port = f"port{number}"
        self._switch = machines._switch
        self._process: subprocess.Popen[bytes] | None = None
        self.init = 0

    # --- power

    def boot(self) -> None:
        """sshd as process 1 of namespaces of its own."""
        directory = self._machines.directory
        config = directory / f"{self.name}.sshd"
        config.write_text(self._sshd_config())
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        script = (
            f"hostname {self.name} && mount -t proc proc /proc && mount --bind {directory}/hosts /etc/hosts && "
            f"mount -t tmpfs tmpfs /dev/shm && exec {find('sshd')} -D -e -f {config}"
        )
        with (directory / f"{self.name}.log").open("ab") as log:
            unshare = ("unshare", "--uts", "--pid", "--ipc", "--mount", "--fork", "--kill-child", "sh", "-c", script)
            self._process = subprocess.Popen(
                tied(("ip", "netns", "exec", self.netns, *unshare)),
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def _sshd_config(self) -> str:
        directory = self._machines.directory
        return "\n".join(
            [
                f"ListenAddress {self.address}",
                f"HostKey {directory}/hostkey",
                f"AuthorizedKeysFile {directory}/id.pub",
                "PidFile none",
                "UsePAM no",
                "StrictModes no",
                "PermitRootLogin yes",
                "PasswordAuthentication no",
                "PrintMotd no",
                f'SetEnv PYTHONPATH="{REPOSITORY}" OMP_NUM_THREADS="1"',
                "",
            ]
        )

    def wait_for_sshd(self, timeout_s: float = 10.0) -> None:
        assert self._process is not None
        until = time.monotonic() + timeout_s
        while not self._sshd_listens():
            log = self._machines.directory / f"{self.name}.log"
            assert self._process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.05)

    def _sshd_listens(self) -> bool:
        assert self._process is not None
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self._process.pid).children(recursive=True)
            for child in children:
                if child.name() == "sshd":
                    self.init = child.pid
                    found = subprocess.run(
                        ["nsenter", "-t", str(child.pid), "-n", "ss", "-Hltn"], capture_output=True, check=False
                    )
                    return b":22 " in found.stdout
        return False

    def power_off(self) -> None:
        """Kill process 1, and the kernel kills all others; the network stays."""
        if self._process is not None:
            if self.init:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.init, signal.SIGKILL)
            self._process.kill()
            self._process.wait(10)
            self._process, self.init = None, 0

    # --- processes

    def command(self, *argv: str) -> list[str]:
        """What runs `argv` on this machine, as its own process 1 would."""
        return ["nsenter", "-t", str(self.init), "--net", "--uts", "--pid", "--ipc", "--mount", "--", *argv]

    def popen(self, *argv: str, **options: Any) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(self.command(*argv), **options)

    def run(self, *argv: str) -> str:
        return execute(*self.command(*argv))

    def processes(self) -> list[psutil.Process]:
        """All that run in this machine's process namespace, init too."""
        namespace = _pid_namespace(self.init) if self.init else None
        return [p for p in psutil.process_iter() if namespace is not None and _pid_namespace(p.pid) == namespace]

    def matching(self, word: str) -> list[psutil.Process]:
        """Living processes with this word in their arguments."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if word in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        return self.matching("hortator.workers.rank")

    def keepers(self) -> list[psutil.Process]:
        return [p for p in self.matching("hortator.topology.keeper") if "python" in p.name()]

    # --- network

    def link_down(self) -> None:
        ip("-n", self._switch, "link", "set", self.port, "down")

    def link_up(self) -> None:
        ip("-n", self._switch, "link", "set", self.port, "up")

    def reset_connections(self) -> int:
        """Have the kernel reset every TCP connection of this machine, on this side."""
        found = self.run("ss", "-Htn", "state", "established").splitlines()
        self.run("ss", "-K", "-tn", "state", "established")
        return len(found)


def sweep() -> None:
    """Remove networks that a killed test run has left behind; its processes have died with it."""
    for line in execute("ip", "netns", "list").splitlines():
        name = line.split()[0]
        pid = name.removeprefix(PREFIX).partition("-")[0]
        if name.startswith(PREFIX) and pid.isdecimal() and not psutil.pid_exists(int(pid)):
            ip("netns", "del", name, check=False)


def ip(*arguments: str, check: bool = True) -> None:
    execute("ip", *arguments, check=check)


def execute(*argv: str, check: bool = True) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def _pid_namespace(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None

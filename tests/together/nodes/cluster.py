"""A fleet whose group spans machines: Redis and the front on the first one, ranks on all.

The test itself moves into the first machine's network, so that it reaches Redis as everybody there does.
"""

import ctypes
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.together.fleet import ECHO, LEASE_S, REPOSITORY, Fleet, Worker
from tests.together.nodes.machines import Machine, Machines

CLONE_NEWNET = 0x40000000


class Cluster(Fleet):
    """Machines, a redis-server on the first, one group at a time."""

    def __init__(self, directory: Path, names: list[str]) -> None:
        super().__init__(directory)
        self.names = names
        self.machines = Machines(directory / "machines", names)

    def __enter__(self) -> Self:
        self.machines.__enter__()
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            enter_network(Path(f"/run/netns/{self.first.netns}"))
            super().__enter__()
        except BaseException:
            self._leave()
            raise
        return self

    def _leave(self) -> None:
        enter_network(Path(f"/proc/self/fd/{self._home}"))
        os.close(self._home)
        self.machines.__exit__(None, None, None)

    @property
    def first(self) -> Machine:
        return self.machines[self.names[0]]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.workers:
            if kind is not None:
                print(f"---- {worker.group}\n{worker.tail(20_000)}")
            worker.stop()
        self.workers.clear()
        super().__exit__(kind, error, trace)
        self._leave()

    def worker(self, group: str = "one", *, environment: dict[str, str] | None = None, **settings: object) -> Worker:
        """A front on the first machine with one rank on each, started over ssh."""
        chosen: dict[str, object] = {
            "redis_url": self.redis.url,
            "model": ECHO,
            "engine": "tests.together.engines:slow_echo",
            "tensor_parallel_size": len(self.names),
            "hosts": ",".join(f"{name}:1" for name in self.names),
            "launcher": "ssh",
            "ssh_identity_file": self.machines.identity_file,
            "ssh_known_hosts_file": self.machines.known_hosts_file,
            "max_num_seqs": 32,
            "max_model_len": 4096,
            "lease_s": LEASE_S,
            "device": "cpu",
            "restart_backoff_s": 0.1,
        } | settings
        env = {f"HORTATOR_{name.upper()}": str(value) for name, value in chosen.items()}
        worker = ClusterWorker(self, group, env, environment)
        self.workers.append(worker)
        return worker

    def ranks(self) -> list[psutil.Process]:
        """On all machines."""
        return [process for name in self.names for process in self.machines[name].ranks()]

    def living(self) -> list[psutil.Process]:
        """Ranks, and the keepers with whatever started them."""
        return [*self.ranks(), *(keeper for name in self.names for keeper in self.machines[name].keepers())]


class ClusterWorker(Worker):
    """The same command, run on the first machine."""

    def __init__(self, fleet: Cluster, group: str, env: dict[str, str], environment: dict[str, str] | None) -> None:
        self.fleet, self.group = fleet, group
        self.log = fleet.directory / f"{group}.log"
        queue = env["HORTATOR_MODEL"]
        argv = [sys.executable, "-m", "celery", "-A", "hortator.workers", "worker", "-Q", queue, "-l", "INFO"]
        with self.log.open("ab") as out:
            self.process = fleet.first.popen(
                *argv, "-n", f"{group}@test",
                env=os.environ | env | {"HORTATOR_GROUP": group, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
                | (environment or {}),
                cwd=fleet.directory,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """Of the front itself; its command runs as a child of nsenter's."""
        children = psutil.Process(self.process.pid).children()
        return int(children[0].pid) if children else self.process.pid

    def stop(self) -> None:
        """End it whatever its state; what the machines still run then ends with them."""
        if self.process.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait(10)


def enter_network(path: Path) -> None:
    """Move this thread into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(fd, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {path}")
    finally:
        os.close(fd)


def secret_in(directory: Path) -> Path:
    """A file that lets keepers join; the machines share this host's disk."""
    path = directory / "secret"
    path.write_text(secrets.token_hex(32))
    path.chmod(0o600)
    return path

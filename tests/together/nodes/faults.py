"""What can happen to one machine of a group, and what is seen of it; benchmarks/bench_faults.py uses it too."""

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from tests.together.fleet import Worker, alive, wait_for
from tests.together.nodes.cluster import Cluster
from tests.together.nodes.machines import Machine

_DOWN = re.compile(r"group of epoch (\d+) is down: (.*?); next try")
_READY = re.compile(r"is ready after .* epoch (\d+),")


@dataclass(frozen=True, slots=True)
class Fault:
    """`strike` happens to a machine that holds peers; `heal` makes it usable again."""

    name: str
    strike: Callable[[Machine], object]
    heal: Callable[[Machine], object] = lambda _: None
    detect_s: float = 1.5
    reachable: bool = True


def kill(processes: Callable[[Machine], list[psutil.Process]], number: signal.Signals) -> Callable[[Machine], None]:
    def strike(machine: Machine) -> None:
        for process in processes(machine):
            os.kill(process.pid, number)

    return strike


def sessions(machine: Machine) -> list[psutil.Process]:
    """The sshd processes under which keepers run."""
    return [keeper.parent() for keeper in machine.keepers()]


def restart(machine: Machine) -> None:
    machine.boot()
    machine.wait_for_sshd()


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("rank killed", kill(Machine.ranks, signal.SIGKILL)),
        Fault("rank stopped", kill(Machine.ranks, signal.SIGSTOP), detect_s=5.0),
        Fault("keeper killed", kill(Machine.keepers, signal.SIGKILL)),
        Fault("keeper stopped", kill(Machine.keepers, signal.SIGSTOP), detect_s=5.0, reachable=False),
        Fault("ssh session killed", kill(sessions, signal.SIGKILL)),
        Fault("tcp reset", Machine.reset_connections),
        Fault("link down", Machine.link_down, Machine.link_up, detect_s=5.0),
        Fault("node killed", Machine.power_off, restart),
    )
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one fault went.  `orphans`: processes of the struck epoch that were left when the next one was ready."""

    reason: str
    detect_s: float
    gone_s: float
    recover_s: float
    orphans: int


def downs(worker: Worker) -> list[tuple[int, str]]:
    """Epoch and reason of every Down that the front has logged."""
    return [(int(epoch), reason) for epoch, reason in _DOWN.findall(worker.log.read_text(errors="replace"))]


def readies(worker: Worker) -> list[int]:
    """The epochs that the front has logged as ready."""
    return [int(epoch) for epoch in _READY.findall(worker.log.read_text(errors="replace"))]


def wait_ready(worker: Worker, *, after: int = 0, timeout_s: float = 60.0) -> int:
    """Until the log tells of a ready epoch after the given one; which."""

    def probe() -> int:
        assert worker.process.poll() is None, worker.tail()
        return next((epoch for epoch in readies(worker) if epoch > after), 0)

    return wait_for(f"an epoch after {after}", probe, timeout_s)


def suffer(
    cluster: Cluster, worker: Worker, fault: Fault, victim: str, *, heal_after_s: float = 0.0, lasting: bool = False
) -> Outcome:
    """Strike a ready group, wait until it is ready again, and look what is left of its last life.

    `lasting`: keepers are meant to outlive it."""
    machine = cluster.machines[victim]
    epoch, num_downs = readies(worker)[-1], len(downs(worker))
    before = [process.pid for process in (cluster.ranks() if lasting else cluster.living())]
    struck = time.monotonic()
    fault.strike(machine)
    wait_for("the group to go down", lambda: len(downs(worker)) > num_downs, fault.detect_s + 10.0)
    detect_s = time.monotonic() - struck
    time.sleep(max(0.0, struck + heal_after_s - time.monotonic()))
    reachable = before if fault.reachable else [p for p in before if p not in pids(machine)]
    wait_for("what is left to end", lambda: not any(map(alive, reachable)), 10.0)
    gone_s = time.monotonic() - struck
    fault.heal(machine)
    if fault.name == "keeper stopped":
        kill(Machine.keepers, signal.SIGCONT)(machine)
    wait_ready(worker, after=epoch)
    recover_s = time.monotonic() - struck
    return Outcome(downs(worker)[num_downs][1], detect_s, gone_s, recover_s, sum(map(alive, before)))


def pids(machine: Machine) -> set[int]:
    return {process.pid for process in machine.processes()}

"""What it costs to lose a rank, a keeper, a link, a machine: detection and recovery over many trials, as a table.

Two machines made of namespaces, a group of two ranks over ssh, the echo engine at 20 ms a step; every second trial
finds the group at work, the others find it idle.  Needs root, openssh-server, iproute2, pdsh.

    python benchmarks/bench_faults.py [--trials 8] [--fault "rank killed" …] [--max-minutes 20] [--json FILE]
    python benchmarks/bench_faults.py --control [--peers 64]

`--control`: instead, what watching that many ranks costs the front, in CPU, with their beats and nothing else.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hortator.producer.schema import State
from hortator.topology.control import ControlServer
from hortator.topology.tether import ControlClient
from tests.together.nodes.cluster import Cluster
from tests.together.nodes.faults import FAULTS, Fault, Outcome, suffer, wait_ready
from tests.together.nodes.machines import missing

TOKENS = 100
PROMPTS = [f"prompt {i} of the benchmark of faults;" for i in range(4)]
KEY = bytes(32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8, help="of each fault")
    parser.add_argument("--fault", nargs="*", choices=sorted(FAULTS), default=list(FAULTS))
    parser.add_argument("--max-minutes", type=float, default=20.0, help="stop after this, whatever is left")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--control", action="store_true")
    parser.add_argument("--peers", type=int, default=64)
    options = parser.parse_args()
    if options.control:
        measure_control(options.peers)
        return
    if reason := missing():
        sys.exit(reason)
    outcomes = run(options)
    show(outcomes)
    if options.json:
        found = {name: [outcome.__getstate__() for outcome in several] for name, several in outcomes.items()}
        options.json.write_text(json.dumps(found, indent=1, default=str))


def run(options: argparse.Namespace) -> dict[str, list[Outcome]]:
    outcomes: dict[str, list[Outcome]] = defaultdict(list)
    until = time.monotonic() + 60 * options.max_minutes
    with (
        tempfile.TemporaryDirectory(prefix="bench-faults-") as directory,
        Cluster(Path(directory), ["nodeA", "nodeB"]) as cluster,
    ):
        worker = cluster.worker()
        wait_ready(worker)
        for trial in range(options.trials):
            for name in options.fault:
                if time.monotonic() < until:
                    outcomes[name].append(one(cluster, FAULTS[name], busy=trial % 2 == 0))
    return outcomes


def one(cluster: Cluster, fault: Fault, *, busy: bool) -> Outcome:
    """One trial; the jobs of a busy one must all succeed afterwards."""
    (worker,) = cluster.workers
    asked = cluster.enqueue(PROMPTS, max_tokens=TOKENS) if busy else []
    if busy:
        cluster.progressed(asked, 3)
    outcome = suffer(cluster, worker, fault, "nodeB")
    if busy:
        states = {status.state for status in cluster.finished(asked).values()}
        assert states == {State.SUCCEEDED}, states
    time.sleep(0.2)
    return outcome


def show(outcomes: dict[str, list[Outcome]]) -> None:
    table = Table(title="two machines, one rank each; seconds")
    for column in ("fault", "trials", "noticed p50", "p99", "all gone p50", "p99", "ready again p50", "p99", "orphans"):
        table.add_column(column, justify="left" if column == "fault" else "right")
    for name, several in outcomes.items():
        figures = [[getattr(o, field) for o in several] for field in ("detect_s", "gone_s", "recover_s")]
        cells = [f"{value:.2f}" for column in figures for value in (statistics.median(column), p99(column))]
        table.add_row(name, str(len(several)), *cells, str(sum(o.orphans for o in several)))
    everything = [o for several in outcomes.values() for o in several]
    table.caption = f"{len(everything)} trials, {sum(o.orphans for o in everything)} orphans"
    Console(width=140).print(table)


def p99(values: list[float]) -> float:
    """The largest, below a hundred values."""
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.99))]


def measure_control(num_peers: int, seconds: float = 10.0) -> None:
    """The front's thread alone does what a front's thread does; the ranks are threads that only beat."""
    server = ControlServer()
    server.begin(epoch=1, key=KEY, world_size=num_peers)
    over = threading.Event()
    cpu_s = [0.0, 0.0]

    def front() -> None:
        while server.info is None:
            server.poll(0.1)
        cpu_s[0] = time.thread_time()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            assert server.poll(0.1) == []
        cpu_s[1] = time.thread_time()
        over.set()

    thread = threading.Thread(target=front)
    thread.start()
    clients = []
    for rank in range(num_peers):
        client = ControlClient(server.address, key=KEY, epoch=1, rank=rank, end=lambda *_: None)
        client.hello(fingerprint={}, store=["127.0.0.1", 1])
        clients.append(client)
    for client in clients:
        client.wait_welcome(30)
        client.ready({"limits": {}, "details": {}})
    over.wait()
    thread.join()
    used = cpu_s[1] - cpu_s[0]
    Console().print(f"{num_peers} ranks: {1000 * used / seconds:.2f} ms of CPU a second ({100 * used / seconds:.2f} %)")
    for client in clients:
        client.close()
    server.close()


if __name__ == "__main__":
    main()

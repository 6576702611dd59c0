"""What it costs to lose a rank, a keeper, a link, a machine, a leader: many trials of each, as tables.

    python benchmarks/bench_faults.py [--trials 2] [--fault "rank killed" …] [--phase idle load prefill decode]
                                      [--max-minutes 20] [--json FILE]
    python benchmarks/bench_faults.py --takeover [--trials 7] …
    python benchmarks/bench_faults.py --show --json FILE
    python benchmarks/bench_faults.py --control [--peers 64]

Two machines made of namespaces, a group of two ranks over ssh, the paged engine with the demo model on CPUs, up to 16
tokens a step; needs root, openssh-server, iproute2, pdsh.  Each fault strikes an idle group, one to which jobs keep
coming, one in the middle of prompts, and one in the middle of answers; all jobs must succeed afterwards.
`--takeover`: instead, two groups of one rank each on this machine, both at work, and the leader of one is killed.

A token is wasted if it was computed and had to be computed again.  Rank 0 writes down what every step computes; what
exceeds the tokens of prompts and answers is waste.

`--json` goes on with what is in the file, so that a long run may be done in pieces; `--show` prints its tables.
`--control`: what watching that many ranks costs the front, in CPU, with their beats and nothing else.
"""

import argparse
import itertools
import json
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hortator.producer import Job, Sampling
from hortator.producer.schema import State
from hortator.topology.control import ControlServer
from hortator.topology.tether import ControlClient
from tests.together.engines import METER
from tests.together.fleet import ECHO, REPOSITORY, Fleet, Worker, alive, wait_for
from tests.together.nodes.cluster import Cluster
from tests.together.nodes.faults import FAULTS, suffer, wait_ready
from tests.together.nodes.machines import missing

LEADER_KILLED = "leader killed"
KEY = bytes(32)
SETTINGS: dict[str, object] = {
    "engine": "tests.together.engines:metered",
    "model_path": REPOSITORY / "demo" / "model",
    "max_model_len": 512,
    "max_num_batched_tokens": 16,  # a prompt takes its time
    "lease_s": 3.0,
}


@dataclass(frozen=True, slots=True)
class Trial:
    """`noticed_s`: the group is known to be down.  `gone_s`: none of its processes lives.  `again_s`: it is ready
    again, or of a killed leader: all of its jobs run elsewhere."""

    fault: str
    phase: str
    noticed_s: float
    gone_s: float
    again_s: float
    orphans: int
    wasted: int
    needed: int
    first_again_s: float | None = None  # of a killed leader: the first of its jobs runs elsewhere


class Work:
    """Jobs of one trial, and what became of the tokens."""

    def __init__(self, fleet: Fleet, meter: Path) -> None:
        self.fleet, self.meter = fleet, meter
        self._random = random.Random(7)
        self.ids: list[str] = []
        self.needed = 0
        self._before = 0

    def begin(self) -> None:
        self.ids, self.needed, self._before = [], 0, self._metered()

    def ask(self, number: int, *, prompt: int, answer: int) -> None:
        """Jobs of so many tokens; no two begin alike."""
        jobs = [
            Job(
                model=ECHO,
                token_ids=tuple(self._random.randrange(3, 64) for _ in range(prompt)),
                sampling=Sampling(max_tokens=answer, ignore_eos=True),
            )
            for _ in range(number)
        ]
        self.needed += number * (prompt + answer - 1)  # the last token is never fed
        self.ids += [handle.id for handle in self.fleet.client.enqueue_many(jobs)]

    @property
    def computed(self) -> int:
        return self._metered() - self._before

    def finish(self) -> int:
        """Until all have succeeded; the wasted tokens."""
        states = {status.state for status in self.fleet.finished(self.ids, 120.0).values()} if self.ids else set()
        assert states <= {State.SUCCEEDED}, states
        time.sleep(0.2)
        return max(0, self.computed - self.needed)

    def _metered(self) -> int:
        return sum(map(int, self.meter.read_text().split())) if self.meter.exists() else 0


# What a group does when it is struck.  `scale`: groups that share the work.


def idle(_work: Work, _scale: int) -> None:
    time.sleep(0.5)


def prefill(work: Work, scale: int) -> None:
    """In the middle of prompts: no job has a token."""
    work.ask(4 * scale, prompt=200 * scale, answer=20 * scale)
    wait_for("half of the prompts", lambda: work.computed > 350 * scale**2)


def decode(work: Work, scale: int) -> None:
    """All jobs are in the middle of their answers."""
    work.ask(4 * scale, prompt=20, answer=100 * scale)
    wait_for("the middle of the answers", lambda: work.computed > 4 * scale * (20 + 30 * scale))


def load(work: Work, scale: int) -> None:
    """Jobs come one after the other: some are read, some answered, some wait."""
    for number in range(8 * scale):
        work.ask(1, prompt=(20, 150)[number % 2] * scale, answer=(75, 30)[number % 2] * scale)
        time.sleep(0.1 / scale)


PHASES: dict[str, Callable[[Work, int], None]] = {"idle": idle, "load": load, "prefill": prefill, "decode": decode}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2, help="of each fault in each phase")
    parser.add_argument("--fault", nargs="*", choices=sorted(FAULTS), default=list(FAULTS))
    parser.add_argument("--phase", nargs="*", choices=list(PHASES), default=list(PHASES))
    parser.add_argument("--max-minutes", type=float, default=20.0, help="stop after this, whatever is left")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--takeover", action="store_true")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--control", action="store_true")
    parser.add_argument("--peers", type=int, default=64)
    options = parser.parse_args()
    if options.control:
        measure_control(options.peers)
        return
    trials = read(options.json)
    if not options.show:
        if not options.takeover and (reason := missing()):
            sys.exit(reason)
        until = time.monotonic() + 60 * options.max_minutes
        faults = [LEADER_KILLED] if options.takeover else options.fault
        left = [case for case in cases(options, faults, trials) if case != (LEADER_KILLED, "idle")]
        for trial in (run_takeovers if options.takeover else run)(left, until):
            Console(stderr=True).print(trial)
            trials.append(trial)
            if options.json:
                options.json.write_text(json.dumps([asdict(one) for one in trials], indent=1))
    show(trials)


def read(path: Path | None) -> list[Trial]:
    return [Trial(**one) for one in json.loads(path.read_text())] if path and path.exists() else []


def cases(options: argparse.Namespace, faults: list[str], done: list[Trial]) -> list[tuple[str, str]]:
    """What is still to be tried: fault and phase, round by round."""
    found = Counter((trial.fault, trial.phase) for trial in done)
    wanted = itertools.product(range(options.trials), faults, options.phase)
    return [(fault, phase) for number, fault, phase in wanted if number >= found[fault, phase]]


def run(left: list[tuple[str, str]], until: float) -> Iterator[Trial]:
    with (
        tempfile.TemporaryDirectory(prefix="bench-faults-") as directory,
        Cluster(Path(directory), ["nodeA", "nodeB"]) as cluster,
    ):
        work = Work(cluster, Path(directory) / "meter")
        worker = cluster.worker(environment={METER: str(work.meter)}, **SETTINGS)
        wait_ready(worker)
        for name, phase in left:
            if time.monotonic() < until:
                work.begin()
                PHASES[phase](work, 1)
                o = suffer(cluster, worker, FAULTS[name], "nodeB")
                wasted = work.finish()
                yield Trial(name, phase, o.detect_s, o.gone_s, o.recover_s, o.orphans, wasted, work.needed)


def run_takeovers(left: list[tuple[str, str]], until: float) -> Iterator[Trial]:
    with tempfile.TemporaryDirectory(prefix="bench-faults-") as directory, Fleet(Path(directory)) as fleet:
        work = Work(fleet, Path(directory) / "meter")
        names = itertools.count(1)

        def start() -> Worker:
            return fleet.worker(
                f"group-{next(names)}", tensor_parallel_size=1, max_num_seqs=4,
                environment={METER: str(work.meter), "OMP_NUM_THREADS": "1"}, **SETTINGS
            )  # fmt: skip

        survivor, victim = start().ready(), start().ready()
        for _, phase in left:
            if time.monotonic() < until:
                work.begin()
                PHASES[phase](work, 2)
                yield take_over(fleet, work, victim, phase)
                fleet.workers.remove(victim)
                victim = start().ready()
                assert survivor.process.poll() is None


def take_over(fleet: Fleet, work: Work, victim: Worker, phase: str) -> Trial:
    """Kill the leader, and look how its jobs fare."""
    ranks, held = victim.ranks(), held_by(fleet, work.ids, victim)
    victim.signal(signal.SIGKILL)
    killed = time.monotonic()

    def since(what: str, probe: Callable[[], bool]) -> float:
        wait_for(what, probe, 60.0)
        return time.monotonic() - killed

    gone_s = since("its ranks to end", lambda: not any(map(alive, ranks)))
    victim.process.wait(10)
    again: set[str] = set()

    def num_again() -> int:
        again.update(job_id for job_id in held if fleet.status(job_id).attempt > 1)
        return len(again)

    def noticed() -> bool:
        return num_again() > 0 or any(queue.suspects for queue in fleet.store.queues())

    noticed_s = since("its death to be noticed", noticed) if held else gone_s
    first_s = since("the first of its jobs", lambda: num_again() > 0) if held else gone_s
    all_s = since("all of its jobs", lambda: num_again() == len(held))
    wasted = work.finish()
    return Trial(LEADER_KILLED, phase, noticed_s, gone_s, all_s, sum(map(alive, ranks)), wasted, work.needed, first_s)


def held_by(fleet: Fleet, ids: list[str], worker: Worker) -> list[str]:
    redis, names = fleet.store._redis, fleet.store.names
    owners = {job_id: redis.hget(names.job(job_id), "owner") for job_id in ids}
    return [job_id for job_id, owner in owners.items() if owner and owner.decode().startswith(f"{worker.group}#")]


def show(trials: list[Trial]) -> None:
    deaths = [trial for trial in trials if trial.fault == LEADER_KILLED]
    others = [trial for trial in trials if trial.fault != LEADER_KILLED]
    for title, of, key in (
        ("by fault", others, lambda trial: trial.fault),
        ("by what the group did", others, lambda trial: trial.phase),
        ("leader killed, another group at work", deaths, lambda trial: trial.phase),
    ):
        if of:
            Console(width=150).print(table(title, of, key))


def table(title: str, trials: list[Trial], key: Callable[[Trial], str]) -> Table:
    found = Table(title=f"{title}; p50 / p99 in seconds")
    for column in ("", "trials", "noticed", "all gone", "first job again", "again", "wasted tokens", "orphans"):
        found.add_column(column, justify="right" if column else "left")
    for name in [*dict.fromkeys(map(key, trials)), "all"]:
        some = [trial for trial in trials if name in ("all", key(trial))]
        at_work = [trial for trial in some if trial.needed]
        found.add_row(
            name, str(len(some)), both(t.noticed_s for t in some), both(t.gone_s for t in some),
            both(t.first_again_s for t in some), both(t.again_s for t in some), waste(at_work),
            str(sum(t.orphans for t in some)),
        )  # fmt: skip
    return found


def waste(trials: list[Trial]) -> str:
    if not trials:
        return "none"
    wasted, needed = sum(t.wasted for t in trials), sum(t.needed for t in trials)
    median, most = statistics.median(t.wasted for t in trials), p99([t.wasted for t in trials])
    return f"{median:.0f} / {most:.0f} ({wasted / needed:.0%})"


def both(several: Iterable[float | None]) -> str:
    values = [value for value in several if value is not None]
    return f"{statistics.median(values):.2f} / {p99(values):.2f}" if values else ""


def p99(values: list[float] | list[int]) -> float:
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

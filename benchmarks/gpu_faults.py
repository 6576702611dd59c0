"""What it costs to lose a rank of a group with a real engine: detection, recovery, memory, as a table.

    python benchmarks/gpu_faults.py [--layout 2x1] [--trials 10] [--shape '{}'] [--json FILE]
    python benchmarks/gpu_faults.py --device cpu --shape '{"hidden_size": 128, …}' --prompt-tokens 600 …   without GPUs

A private Redis, a real `celery worker`, ranks on this host (NCCL on GPUs, gloo on CPUs), collectives that time out
after 30 minutes.  In each trial some jobs are enqueued; in their prefill (no token yet) or in their decode (each has
some) one rank, in turn, is killed or stopped.  Then:

- noticed: until the front says that the group is down; it must be within 1 s (killed) or 6 s (stopped).
- gone: until no process of that life is left.
- memory: until the GPUs' memory is back where it was before the worker came, within 10 s; the next life waits for 3 s
  before it begins (restart_backoff_s), so this can be seen.  On CPUs: what the ranks of that life hold.
- ready: until the next life takes jobs.   done: until all jobs are finished.

All jobs must succeed, and what clients had read before the fault must be the beginning of what they got in the end.
In float32 (--dtype float32) they must also get exactly what the same prompts gave without any fault: the control arm.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from crew import ENVIRONMENT, Layout
from gpu_engine import LLAMA_8B, commit, draw_mix
from gpu_line import make_model
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hortator.producer import Job, Sampling
from hortator.producer.schema import State, Status
from hortator.topology.gpus import read_gpus
from tests.together.fleet import Fleet, Worker, alive, wait_for
from tests.together.nodes.faults import downs, readies, wait_ready

MODEL = "bench"
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
BOUNDS_S = {"killed": 1.0, "stopped": 6.0}
BACKOFF_S = 3.0
MEMORY_S = 10.0
SLACK_BYTES = 64 << 20
TRIES = 10  # for a trial whose jobs had left the phase before the fault struck


@dataclass(frozen=True, slots=True)
class Trial:
    """What one fault did; seconds since it struck."""

    phase: str
    fault: str
    rank: int
    noticed_s: float
    gone_s: float
    memory_s: float | None
    ready_s: float
    done_s: float
    orphans: int
    jobs: int
    succeeded: int
    prefix_kept: int
    same_as_undisturbed: int
    tokens_before: int  # in the journals when the fault struck
    reason: str


class Memory:
    """Bytes in use on the GPUs, or by certain processes where there are none."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._before = self._gpus() if self._cuda else 0

    def above(self, pids: list[int]) -> int:
        """More than before anything was started."""
        return self._gpus() - self._before if self._cuda else sum(map(resident, pids))

    def _gpus(self) -> int:
        gpus, problem = read_gpus()
        if problem or not gpus:
            raise RuntimeError(problem or "nvidia-smi is not there: the GPUs' memory cannot be watched")
        return sum(gpu.total_bytes - gpu.free_bytes for gpu in gpus)


def resident(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


class Return(threading.Thread):
    """Watches until memory is back."""

    def __init__(self, memory: Memory, pids: list[int]) -> None:
        super().__init__(daemon=True)
        self._memory, self._pids = memory, pids
        self._began = time.monotonic()
        self.seconds: float | None = None
        self.start()

    def run(self) -> None:
        while time.monotonic() - self._began < MEMORY_S:
            if self._memory.above(self._pids) < SLACK_BYTES:
                self.seconds = time.monotonic() - self._began
                return
            time.sleep(0.05)


class Line:
    """The fleet under test: one worker."""

    def __init__(self, fleet: Fleet, args: argparse.Namespace, folder: Path) -> None:
        self.fleet, self.args = fleet, args
        self.memory = Memory(args.device)
        self._seed = 0
        self.worker: Worker = fleet.worker(
            model=MODEL, engine="paged", model_path=folder, load_format="dummy", device=args.device, dtype=args.dtype,
            tensor_parallel_size=args.layout.tp, pipeline_parallel_size=args.layout.pp, max_num_seqs=args.jobs,
            max_model_len=args.prompt_tokens + args.output_tokens + 64, lease_s=15,
            max_num_batched_tokens=args.max_num_batched_tokens, restart_backoff_s=BACKOFF_S,
            **({"kv_cache_bytes": args.kv_cache_bytes} if args.kv_cache_bytes else {}),
        )  # fmt: skip
        wait_ready(self.worker, timeout_s=600)

    def enqueue(self, *, fresh: bool = True) -> list[str]:
        """Prompts that were not asked before; or the last ones again."""
        self._seed += fresh
        length, output = self.args.prompt_tokens, self.args.output_tokens
        vocab_size = int((LLAMA_8B | self.args.shape)["vocab_size"])
        wanted = draw_mix(
            self._seed, vocab_size, count=self.args.jobs, prompts=(length, length), outputs=(output, output)
        )
        jobs = [
            Job(model=MODEL, token_ids=r.prompt, sampling=Sampling(max_tokens=output, ignore_eos=True)) for r in wanted
        ]
        return [handle.id for handle in self.fleet.client.enqueue_many(jobs)]

    def statuses(self, ids: list[str]) -> list[Status]:
        found = self.fleet.store.statuses(ids)
        assert all(found)
        return [status for status in found if status is not None]

    def tokens(self, ids: list[str]) -> list[tuple[int, ...]]:
        """Of finished jobs."""
        done = self.fleet.finished(ids, timeout_s=300)
        results = [done[i].result for i in ids]
        return [result.token_ids if result is not None else () for result in results]

    def reach(self, phase: str) -> list[str] | None:
        """Jobs in that phase; None if they had left it already."""
        ids = self.enqueue()

        def there() -> bool:
            found = self.statuses(ids)
            if phase == "prefill":
                return any(status.state is not State.QUEUED for status in found)
            return all(status.num_tokens >= 4 for status in found)

        wait_for(f"{phase} of {len(ids)} jobs", there, 300)
        if phase == "prefill":
            time.sleep(self.args.prefill_delay)
        still = [
            not status.num_tokens if phase == "prefill" else not status.state.terminal for status in self.statuses(ids)
        ]
        if all(still):
            return ids
        self.tokens(ids)
        return None


def one(line: Line, phase: str, fault: str, rank: int) -> Trial:
    for _ in range(TRIES):
        if (ids := line.reach(phase)) is not None:
            break
    else:
        raise RuntimeError(f"the {phase} is over too soon: raise --prompt-tokens or --output-tokens")
    worker = line.worker
    epoch, num_downs, pids = readies(worker)[-1], len(downs(worker)), worker.ranks()
    before = {i: journal(line, i) for i in ids}
    struck = time.monotonic()
    os.kill(pids[rank], SIGNALS[fault])
    memory = Return(line.memory, pids)
    wait_for("the group to go down", lambda: len(downs(worker)) > num_downs, 30)
    noticed_s = time.monotonic() - struck
    gone_s = seconds_until(lambda: not any(map(alive, pids)), struck, 10)
    wait_ready(worker, after=epoch, timeout_s=600)
    ready_s = time.monotonic() - struck
    after = line.tokens(ids)
    done_s = time.monotonic() - struck
    memory.join()
    orphans = sum(map(alive, pids))
    states = [status.state for status in line.statuses(ids)]
    undisturbed = line.tokens(line.enqueue(fresh=False))
    return Trial(
        phase, fault, rank, noticed_s, gone_s, memory.seconds, ready_s, done_s, orphans, len(ids),
        succeeded=states.count(State.SUCCEEDED),
        prefix_kept=sum(tokens[: len(before[i])] == before[i] for i, tokens in zip(ids, after, strict=True)),
        same_as_undisturbed=sum(a == b for a, b in zip(after, undisturbed, strict=True)),
        tokens_before=sum(map(len, before.values())),
        reason=downs(worker)[num_downs][1],
    )  # fmt: skip


def journal(line: Line, job_id: str) -> tuple[int, ...]:
    """What a client could have read by now."""
    chunks = line.fleet.store.chunks(job_id)
    return tuple(token for chunk in chunks for token in chunk.token_ids)


def seconds_until(probe: Callable[[], bool], since: float, timeout_s: float) -> float:
    deadline = time.monotonic() + timeout_s
    while not probe() and time.monotonic() < deadline:
        time.sleep(0.01)
    return time.monotonic() - since


def measure(args: argparse.Namespace) -> Iterator[Trial]:
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    with tempfile.TemporaryDirectory(prefix="gpu-faults-") as name:
        folder, directory = Path(name) / "model", Path(name) / "fleet"
        folder.mkdir()
        directory.mkdir()
        make_model(folder, args.shape)
        with Fleet(directory) as fleet:
            line = Line(fleet, args, folder)
            line.tokens(line.enqueue())  # warm-up
            for trial in range(args.trials):
                for phase in args.phases:
                    for fault in args.faults:
                        found = one(line, phase, fault, trial % args.layout.size)
                        print(f"{asdict(found)}", file=sys.stderr, flush=True)
                        yield found


def show(trials: list[Trial], args: argparse.Namespace) -> None:
    table = Table(title=f"{args.layout} on {args.device}, {args.jobs} jobs a trial; seconds, median / largest")
    names = ("fault", "trials", "noticed", "bound", "gone", "memory back", "ready again", "jobs done", "orphans")
    for name in (*names, "succeeded", "prefix kept", "as undisturbed"):
        table.add_column(name, justify="left" if name == "fault" else "right")
    for phase in args.phases:
        for fault in args.faults:
            some = [t for t in trials if (t.phase, t.fault) == (phase, fault)]
            jobs = sum(t.jobs for t in some)
            table.add_row(
                f"{fault} in {phase}", str(len(some)), both(t.noticed_s for t in some), f"{BOUNDS_S[fault]:g}",
                both(t.gone_s for t in some), both(t.memory_s for t in some), both(t.ready_s for t in some),
                both(t.done_s for t in some), str(sum(t.orphans for t in some)),
                *(f"{sum(getattr(t, n) for t in some)} of {jobs}" for n in ("succeeded", "prefix_kept")),
                f"{sum(t.same_as_undisturbed for t in some)} of {jobs}",
            )  # fmt: skip
    Console(width=150).print(table)


def both(values: Iterator[float | None]) -> str:
    """Median and largest; what never came counts as infinite."""
    known = [float("inf") if value is None else value for value in values]
    return f"{statistics.median(known):.2f} / {max(known):.2f}"


def faults_of(trials: list[Trial], args: argparse.Namespace) -> list[str]:
    """What was promised and not kept."""
    wrong = []
    for t in trials:
        name = f"rank {t.rank} {t.fault} in {t.phase}"
        checks = {
            f"noticed after {t.noticed_s:.2f} s": t.noticed_s <= BOUNDS_S[t.fault],
            "memory is not back": t.memory_s is not None,
            f"{t.orphans} orphans": not t.orphans,
            f"{t.jobs - t.succeeded} jobs did not succeed": t.succeeded == t.jobs,
            "an accepted prefix has changed": t.prefix_kept == t.jobs,
            "answers differ from those without a fault": args.dtype != "float32" or t.same_as_undisturbed == t.jobs,
        }
        wrong += [f"{name}: {what}" for what, kept in checks.items() if not kept]
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--layout", type=Layout.read, default=Layout(2, 1), help="tensor x pipeline parallel ranks")
    parser.add_argument("--shape", type=json.loads, default={}, help="JSON over Llama-3.1-8B's config")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--trials", type=int, default=10, help="of each fault in each phase")
    parser.add_argument("--phases", nargs="+", choices=["prefill", "decode"], default=["prefill", "decode"])
    parser.add_argument("--faults", nargs="+", choices=list(SIGNALS), default=list(SIGNALS))
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=16_000)
    parser.add_argument("--output-tokens", type=int, default=400)
    parser.add_argument("--prefill-delay", type=float, default=0.2, help="seconds into the prefill")
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--kv-cache-bytes", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    trials = list(measure(args))
    show(trials, args)
    wrong = faults_of(trials, args)
    for problem in wrong:
        print(problem)
    if args.json:
        found = {"args": sys.argv[1:], "commit": commit(), "trials": [asdict(trial) for trial in trials]}
        args.json.write_text(json.dumps(found, indent=1))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

"""What calling every step costs: the step plan on 2 and 4 ranks, and scheduler and sampler as the rows grow.

    python benchmarks/bench_lockstep.py [--parts plan growth] [--layouts 2x1 1x2 2x2] [--sequences 1 8 64 256]
    python benchmarks/bench_lockstep.py --device cuda --shape '{}' --parts plan idle --layouts 2x1 --sequences 1 32 256

plan: so many sequences run all the time; who ends is replaced by a new prompt of 32 tokens, which goes with the next
plan.  Ranks are processes with the real engine, channel and checks.  Per step, medians: what the leader needs to encode
and to hand to the broadcast; from there until the plan is in the last peer's hands (less the time for which that peer
was still at work on the step before); what a peer needs to decode it and to compare digests.  The control arm, in
rounds in turn, broadcasts nothing: every rank makes the same plans itself.  The difference of the two steps is what of
all this can be seen; hidden is the rest.  Beside it what a peer's own scheduling takes, which begins when the plan has
come, and so is not done at the same time as the leader's.

growth: the host's work per step as rows grow.  Scheduling is `apply` and `execute` of a whole engine whose layers cost
nothing, with the same turnover; its control arm is a loop that appends one token to each row and hashes them.
Sampling is bench_sampler.py's; its control arm is the argmax of the same logits.

idle: a real group whose collectives time out after 10 s, idle for longer.
"""

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from bench_sampler import measure as measure_sampler
from crew import EPOCH, Layout, own_seat, pull, row, settle
from gpu_engine import LLAMA_8B
from rich.console import Console
from rich.table import Table

from hortator.topology.mesh import Mesh
from hortator.workers.collector import spare_what_is_loaded
from hortator.workers.engine.attention import Pulse
from hortator.workers.engine.build import build_engine
from hortator.workers.engine.engine import Limits, PagedEngine
from hortator.workers.engine.model import read_config
from hortator.workers.engine.parallel import SingleRank
from hortator.workers.engine.pipeline import Arrival, OneStage
from hortator.workers.engine.runner import Flight, Runner
from hortator.workers.engine.sampler import Sampler
from hortator.workers.engine.scheduler import Batch
from hortator.workers.engine.step import Request, SamplingParams, StepOutput, StepPlan
from hortator.workers.lockstep import DistributedChannel, Follower, encode_plan

DEMO = Path(__file__).resolve().parents[1] / "demo" / "model"
PROMPT, OUTPUT = 32, 64
News = tuple[tuple[Request, ...], tuple[int, ...]]  # admissions and cancels
WARM_STEPS = 16


class Turnover:
    """So many sequences at a time, whose ends are spread evenly; every rank can make the same plans from it."""

    def __init__(self, sequences: int, *, vocabulary: int, seed: int) -> None:
        self._sequences = sequences
        self._rng = random.Random(seed)
        self._vocabulary = vocabulary
        self._next = seed * 1_000_000
        self._running: set[int] = set()

    def begin(self) -> tuple[Request, ...]:
        return tuple(self._request(1 + OUTPUT * (i + 1) // self._sequences) for i in range(self._sequences))

    def replace(self, output: StepOutput) -> tuple[Request, ...]:
        """New ones for those that have ended."""
        self._running -= {handle for handle, _ in output.finished}
        return tuple(self._request(OUTPUT) for _ in output.finished)

    def end(self) -> tuple[int, ...]:
        return tuple(sorted(self._running))

    def _request(self, max_tokens: int) -> Request:
        self._next += 1
        self._running.add(self._next)
        prompt = tuple(self._rng.choices(range(3, self._vocabulary), k=PROMPT))
        return Request(self._next, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))


@dataclass
class Times:
    """Of each step, in seconds of the host's one monotonic clock; a rank fills what it knows."""

    began: list[float] = field(default_factory=list)  # at the step, or at waiting for its plan
    encoded: list[float] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    come: list[float] = field(default_factory=list)
    decoded: list[float] = field(default_factory=list)
    applied: list[float] = field(default_factory=list)
    checked: list[float] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)


class OwnWay(DistributedChannel):
    """The same on a process group and a CUDA stream of its own, so that no plan waits for the step before it."""

    def __init__(self, mesh: Mesh, *, ahead: int) -> None:
        group = torch.distributed.new_group()
        cuda = mesh.device.type == "cuda"
        self._stream = torch.cuda.Stream(mesh.device) if cuda else None  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            super().__init__(group, mesh.device, ahead=ahead)

    def broadcast_plan(self, frame: bytes) -> None:
        with torch.cuda.stream(self._stream):
            super().broadcast_plan(frame)

    def wait(self) -> bytes:
        with torch.cuda.stream(self._stream):
            return super().wait()


class Rower:
    """One rank of the plan's measurement."""

    def __init__(self, engine: PagedEngine, mesh: Mesh, *, ahead: int | None, own_way: bool) -> None:
        assert mesh.world_group is not None
        self._engine = engine
        self._mesh = mesh
        ahead = mesh.pp_size - 1 if ahead is None else ahead
        shared = DistributedChannel(mesh.world_group, mesh.device, ahead=ahead)
        self._channel = OwnWay(mesh, ahead=ahead) if own_way else shared
        self._follower = Follower(rank=mesh.rank, epoch=EPOCH)
        self._step = 0

    def round(self, sequences: int, steps: int, *, seed: int, broadcast: bool) -> Times:
        """The times of `steps` steps."""
        load = Turnover(sequences, vocabulary=self._engine.info.vocab_size, seed=seed)
        plans = not broadcast or self._mesh.rank == 0
        times = Times()
        admit = load.begin()
        for number in range(steps + WARM_STEPS):
            if number == WARM_STEPS:
                settle(self._mesh.device)
                times = Times()
            output = self._beat((admit, ()), times, broadcast=broadcast)
            admit = load.replace(output) if plans else ()
        times.began.append(time.perf_counter())
        self._beat(((), load.end()), Times(), broadcast=broadcast)
        while not self._engine.idle:
            self._beat(((), ()), Times(), broadcast=broadcast)
        return times

    def _beat(self, news: News, times: Times, *, broadcast: bool) -> StepOutput:
        times.began.append(time.perf_counter())
        if not broadcast:
            self._engine.apply(StepPlan(0, *news))
        elif self._mesh.rank == 0:
            self._call(news, times)
        else:
            self._obey(times)
        return self._engine.execute()

    def _call(self, news: News, times: Times) -> None:
        self._step += 1
        plan = StepPlan(self._step, *news)
        digest = self._engine.apply(plan)
        times.applied.append(time.perf_counter())
        frame = encode_plan(plan, epoch=EPOCH, digest=digest)
        times.encoded.append(time.perf_counter())
        self._channel.broadcast_plan(frame)
        times.sent.append(time.perf_counter())
        times.num_bytes.append(len(frame))

    def _obey(self, times: Times) -> None:
        frame = self._channel.wait()
        times.come.append(time.perf_counter())
        header, plan = self._follower.read(frame)
        times.decoded.append(time.perf_counter())
        digest = self._engine.apply(plan)
        times.applied.append(time.perf_counter())
        self._follower.check(header, digest)
        times.checked.append(time.perf_counter())


def row_plan(mesh: Mesh, task: dict[str, Any]) -> list[dict[str, Any]]:
    """What one rank saw: of each number of sequences, its times in each round of both arms."""
    sequences = max(task["sequences"])
    engine = build_engine(
        model_path=Path(task["model"]),
        mesh=mesh,
        load_format=task["load_format"],
        max_num_seqs=sequences,
        max_model_len=PROMPT + 2 * OUTPUT,
        kv_cache_bytes=task["kv_cache_bytes"],
    )
    rower = Rower(engine, mesh, ahead=task["ahead"], own_way=task["own_way"])
    spare_what_is_loaded()
    rower.round(sequences, 8, seed=999, broadcast=True)
    found = []
    for count in task["sequences"]:
        with_plan, without = [], []
        for round_ in range(task["rounds"]):
            with_plan.append(rower.round(count, task["steps"], seed=2 * round_, broadcast=True))
            without.append(rower.round(count, task["steps"], seed=2 * round_ + 1, broadcast=False))
        found.append({"with_plan": [vars(t) for t in with_plan], "without": [vars(t) for t in without]})
    return found


def read_plan(layout: Layout, sequences: int, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the table, microseconds."""
    columns: dict[str, list[float]] = {
        name: [] for name in ("encode", "send", "arrive", "check", "peer_apply", "bytes")
    }
    steps, bare = [], []
    for round_, leader in enumerate(ranks[0]["with_plan"]):
        peers = [rank["with_plan"][round_] for rank in ranks[1:]]
        for i in range(len(leader["sent"])):
            columns["encode"].append(leader["encoded"][i] - leader["applied"][i])
            columns["send"].append(leader["sent"][i] - leader["encoded"][i])
            columns["arrive"].append(max(p["come"][i] - max(leader["encoded"][i], p["began"][i]) for p in peers))
            columns["check"].append(
                max(p["decoded"][i] - p["come"][i] + p["checked"][i] - p["applied"][i] for p in peers)
            )
            columns["peer_apply"].append(max(p["applied"][i] - p["decoded"][i] for p in peers))
        columns["bytes"] += leader["num_bytes"]
        steps += gaps(leader["began"])
    for without in ranks[0]["without"]:
        bare += gaps(without["began"])
    us = {name: 1e6 * statistics.median(values) for name, values in columns.items() if name != "bytes"}
    step_us, bare_us = 1e6 * statistics.median(steps), 1e6 * statistics.median(bare)
    cost = us["encode"] + us["arrive"] + us["check"]
    return {
        "layout": str(layout),
        "ranks": layout.size,
        "sequences": sequences,
        "bytes": statistics.mean(columns["bytes"]),
        **{f"{name}_us": value for name, value in us.items()},
        "plan_us": cost,
        "step_us": step_us,
        "without_plan_us": bare_us,
        "share": cost / step_us,
        "seen_us": step_us - bare_us,
        "hidden": min(1.0, max(0.0, 1 - (step_us - bare_us) / cost)),
    }


def gaps(stamps: list[float]) -> list[float]:
    return [b - a for a, b in pairwise(stamps)]


def measure_plan(args: argparse.Namespace, model: Path, load_format: str) -> Iterator[dict[str, Any]]:
    for layout in args.layouts:
        task = {
            "model": str(model), "load_format": load_format, "sequences": args.sequences, "rounds": args.rounds,
            "steps": args.steps, "kv_cache_bytes": args.kv_cache_bytes, "ahead": args.ahead,
            "own_way": args.own_way,
        }  # fmt: skip
        answers = pull(layout, device=args.device, task=task)
        for index, sequences in enumerate(args.sequences):
            yield read_plan(layout, sequences, [answer[index] for answer in answers])


def print_plan(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    table = Table(title=f"the step plan, us per step, medians of {args.rounds} rounds of {args.steps} steps")
    names = (
        "ranks",
        "B",
        "bytes",
        "encode",
        "send",
        "arrive",
        "decode, check",
        "plan",
        "step",
        "share",
        "without plan",
    )
    for name in (*names, "seen", "hidden", "peer's scheduling"):
        table.add_column(name, justify="left" if name == "ranks" else "right")
    for r in rows:
        times = [r[f"{name}_us"] for name in ("encode", "send", "arrive", "check", "plan", "step")]
        table.add_row(
            r["layout"], str(r["sequences"]), f"{r['bytes']:,.0f}", *(f"{time:,.0f}" for time in times),
            f"{r['share']:.1%}", f"{r['without_plan_us']:,.0f}", f"{r['seen_us']:,.0f}", f"{r['hidden']:.0%}",
            f"{r['peer_apply_us']:,.0f}",
        )  # fmt: skip
    Console(width=150).print(table)


# --- growth


class Weightless(Runner):
    """Layers that cost nothing: every row that samples gets the same token."""

    def __init__(self) -> None:
        self.pulse = Pulse()
        self._link = OneStage(SingleRank())
        self._progress_per_step = 1

    def launch(self, batch: Batch) -> Flight:
        count = sum(row.samples for row in batch.rows)
        return Flight(self._link, Arrival(torch.full((count,), 5)), None, None)


def scheduling_us(rows: int, steps: int) -> dict[str, float]:
    """Medians: of the plan's application, and of the rest of the step."""
    config, size = read_config(DEMO, dtype="float32"), 16
    blocks = rows * (PROMPT + OUTPUT + 2 * size) // size
    limits = Limits(blocks, size, max_num_seqs=rows, max_model_len=256, max_num_batched_tokens=max(2048, rows * PROMPT))
    engine = PagedEngine(config, Weightless(), ranks=SingleRank(), limits=limits)
    load = Turnover(rows, vocabulary=64, seed=1)
    admit, apply, account = load.begin(), [], []
    for number in range(steps + WARM_STEPS):
        began = time.perf_counter()
        engine.apply(StepPlan(number, admit))
        applied = time.perf_counter()
        output = engine.execute()
        done = time.perf_counter()
        admit = load.replace(output)
        if number >= WARM_STEPS:
            apply.append(applied - began)
            account.append(done - applied)
    return {
        "schedule": 1e6 * statistics.median(apply),
        "account": 1e6 * statistics.median(account),
    }


def floor_us(rows: int, steps: int) -> float:
    """Append one token to each row, and hash them all."""
    sequences = [array("i", range(PROMPT)) for _ in range(rows)]
    times = []
    for step in range(steps):
        began = time.perf_counter()
        state = blake2b(digest_size=8)
        for sequence in sequences:
            sequence.append(step)
            state.update(sequence[-1:].tobytes())
        state.digest()
        times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times)


SAMPLING: dict[str, dict[str, Any]] = {
    "sample: greedy": {},
    "sample: temperature": {"temperature": 1.0},
    "sample: top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "sample: repetition_penalty": {"repetition_penalty": 1.1},
}


def sampling_us(rows: int, args: argparse.Namespace) -> dict[str, float]:
    logits = 4 * torch.randn(rows, args.vocabulary, device=torch.device(args.device))
    found = {"control: argmax of the logits": argmax_us(logits, args.repeats)}
    for name, chosen in SAMPLING.items():
        found[name] = 1e3 * measure_sampler(Sampler(None), logits, 400, chosen, args.repeats)[1]
    return found


def argmax_us(logits: torch.Tensor, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        settle(logits.device)
        began = time.perf_counter()
        logits.argmax(dim=-1).tolist()
        times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times[1:])


def measure_growth(args: argparse.Namespace) -> dict[str, dict[int, float]]:
    """Microseconds by what is measured and rows."""
    torch.set_num_threads(1)
    found: dict[str, dict[int, float]] = {}
    for count in args.rows:
        figures = {"control: append and hash": floor_us(count, args.steps), **scheduling_us(count, args.steps)}
        for name, us in (figures | sampling_us(count, args)).items():
            found.setdefault(name, {})[count] = us
    return found


def print_growth(found: dict[str, dict[int, float]], args: argparse.Namespace) -> None:
    table = Table(
        title=f"the host's work per step, us, medians; sampling from {args.vocabulary:,} tokens on one thread"
    )
    table.add_column("")
    for count in args.rows:
        table.add_column(f"{count:,} rows", justify="right")
    table.add_column("us a row at the end", justify="right")
    table.add_column("grows as rows to the", justify="right")
    first, last = args.rows[len(args.rows) // 2 - 1], args.rows[-1]
    for name, by_rows in found.items():
        power = math.log(by_rows[last] / by_rows[first]) / math.log(last / first) if last > first else math.nan
        cells = [f"{us:,.0f}" for us in by_rows.values()]
        table.add_row(name, *cells, f"{by_rows[last] / last:.2f}", f"{power:.2f}")
    table.caption = f"the power is that between {first:,} and {last:,} rows"
    Console(width=130).print(table)


# --- idle


def idle(args: argparse.Namespace, model: Path, load_format: str) -> dict[str, Any]:
    """A real group on each layout: an answer, silence, an answer."""
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from hortator.workers.group import Ready
    from tests.workers.group_driver import Driver

    found = {}
    for layout in args.layouts:
        with Driver(
            engine="paged",
            model_path=model,
            load_format=load_format,
            device=args.device,
            tensor_parallel_size=layout.tp,
            pipeline_parallel_size=layout.pp,
            max_num_seqs=4,
            max_model_len=128,
            kv_cache_bytes=args.kv_cache_bytes,
            heartbeat_s=1.0,
            heartbeat_timeout_s=3.0,
            stall_timeout_s=5.0,
            collective_timeout_s=args.collective_timeout,
        ) as group:
            ready = group.until(Ready, timeout_s=600)
            before = group.answer_tokens(bytes([5, 6, 7]), 4)
            time.sleep(args.idle)
            asked = time.perf_counter()
            after = group.answer_tokens(bytes([5, 6, 7]), 4)
            found[str(layout)] = {
                "idle_s": args.idle,
                "collective_timeout_s": args.collective_timeout,
                "epochs": [ready.epoch, group.group.epoch],
                "restarts": group.group.epoch - ready.epoch,
                "same_answer": before == after,
                "first_answer_ms": 1e3 * (time.perf_counter() - asked),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["plan", "growth", "idle"], default=["plan", "growth"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--layouts", type=Layout.read, nargs="+", default=[Layout(2, 1), Layout(1, 2), Layout(2, 2)])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64, 256, 1024], help="of growth")
    parser.add_argument(
        "--ahead", type=int, help="plans on their way at a time; default: as the group does, stages - 1"
    )
    parser.add_argument("--own-way", action="store_true", help="plans on a group and a CUDA stream of their own")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=96, help="of each round")
    parser.add_argument("--repeats", type=int, default=5, help="of each way to sample")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="from which growth samples")
    parser.add_argument("--idle", type=float, default=15.0, help="seconds")
    parser.add_argument("--collective-timeout", type=float, default=10.0, help="seconds, of the idle group")
    parser.add_argument(
        "--shape", type=json.loads, help="JSON over Llama-3.1-8B's config: random weights of that shape"
    )
    parser.add_argument("--model", type=Path, default=DEMO, help="the demo's has room for two tensor parallel ranks")
    parser.add_argument("--kv-cache-bytes", type=int)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if (seat := own_seat()) is not None:
        row(seat, row_plan)
    found: dict[str, Any] = {"settings": {name: str(value) for name, value in vars(args).items()}}

    def keep() -> None:
        """Part by part: what was measured outlives a later part that fails."""
        if args.json:
            args.json.write_text(json.dumps(found, indent=1))

    with tempfile.TemporaryDirectory() as name:
        model, load_format = args.model, "safetensors"
        if args.shape is not None:
            model, load_format = Path(name), "dummy"
            (model / "config.json").write_text(json.dumps(LLAMA_8B | args.shape))
        if "plan" in args.parts:
            found["plan"] = list(measure_plan(args, model, load_format))
            print_plan(found["plan"], args)
            keep()
        if "growth" in args.parts:
            found["growth"] = measure_growth(args)
            print_growth(found["growth"], args)
            keep()
        if "idle" in args.parts:
            found["idle"] = idle(args, model, load_format)
            for layout, seen in found["idle"].items():
                print(f"{layout}: {json.dumps(seen)}")
            keep()


if __name__ == "__main__":
    main()

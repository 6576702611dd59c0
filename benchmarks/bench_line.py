"""The whole line against the bare engine on the same workload: what front, Redis and client cost.

    python benchmarks/bench_line.py [--jobs 384] [--repeats 3] [--json FILE]

All arms run one rank of the demo model with the same settings; the runs are interleaved.
- bare: this file in a child process calls the engine's apply and execute in a loop, all requests admitted at once.
- bare, all threads: the same, with all cores for every step, however few threads the engine would use.
- line: a private Redis, a real `celery worker`, a producer that enqueues all jobs and waits for all results.
Tokens per second count from the first enqueue to the last visible result; the line is held against the faster bare arm.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

MODEL = Path(__file__).resolve().parents[1] / "demo" / "model"
MAX_NUM_SEQS = 64


def workload(jobs: int) -> list[tuple[str, int]]:
    """Prompts and output lengths; end-of-sequence is ignored, so both arms generate exactly as many tokens."""
    rng = random.Random(7)
    return [
        (f"sort({''.join(rng.choices('abcdefghij', k=rng.randint(3, 8)))})=", rng.randint(64, 384)) for _ in range(jobs)
    ]


def run_bare(jobs: int, *, all_threads: bool) -> dict[str, Any]:
    """In the child process: the engine alone."""
    from hortator.topology.mesh import join
    from hortator.workers.collector import spare_what_is_loaded
    from hortator.workers.engine.build import build_engine
    from hortator.workers.engine.step import Request, SamplingParams, StepPlan
    from hortator.workers.text import HFText

    mesh = join(
        rank=0, tp_size=1, pp_size=1, store=None, listener=None, device="cpu", local_rank=0, collective_timeout_s=60
    )
    engine = build_engine(model_path=MODEL, mesh=mesh, dtype="float32", max_num_seqs=MAX_NUM_SEQS)
    if all_threads:
        engine._runner.threads = None
    text = HFText.load(MODEL)
    requests = tuple(
        Request(handle, text.encode(prompt), SamplingParams(max_tokens=length, ignore_eos=True))
        for handle, (prompt, length) in enumerate(workload(jobs))
    )
    spare_what_is_loaded()  # as a rank does
    started, cpu = time.perf_counter(), time.process_time()
    tokens, step = 0, 0
    engine.apply(StepPlan(0, admit=requests))
    tokens += len(engine.execute().tokens)
    while not engine.idle:
        step += 1
        engine.apply(StepPlan(step))
        tokens += len(engine.execute().tokens)
    return {"tokens": tokens, "seconds": time.perf_counter() - started, "cpu": {"rank": time.process_time() - cpu}}


def run_line(jobs: int) -> dict[str, Any]:
    """Redis, a real worker, a client."""
    from hortator.producer import Client, Job, Sampling
    from hortator.producer.embedded import EmbeddedRedis

    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        redis = stack.enter_context(EmbeddedRedis(directory / "redis"))
        env = os.environ | {
            "HORTATOR_REDIS_URL": redis.url,
            "HORTATOR_MODEL": "demo",
            "HORTATOR_MODEL_PATH": str(MODEL),
            "HORTATOR_DTYPE": "float32",
            "HORTATOR_DEVICE": "cpu",
            "HORTATOR_MAX_NUM_SEQS": str(MAX_NUM_SEQS),
        }
        argv = [sys.executable, "-m", "celery", "-A", "hortator.workers", "worker", "-Q", "demo", "-l", "WARNING"]
        front = psutil.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        stack.callback(front.wait, 30)
        stack.callback(front.terminate)
        client = stack.enter_context(Client(redis.url))
        while not any(beat.state == "ready" for queue in client.store.queues() for beat in queue.groups):
            if front.poll() is not None:
                raise SystemExit(f"the worker ended with status {front.returncode}: run it by hand to see why")
            time.sleep(0.05)
        [rank] = front.children()
        watched = {"front": front, "rank": rank, "redis": psutil.Process(redis.pid), "client": psutil.Process()}
        before = {name: cpu_s(process) for name, process in watched.items()}
        started = time.perf_counter()
        handles = client.enqueue_many(
            [
                Job(model="demo", prompt=prompt, sampling=Sampling(max_tokens=length, ignore_eos=True))
                for prompt, length in workload(jobs)
            ]
        )
        tokens = sum(handle.result(timeout_s=300).usage.completion_tokens for handle in client.as_completed(handles))
        seconds = time.perf_counter() - started
        return {
            "tokens": tokens,
            "seconds": seconds,
            "cpu": {name: cpu_s(process) - before[name] for name, process in watched.items()},
        }


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bare", choices=("few", "all"), help="run a bare arm in this process and print JSON")
    args = parser.parse_args()
    if args.bare:
        print(json.dumps(run_bare(args.jobs, all_threads=args.bare == "all")))
        return
    runs: dict[str, list[dict[str, Any]]] = {"bare engine": [], "bare, all threads": [], "whole line": []}
    for _ in range(args.repeats):
        child = [sys.executable, __file__, "--jobs", str(args.jobs), "--bare"]
        runs["bare engine"].append(json.loads(subprocess.check_output([*child, "few"])))
        runs["bare, all threads"].append(json.loads(subprocess.check_output([*child, "all"])))
        runs["whole line"].append(run_line(args.jobs))
    rates = {arm: statistics.median(run["tokens"] / run["seconds"] for run in of) for arm, of in runs.items()}
    best = max(rate for arm, rate in rates.items() if arm.startswith("bare"))
    table = Table(title=f"{args.jobs} jobs of the demo model, one rank, median of {args.repeats} interleaved runs")
    for column in ("arm", "tokens/s", "of best bare", "tokens", "CPU us per token"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm, of in runs.items():
        parts = {name: statistics.median(run["cpu"][name] / run["tokens"] * 1e6 for run in of) for name in of[0]["cpu"]}
        table.add_row(
            arm,
            f"{rates[arm]:,.0f}",
            f"{rates[arm] / best:.0%}",
            f"{of[0]['tokens']:,}",
            ", ".join(f"{name} {value:.1f}" for name, value in parts.items()),
        )
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()

"""Through the queue against the bare engine, on one GPU: what front, Redis and lock-step cost.

    python benchmarks/gpu_line.py [--repeats 2] [--json FILE]

The mix of gpu_engine.py (256 requests at once, random bf16 weights of Llama-3.1-8B's shape).  Arms, interleaved:
- bare: a child process admits all requests in one plan and steps until all have ended.
- line: a private Redis, a real `celery worker` with the same engine behind it, and a client that enqueues the same
  requests as jobs and waits for all results.  Seconds count from the first enqueue to the last result.
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

HERE = Path(__file__).resolve().parent
SEATS = 256


def workload(seed: int, jobs: int) -> list[tuple[list[int], int]]:
    """Token ids and output lengths, as gpu_engine's mix draws them."""
    rng = random.Random(seed)
    drawn = []
    for _ in range(jobs):
        prompt, output = rng.randint(128, 1024), rng.randint(64, 512)
        drawn.append((rng.choices(range(1000, 100_000), k=prompt), output))
    return drawn


def make_model(folder: Path, args: argparse.Namespace) -> None:
    """A configuration, and a tokenizer of that vocabulary: every id is a word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    sys.path.insert(0, str(HERE))
    from gpu_engine import LLAMA_8B

    (folder / "config.json").write_text(json.dumps(LLAMA_8B | args.shape))
    words = {f"w{i}": i for i in range(int(str(LLAMA_8B["vocab_size"])))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))


def run_bare(args: argparse.Namespace) -> dict[str, Any]:
    sys.path.insert(0, str(HERE))
    from gpu_engine import Driver, load

    from hortator.workers.engine.step import Request, SamplingParams

    driver = Driver(load(args))
    found = {}
    for seed in (99, 0):  # the first is the warm-up
        requests = tuple(
            Request(i, tuple(prompt), SamplingParams(max_tokens=output, ignore_eos=True))
            for i, (prompt, output) in enumerate(workload(seed, args.jobs))
        )
        started = time.perf_counter()
        tokens = driver.step(requests) + driver.drain()
        found = {"tokens": tokens, "seconds": time.perf_counter() - started, "cpu": {}}
    return found


def run_line(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from hortator.producer import Client, Job, Sampling
    from hortator.producer.embedded import EmbeddedRedis

    def jobs(seed: int) -> list[Job]:
        return [
            Job(model="bench", token_ids=tuple(p), sampling=Sampling(max_tokens=n, ignore_eos=True))
            for p, n in workload(seed, args.jobs)
        ]

    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        redis = stack.enter_context(EmbeddedRedis(directory / "redis"))
        settings = {
            "redis_url": redis.url, "model": "bench", "model_path": folder, "load_format": "dummy",
            "device": args.device, "max_num_seqs": args.max_num_seqs, "max_model_len": args.max_model_len,
            "max_num_batched_tokens": args.max_num_batched_tokens,
        }  # fmt: skip
        env = os.environ | {f"HORTATOR_{name.upper()}": str(value) for name, value in settings.items()}
        argv = [sys.executable, "-m", "celery", "-A", "hortator.workers", "worker", "-Q", "bench", "-l", "WARNING"]
        log = stack.enter_context((directory / "log").open("wb"))
        front = psutil.Popen(argv, env=env, stdout=log, stderr=log)
        stack.callback(front.wait, 60)
        stack.callback(front.terminate)
        client = stack.enter_context(Client(redis.url))
        while not any(beat.state == "ready" for queue in client.store.queues() for beat in queue.groups):
            if front.poll() is not None:
                raise RuntimeError((directory / "log").read_text()[-3000:])
            time.sleep(0.05)
        [rank] = front.children()
        watched = {"front": front, "rank": rank, "redis": psutil.Process(redis.pid), "client": psutil.Process()}
        found: dict[str, Any] = {}
        for seed in (99, 0):
            wanted = jobs(seed)
            before = {name: cpu_s(process) for name, process in watched.items()}
            started = time.perf_counter()
            handles = client.enqueue_many(wanted)
            done = client.as_completed(handles)
            tokens = sum(handle.result(timeout_s=120).usage.completion_tokens for handle in done)
            seconds = time.perf_counter() - started
            cpu = {name: cpu_s(process) - before[name] for name, process in watched.items()}
            found = {"tokens": tokens, "seconds": seconds, "cpu": cpu}
        return found


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=SEATS)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--max-num-seqs", type=int, default=SEATS)
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--kv-cache-bytes", type=int)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", type=json.loads, default={}, help="JSON over Llama-3.1-8B's config")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bare", action="store_true", help="run the control arm in this process and print JSON")
    args = parser.parse_args()
    if args.bare:
        print(json.dumps(run_bare(args)))
        return
    runs: dict[str, list[dict[str, Any]]] = {"bare engine": [], "whole line": []}
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name), args)
        for _ in range(args.repeats):
            child = [sys.executable, __file__, "--bare", *sys.argv[1:]]
            runs["bare engine"].append(json.loads(subprocess.check_output(child).splitlines()[-1]))
            runs["whole line"].append(run_line(args, Path(name)))
    rates = {arm: statistics.median(run["tokens"] / run["seconds"] for run in of) for arm, of in runs.items()}
    table = Table(title=f"{args.jobs} jobs at once, median of {args.repeats} interleaved runs")
    for column in ("arm", "tokens/s", "of bare", "seconds", "CPU us per token"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm, of in runs.items():
        cpus = of[0]["cpu"]
        parts = {part: statistics.median(run["cpu"][part] / run["tokens"] * 1e6 for run in of) for part in cpus}
        share = f"{rates[arm] / rates['bare engine']:.1%}"
        seconds = ", ".join(f"{run['seconds']:.2f}" for run in of)
        cpu = ", ".join(f"{part} {value:.1f}" for part, value in parts.items())
        table.add_row(arm, f"{rates[arm]:,.0f}", share, seconds, cpu)
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()

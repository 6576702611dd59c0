"""Through the queue against the bare engine, on one GPU or several: what front, Redis and client cost.

    python benchmarks/gpu_line.py [--layout 2x1] [--repeats 2] [--json FILE]
    python benchmarks/gpu_line.py --device cpu --shape '{"num_hidden_layers": 2, …}' --jobs 16   without a GPU

The mix of gpu_engine.py (256 requests at once, random bf16 weights of Llama-3.1-8B's shape).  Arms, interleaved:
- bare: ranks without a front; the first admits all requests in one plan and calls steps until all have ended.
- line: a private Redis, a real `celery worker` with the same engine behind it, and a client that enqueues the same
  requests as jobs and waits for all results.  Seconds count from the first enqueue to the last result.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
from crew import ENVIRONMENT, Caller, Layout, follow, own_seat, pull, row
from gpu_engine import LLAMA_8B, draw_mix
from rich.console import Console
from rich.table import Table

from hortator.topology.mesh import Mesh
from hortator.workers.collector import spare_what_is_loaded
from hortator.workers.engine.build import build_engine
from hortator.workers.engine.step import Request, SamplingParams

SEATS = 256
READY_S = 300  # a group that begins again and again would never be ready


def workload(seed: int, args: argparse.Namespace) -> list[tuple[list[int], int]]:
    """Token ids and output lengths, as gpu_engine's mix draws them."""
    shape = LLAMA_8B | args.shape
    requests = draw_mix(seed, int(shape["vocab_size"]), count=args.jobs, prompts=args.prompts, outputs=args.outputs)
    return [(list(request.prompt), request.sampling.max_tokens) for request in requests]


def make_model(folder: Path, shape: dict[str, Any]) -> None:
    """A configuration, and a tokenizer of that vocabulary: every id is a word.  `shape` is over Llama-3.1-8B's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    config = LLAMA_8B | shape
    (folder / "config.json").write_text(json.dumps(config))
    words = {f"w{i}": i for i in range(int(config["vocab_size"]))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))


def row_bare(mesh: Mesh, task: dict[str, Any]) -> dict[str, Any] | None:
    """One rank of the control arm; the first one's figures."""
    args = argparse.Namespace(**task)
    engine = build_engine(
        model_path=Path(args.folder),
        mesh=mesh,
        load_format="dummy",
        max_num_seqs=args.max_num_seqs,
        max_model_len=args.max_model_len,
        max_num_batched_tokens=args.max_num_batched_tokens,
        kv_cache_bytes=args.kv_cache_bytes,
    )
    spare_what_is_loaded()
    if mesh.rank:
        follow(engine, mesh)
        return None
    caller, found = Caller(engine, mesh), {}
    for seed in (99, 0):  # the first is the warm-up
        requests = tuple(
            Request(i, tuple(prompt), SamplingParams(max_tokens=output, ignore_eos=True))
            for i, (prompt, output) in enumerate(workload(seed, args))
        )
        started = time.perf_counter()
        tokens = caller.step(requests) + caller.drain()
        found = {"tokens": tokens, "seconds": time.perf_counter() - started, "cpu": {}}
    caller.dismiss()
    return found


def run_line(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from hortator.producer import Client, Job, Sampling
    from hortator.producer.embedded import EmbeddedRedis

    def jobs(seed: int) -> list[Job]:
        return [
            Job(model="bench", token_ids=tuple(p), sampling=Sampling(max_tokens=n, ignore_eos=True))
            for p, n in workload(seed, args)
        ]

    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        redis = stack.enter_context(EmbeddedRedis(directory / "redis"))
        settings = {
            "redis_url": redis.url, "model": "bench", "model_path": folder, "load_format": "dummy",
            "device": args.device, "max_num_seqs": args.max_num_seqs, "max_model_len": args.max_model_len,
            "max_num_batched_tokens": args.max_num_batched_tokens, "kv_cache_bytes": args.kv_cache_bytes,
            "tensor_parallel_size": args.layout.tp, "pipeline_parallel_size": args.layout.pp,
        }  # fmt: skip
        chosen = {f"HORTATOR_{name.upper()}": str(value) for name, value in settings.items() if value is not None}
        env = ENVIRONMENT | os.environ | chosen
        argv = [sys.executable, "-m", "celery", "-A", "hortator.workers", "worker", "-Q", "bench", "-l", "WARNING"]
        log = stack.enter_context((directory / "log").open("wb"))
        front = psutil.Popen(argv, env=env, stdout=log, stderr=log)
        stack.callback(front.wait, 60)
        stack.callback(front.terminate)
        client = stack.enter_context(Client(redis.url))
        until = time.monotonic() + READY_S
        while not any(beat.state == "ready" for queue in client.store.queues() for beat in queue.groups):
            if front.poll() is not None or time.monotonic() > until:
                raise RuntimeError("the group is not ready:\n" + (directory / "log").read_text()[-3000:])
            time.sleep(0.05)
        ranks = {f"rank {i}": rank for i, rank in enumerate(front.children())}
        watched = {"front": front, **ranks, "redis": psutil.Process(redis.pid), "client": psutil.Process()}
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
    parser.add_argument("--layout", type=Layout.read, default=Layout(1, 1), help="tensor x pipeline parallel ranks")
    parser.add_argument("--prompts", type=int, nargs=2, default=[128, 1024], help="tokens, uniform from and to")
    parser.add_argument("--outputs", type=int, nargs=2, default=[64, 512])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if (seat := own_seat()) is not None:
        row(seat, row_bare)
    runs: dict[str, list[dict[str, Any]]] = {"bare engine": [], "whole line": []}
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name), args.shape)
        task = {key: value for key, value in vars(args).items() if key not in ("layout", "json")} | {"folder": name}
        for _ in range(args.repeats):
            runs["bare engine"].append(pull(args.layout, device=args.device, task=task)[0])
            runs["whole line"].append(run_line(args, Path(name)))
    rates = {arm: statistics.median(run["tokens"] / run["seconds"] for run in of) for arm, of in runs.items()}
    table = Table(title=f"{args.jobs} jobs at once, {args.layout}, median of {args.repeats} interleaved runs")
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

"""The engine alone on one GPU: random bf16 weights of Llama-3.1-8B's shape, greedy, end-of-sequence ignored.

    python benchmarks/gpu_engine.py [--parts decode first mix] [--json FILE] [--profile]

- decode: milliseconds a step with B rows, prompt 512, output 128; the median over all steps in which all rows decode.
- first: milliseconds to the first token of a 512-token prompt, alone.
- edge: the longest prompt, and more sequences than the KV pool holds.
- mix: 256 requests at once, prompts uniform 128-1024, outputs uniform 64-512; tokens per second.

The figures to compare with are another engine's on the same kind of card, see docs/performance.md.
"""

import argparse
import json
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from crew import Caller, settle
from rich.console import Console
from rich.table import Table

from hortator.workers.collector import spare_what_is_loaded
from hortator.workers.engine.build import build_engine
from hortator.workers.engine.engine import PagedEngine
from hortator.workers.engine.parallel import SingleRank
from hortator.workers.engine.step import Request, SamplingParams

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}


def load(args: argparse.Namespace) -> PagedEngine:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(LLAMA_8B | args.shape))
        started = time.perf_counter()
        engine = build_engine(
            model_path=Path(name),
            mesh=SingleRank(torch.device(args.device)),
            load_format="dummy",
            max_num_seqs=args.max_num_seqs,
            max_model_len=args.max_model_len,
            max_num_batched_tokens=args.max_num_batched_tokens,
            kv_cache_bytes=args.kv_cache_bytes,
        )
        print(f"loaded and captured in {time.perf_counter() - started:.1f} s; {engine.info.kv_tokens:,} KV tokens")
        return engine


def words(vocab_size: int) -> range:
    """Token ids to draw prompts from."""
    return range(min(1000, vocab_size // 2), min(100_000, vocab_size))


def request(handle: int, rng: random.Random, prompt: int, output: int, vocab_size: int) -> Request:
    tokens = tuple(rng.choices(words(vocab_size), k=prompt))
    return Request(handle, tokens, SamplingParams(max_tokens=output, ignore_eos=True))


def draw_mix(
    seed: int,
    vocab_size: int,
    *,
    count: int = 256,
    prompts: tuple[int, int] = (128, 1024),
    outputs: tuple[int, int] = (64, 512),
) -> tuple[Request, ...]:
    """Uniform lengths, both ends included.  `seed` must be new: what was asked before is in the prefix cache."""
    rng = random.Random(seed)
    return tuple(request(i, rng, rng.randint(*prompts), rng.randint(*outputs), vocab_size) for i in range(count))


def decode_ms(driver: Caller, batch: int, rounds: int) -> float:
    times: list[float] = []
    for round_ in range(rounds):
        rng = random.Random(batch + 1000 * round_)
        driver.step(tuple(request(i, rng, 512, 128, driver.engine.info.vocab_size) for i in range(batch)))
        seen, last = 0, time.perf_counter()
        while not driver.engine.idle:
            tokens = driver.step()
            now = time.perf_counter()
            if tokens == batch and seen == batch:
                times.append(now - last)
            seen, last = tokens, now
    return 1e3 * statistics.median(times)


def first_token_ms(driver: Caller, rounds: int, device: torch.device) -> float:
    times = []
    for round_ in range(rounds):
        settle(device)
        asked = request(round_, random.Random(7 * round_), 512, 4, driver.engine.info.vocab_size)
        started = time.perf_counter()
        driver.step((asked,))
        while not driver.step():
            pass
        times.append(time.perf_counter() - started)
        driver.drain()
    return 1e3 * statistics.median(times)


def mix(driver: Caller, requests: tuple[Request, ...], device: torch.device) -> dict[str, Any]:
    """All of them at once, until the last has ended."""
    settle(device)
    started, steps = time.perf_counter(), driver.num_steps
    tokens, trace, last = driver.step(requests), [], started
    while not driver.engine.idle:
        came = driver.step()
        tokens, now = tokens + came, time.perf_counter()
        trace.append((came, round(1e3 * (now - last), 3)))
        last = now
    seconds = time.perf_counter() - started
    prompts = sum(len(r.prompt) for r in requests)
    assert tokens == sum(r.sampling.max_tokens for r in requests)
    return {
        "seconds": seconds,
        "output_tokens": tokens,
        "prompt_tokens": prompts,
        "output_per_s": tokens / seconds,
        "total_per_s": (tokens + prompts) / seconds,
        "steps": driver.num_steps - steps,
        "trace": trace,  # of each step: tokens that came, milliseconds
    }


def edge(driver: Caller) -> dict[str, float]:
    """The longest prompt that the model's length allows, then more sequences than the KV pool holds at a time."""
    info, rng = driver.engine.info, random.Random(5)
    started = time.perf_counter()
    driver.step((request(0, rng, info.max_model_len - 33, 32, info.vocab_size),))
    longest = driver.drain()
    seconds = time.perf_counter() - started
    share = info.kv_tokens // info.max_num_seqs
    prompt, output = int(0.9 * share), int(0.4 * share)  # they fit when they begin, and no longer when they end
    crowd = tuple(request(i, rng, prompt, output, info.vocab_size) for i in range(info.max_num_seqs))
    before = driver.engine.stats().preemptions
    tokens = driver.step(crowd) + driver.drain()
    assert longest == 32
    assert tokens == info.max_num_seqs * output
    return {
        "longest prompt": info.max_model_len - 33,
        "its seconds": seconds,
        "sequences beyond the pool": info.max_num_seqs,
        "tokens of each": prompt + output,
        "preemptions": driver.engine.stats().preemptions - before,
    }


def profile(driver: Caller, batch: int) -> None:
    """Where the time of ten decode steps goes, kernel by kernel; batch 0: of ten steps full of prompts instead."""
    rng = random.Random(batch)
    driver.step(tuple(request(i, rng, 512, 64, driver.engine.info.vocab_size) for i in range(batch or 256)))
    for _ in range(12 if batch else 2):
        driver.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(10):
            driver.step()
        torch.cuda.synchronize()
    driver.drain()
    rows = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)[:14]
    total = sum(e.self_device_time_total for e in found.key_averages())
    print(f"--- {f'B={batch}' if batch else 'prompts'}: {total / 1e4:.2f} ms of kernels a step")
    for e in rows:
        print(f"{e.self_device_time_total / 1e4:8.3f} ms {e.count / 10:7.1f}x  {e.key[:90]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["decode", "first", "mix"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--budgets", type=int, nargs="+", help="tokens a step to try in the mix")
    parser.add_argument("--kv-cache-bytes", type=int)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", type=json.loads, default={}, help="JSON over Llama-3.1-8B's config")
    parser.add_argument("--profile", type=int, nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    driver = Caller(load(args), SingleRank(device))
    spare_what_is_loaded()  # as a rank does
    vocab_size = driver.engine.info.vocab_size
    mix(driver, draw_mix(99, vocab_size), device)  # warm-up
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    found: dict[str, Any] = {"card": card, "torch": torch.__version__, "args": vars(args)}
    if "decode" in args.parts:
        found["decode_ms"] = {batch: decode_ms(driver, batch, args.rounds) for batch in args.batch}
    if "first" in args.parts:
        found["first_token_ms"] = first_token_ms(driver, 3 * args.rounds, device)
    if "mix" in args.parts:
        found["mix"] = {}
        for budget in args.budgets or [args.max_num_batched_tokens]:
            driver.engine._scheduler.max_num_batched_tokens = budget
            runs = [mix(driver, draw_mix(1000 * budget + i, vocab_size), device) for i in range(args.rounds)]
            found["mix"][budget] = sorted(runs, key=lambda run: run["output_per_s"])[len(runs) // 2]
        driver.engine._scheduler.max_num_batched_tokens = args.max_num_batched_tokens
    if "edge" in args.parts:
        found["edge"] = edge(driver)
    for batch in args.profile:
        profile(driver, batch)
    show(found)
    if args.json:
        args.json.write_text(json.dumps(found | {"commit": commit()}, indent=1, default=str))


def show(found: dict[str, Any]) -> None:
    table = Table(title=f"{found['card']}, torch {found['torch']}")
    table.add_column("what")
    table.add_column("figure", justify="right")
    for batch, ms in found.get("decode_ms", {}).items():
        table.add_row(f"decode step, B={batch}, ms", f"{ms:.2f}")
    if "first_token_ms" in found:
        table.add_row("first token of 512, alone, ms", f"{found['first_token_ms']:.1f}")
    for budget, run in found.get("mix", {}).items():
        for name in run.keys() - {"trace"}:
            value = run[name]
            table.add_row(f"mix, {budget} tokens a step: {name}", f"{value:,.1f}")
    for name, value in found.get("edge", {}).items():
        table.add_row(f"edge: {name}", f"{value:,.1f}")
    Console().print(table)


def commit() -> str:
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()

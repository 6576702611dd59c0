"""Tensor and pipeline parallel ranks on several devices of one host: do they agree, and how do they scale.

    python benchmarks/gpu_multi.py [--parts correct speed] [--layouts 1x1 2x1 1x2 2x2] [--shapes 8b 70b] [--json FILE]
    python benchmarks/gpu_multi.py --device cpu --shapes tiny …        the same over gloo, for a machine without GPUs

Layouts are tensor times pipeline parallel ranks; those that need more GPUs than there are are left out.

correct: small random models.  In float32 every layout must give the same greedy tokens as one rank.  In bfloat16 the
log-probabilities of the 20 likeliest tokens after prompts are compared with one rank's; the control arm is one rank in
bfloat16 against one rank in float32, which is what rounding alone does.

speed: random bf16 weights.  A decode round is the time in which each of B sequences advances by one token, from when
all of them decode until the first one ends.  The mix is that of gpu_engine.py.  Efficiency is tokens per second and
rank, against the smallest layout that could load.  `all-reduce alone` is what the all-reduces of such a round take when
nothing else is done (on a GPU as one graph), as a share of the round; `traced` is their share of the kernels' time in a
GPU's profile, waiting for slower ranks included.  The one-rank layout is the control arm.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from crew import Caller, Layout, follow, own_seat, pull, row, settle
from gpu_engine import LLAMA_8B, commit, draw_mix, mix, request
from rich.console import Console
from rich.table import Table

from hortator.topology.mesh import Mesh
from hortator.workers.collector import spare_what_is_loaded
from hortator.workers.engine.build import build_engine
from hortator.workers.engine.step import Request, SamplingParams

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {},
    "70b": {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "tiny": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 8, "vocab_size": 2048, "max_position_embeddings": 4096,
    },
}  # fmt: skip
TOP = 20


def shape_of(text: str) -> tuple[str, dict[str, Any]]:
    """A name of the table, or JSON over Llama-3.1-8B's config."""
    return text, LLAMA_8B | (SHAPES[text] if text in SHAPES else json.loads(text))


def lead(mesh: Mesh, engine: Any, work: Callable[[Caller], Any]) -> Any:
    """Rank 0 works, the others follow; None from these."""
    spare_what_is_loaded()
    if mesh.rank:
        follow(engine, mesh)
        return None
    caller = Caller(engine, mesh)
    answer = work(caller)
    caller.dismiss()
    return answer


# --- correct


def row_correct(mesh: Mesh, task: dict[str, Any]) -> Any:
    """Greedy tokens of mixed requests, and what is likeliest after some prompts."""
    engine = build_engine(
        model_path=Path(task["model"]),
        mesh=mesh,
        dtype=task["dtype"],
        max_num_seqs=8,
        max_num_batched_tokens=48,
        kv_cache_bytes=64 << 20,
    )
    rng, vocab_size = random.Random(3), engine.info.vocab_size
    prompts = [tuple(rng.choices(range(1, vocab_size), k=rng.randint(1, 100))) for _ in range(task["requests"])]

    def work(caller: Caller) -> dict[str, Any]:
        greedy = [SamplingParams(max_tokens=rng.randint(1, 32), ignore_eos=True) for _ in prompts]
        scored = SamplingParams(max_tokens=1, ignore_eos=True, logprobs=True, top_logprobs=TOP)
        tokens: list[list[int]] = [[] for _ in prompts]
        tops: list[list[tuple[int, float]]] = [[] for _ in prompts]
        for token in outputs(caller, prompts, greedy):
            tokens[token.handle].append(token.token_id)
        for token in outputs(caller, prompts, [scored] * len(prompts)):
            tops[token.handle] = list(token.top)
        return {"tokens": tokens, "tops": tops}

    return lead(mesh, engine, work)


def outputs(caller: Caller, prompts: list[tuple[int, ...]], samplings: list[SamplingParams]) -> Iterator[Any]:
    """Every token that comes; a fault is a RuntimeError."""
    output = caller.call(tuple(Request(i, *both) for i, both in enumerate(zip(prompts, samplings, strict=True))))
    while True:
        if output.faults:
            raise RuntimeError(output.faults[0].message)
        yield from output.tokens
        if caller.engine.idle:
            return
        output = caller.call()


def measure_correct(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    import transformers

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    transformers.logging.disable_progress_bar()
    from tests.workers.engine.checkpoints import make_checkpoint

    for architecture in args.architectures:
        with tempfile.TemporaryDirectory() as name:
            make_checkpoint(
                architecture, Path(name), hidden_size=256, num_key_value_heads=8, num_hidden_layers=4,
                initializer_range=0.06,
            )  # fmt: skip
            answers = {
                (layout, dtype): pull(layout, device=args.device, threads=threads(args), task=task)[0]
                for dtype in ("float32", "bfloat16")
                for task in [{"model": name, "dtype": dtype, "requests": args.requests}]
                for layout in dict.fromkeys([Layout(1, 1), *args.layouts])
            }
        one = {dtype: answers[Layout(1, 1), dtype] for dtype in ("float32", "bfloat16")}
        for layout in args.layouts:
            exact, rounded = answers[layout, "float32"], answers[layout, "bfloat16"]
            yield {
                "architecture": architecture,
                "layout": str(layout),
                "requests": len(exact["tokens"]),
                "same_tokens": sum(a == b for a, b in zip(exact["tokens"], one["float32"]["tokens"], strict=True)),
                "float32": apart(exact, one["float32"]),
                "bfloat16": apart(rounded, one["bfloat16"]),
                "rounding": apart(one["bfloat16"], one["float32"]),
            }


def apart(some: dict[str, Any], others: dict[str, Any]) -> dict[str, float]:
    """How far log-probabilities of tokens that both name are apart, and how often the likeliest one is the same."""
    differences, same = [], 0
    for a, b in zip(some["tops"], others["tops"], strict=True):
        known = dict(b)
        differences += [abs(logprob - known[token]) for token, logprob in a if token in known]
        same += a[0][0] == b[0][0]
    return {"mean": statistics.mean(differences), "max": max(differences), "same_best": same / len(some["tops"])}


def verdict(line: dict[str, Any]) -> str:
    """In bfloat16 a layout may differ from one rank by twice of what rounding does to one rank."""
    if line["same_tokens"] < line["requests"]:
        return "TOKENS DIFFER"
    return "agrees" if line["bfloat16"]["mean"] <= 2 * line["rounding"]["mean"] else "LOGITS DIFFER"


def print_correct(lines: list[dict[str, Any]], args: argparse.Namespace) -> None:
    table = Table(title=f"against one rank, on {args.device}; log-probabilities are apart by mean / largest")
    for column in ("model", "ranks", "float32: same tokens", "float32", "bfloat16", "control: bf16 to f32", "verdict"):
        table.add_column(column, justify="left" if column in ("model", "ranks") else "right")
    for line in lines:
        gaps = [f"{line[name]['mean']:.1e} / {line[name]['max']:.1e}" for name in ("float32", "bfloat16", "rounding")]
        same = f"{line['same_tokens']} of {line['requests']}"
        table.add_row(line["architecture"], line["layout"], same, *gaps, verdict(line))
    Console(width=130).print(table)


# --- speed


def row_speed(mesh: Mesh, task: dict[str, Any]) -> Any:
    """Decode rounds, the mix, a trace; then all ranks time their all-reduces."""
    engine = build_engine(
        model_path=Path(task["model"]),
        mesh=mesh,
        load_format="dummy",
        max_num_seqs=max(*task["batches"], task["jobs"]),
        max_model_len=task["max_model_len"],
        max_num_batched_tokens=task["budget"],
        kv_cache_bytes=task["kv_cache_bytes"],
    )

    def work(caller: Caller) -> dict[str, Any]:
        vocab_size = engine.info.vocab_size
        load = {"count": task["jobs"], "prompts": task["prompts"], "outputs": task["outputs"]}
        mix(caller, draw_mix(99, vocab_size, **load), mesh.device)  # warm-up
        decode = {
            batch: statistics.median(decode_round_ms(caller, batch, seed, task) for seed in range(task["rounds"]))
            for batch in task["batches"]
        }
        mixes = [mix(caller, draw_mix(seed, vocab_size, **load), mesh.device) for seed in range(task["rounds"])]
        chosen = sorted(mixes, key=lambda found: found["output_per_s"])[len(mixes) // 2]
        cuda = mesh.device.type == "cuda"
        traced = traced_share(caller, max(task["batches"]), task) if cuda and mesh.tp_size > 1 else None
        return {
            "decode_ms": decode,
            "mix": chosen | {"trace": []},
            "traced": traced,
            "kv_tokens": engine.info.kv_tokens,
        }

    answer = lead(mesh, engine, work)
    alone = {batch: all_reduces_ms(mesh, batch, task) for batch in task["batches"]}
    return answer and answer | {"all_reduce_ms": alone}


def decode_round_ms(caller: Caller, batch: int, seed: int, task: dict[str, Any]) -> float:
    """Of one load: from when all sequences have two tokens until the first ends."""
    rng, vocab_size = random.Random(1000 * batch + seed), caller.engine.info.vocab_size
    prompt, output = task["decode_tokens"]
    seen = dict.fromkeys(range(batch), 0)
    began = num_tokens = 0.0
    found = None
    done = caller.call(tuple(request(i, rng, prompt, output, vocab_size) for i in range(batch)))
    while True:
        now = time.perf_counter()
        if began and found is None:
            num_tokens += len(done.tokens)
            found = 1e3 * (now - began) * batch / num_tokens if done.finished else None
        for token in done.tokens:
            seen[token.handle] += 1
        if not began and min(seen.values()) >= 2:
            began = now
        if caller.engine.idle:
            break
        done = caller.call()
    if found is None:
        raise RuntimeError(f"outputs of {output} tokens are too short to see {batch} sequences decode")
    return found


def traced_share(caller: Caller, batch: int, task: dict[str, Any]) -> float:
    """Of the time of all kernels on rank 0's GPU in some decode steps, what all-reduces take."""
    rng, vocab_size = random.Random(7), caller.engine.info.vocab_size
    prompt, output = task["decode_tokens"]
    caller.step(tuple(request(i, rng, prompt, output, vocab_size) for i in range(batch)))
    while caller.engine.stats().waiting:
        caller.step()
    for _ in range(3):  # the last prompts' ends, and what was launched before them
        caller.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(8):
            caller.step()
        torch.cuda.synchronize()
    caller.drain()
    times = {event.key: event.self_device_time_total for event in trace.key_averages()}
    return float(sum(us for kernel, us in times.items() if is_all_reduce(kernel)) / (sum(times.values()) or 1.0))


def is_all_reduce(kernel: str) -> bool:
    """By NCCL's names, as in ncclDevKernel_AllReduce_Sum_bf16_RING_LL."""
    return "allreduce" in kernel.lower().replace("_", "")


def all_reduces_ms(mesh: Mesh, batch: int, task: dict[str, Any]) -> float:
    """Those of one decode round, two a layer, with nothing between them.  Collective."""
    import torch.distributed as dist

    if mesh.tp_size == 1:
        return 0.0
    rows = -(-batch // mesh.pp_size)  # a pipeline's rows are spread over as many steps as it has stages
    dtype = torch.bfloat16 if mesh.device.type == "cuda" else torch.float32
    tensor = torch.zeros((rows, task["hidden_size"]), dtype=dtype, device=mesh.device)

    def series() -> None:
        for _ in range(2 * task["layers"]):
            dist.all_reduce(tensor, group=mesh.tp_group)

    run: Callable[[], object] = series
    series()
    settle(mesh.device)
    if mesh.device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            series()
        run = graph.replay
    times = []
    for _ in range(10):
        dist.barrier(group=mesh.tp_group)
        settle(mesh.device)
        began = time.perf_counter()
        run()
        settle(mesh.device)
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def measure_speed(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name, shape in args.shapes:
        base: dict[str, Any] | None = None
        for layout in args.layouts:
            line = {"shape": name, "layout": str(layout), "ranks": layout.size}
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "config.json").write_text(json.dumps(shape | dtype_for(args.device)))
                task = {
                    "model": folder, "batches": args.batch, "jobs": args.jobs, "prompts": args.prompts,
                    "outputs": args.outputs, "decode_tokens": args.decode_tokens, "budget": args.max_num_batched_tokens,
                    "max_model_len": args.max_model_len, "rounds": args.rounds, "kv_cache_bytes": args.kv_cache_bytes,
                    "hidden_size": shape["hidden_size"], "layers": shape["num_hidden_layers"],
                }  # fmt: skip
                try:
                    line |= pull(layout, device=args.device, task=task, threads=threads(args))[0]
                except RuntimeError as error:  # too large for so few devices, most likely
                    yield line | {"error": str(error)}
                    continue
            base = base or line
            each = [found["mix"]["output_per_s"] / found["ranks"] for found in (line, base)]
            yield line | {"efficiency": each[0] / each[1], "base": base["layout"]}


def threads(args: argparse.Namespace) -> int | None:
    """On a CPU each rank has one, as if it were a device, so that layouts of all sizes can be compared."""
    return 1 if args.device == "cpu" else None


def dtype_for(device: str) -> dict[str, str]:
    """CPUs are slow in bfloat16."""
    return {"torch_dtype": "bfloat16" if device == "cuda" else "float32"}


def print_speed(lines: list[dict[str, Any]], args: argparse.Namespace) -> None:
    prompt, output = args.decode_tokens
    table = Table(title=f"decode round of B sequences, ms ({prompt} + {output} tokens); {args.jobs} requests at once")
    table.add_column("shape")
    table.add_column("ranks")
    for batch in args.batch:
        table.add_column(f"B={batch}", justify="right")
    largest = max(args.batch)
    for column in ("mix, tokens/s", "efficiency", f"all-reduce alone, B={largest}", "traced", "KV tokens"):
        table.add_column(column, justify="right")
    for line in lines:
        if "error" in line:
            table.add_row(line["shape"], line["layout"], *["-"] * len(args.batch), last_line(line["error"]))
            continue
        decode = {int(batch): ms for batch, ms in line["decode_ms"].items()}
        reduce_share = {int(batch): ms for batch, ms in line["all_reduce_ms"].items()}[largest] / decode[largest]
        table.add_row(
            line["shape"], line["layout"], *(f"{decode[batch]:.2f}" for batch in args.batch),
            f"{line['mix']['output_per_s']:,.0f}", f"{line['efficiency']:.0%} of {line['base']}",
            f"{reduce_share:.0%}", "-" if line["traced"] is None else f"{line['traced']:.0%}",
            f"{line['kv_tokens']:,}",
        )  # fmt: skip
    Console(width=140).print(table)


def last_line(error: str) -> str:
    """Of what the failed rank said."""
    return next((line for line in reversed(error.splitlines()) if "Error" in line), error.splitlines()[0])[-200:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["correct", "speed"], default=["correct", "speed"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    layouts = [Layout.read(text) for text in ("1x1", "2x1", "4x1", "8x1", "1x2", "2x2")]
    parser.add_argument("--layouts", type=Layout.read, nargs="+", default=layouts)
    parser.add_argument("--architectures", nargs="+", default=["llama", "qwen3"], help="of correct")
    parser.add_argument("--requests", type=int, default=48, help="of correct")
    parser.add_argument("--shapes", type=shape_of, nargs="+", default=[shape_of("8b")], help="8b, 70b, tiny, or JSON")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=256, help="requests of the mix")
    parser.add_argument("--prompts", type=int, nargs=2, default=[128, 1024], help="tokens, of the mix")
    parser.add_argument("--outputs", type=int, nargs=2, default=[64, 512])
    parser.add_argument("--decode-tokens", type=int, nargs=2, default=[512, 192], help="prompt and output")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--kv-cache-bytes", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if (seat := own_seat()) is not None:
        row(seat, row_speed if "budget" in seat.task else row_correct)
    args.layouts = [layout for layout in args.layouts if has_room(layout, args.device)]
    found: dict[str, Any] = {"machine": machine(args.device), "commit": commit(), "args": sys.argv[1:]}
    wrong = False
    if "correct" in args.parts:
        keep(found, "correct", measure_correct(args), args.json)
        print_correct(found["correct"], args)
        wrong = any(verdict(line) != "agrees" for line in found["correct"])
    if "speed" in args.parts:
        keep(found, "speed", measure_speed(args), args.json)
        print_speed(found["speed"], args)
    sys.exit(wrong)


def keep(found: dict[str, Any], part: str, lines: Iterator[dict[str, Any]], file: Path | None) -> None:
    """Line by line, as they come: what was measured outlives a run that is cut off."""
    found[part] = []
    for line in lines:
        found[part].append(line)
        print(f"{part}: {json.dumps(line)[:400]}", flush=True)
        if file:
            file.write_text(json.dumps(found, indent=1))


def has_room(layout: Layout, device: str) -> bool:
    if device == "cpu" or layout.size <= torch.cuda.device_count():
        return True
    print(f"{layout}: left out, this host has {torch.cuda.device_count()} GPUs")
    return False


def machine(device: str) -> str:
    if device == "cpu":
        return f"CPU, torch {torch.__version__}"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}"


if __name__ == "__main__":
    main()

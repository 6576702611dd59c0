"""The paged engine against transformers' DynamicCache batches, its generate() and its continuous batching.

    python benchmarks/bench_engine.py [--parts decode mix] [--batch 1 8 32 64] [--rounds 3] [--json FILE]

decode: one step with all rows running.  All three arms run in the same process on the same weights, the first two step
by step in turn, in interleaved rounds; the figure is the median over all steps of all rounds.  The engine's step is a
whole one (schedule, forward, choose, account), with as many threads as the other arms, however few it would use; the
DynamicCache step is the bare forward of equally long rows without a mask, and an argmax: its best case.
mix: requests of many lengths, see mixed_load.py.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from mixed_load import draw, measure_mix, print_mix
from rich.console import Console
from rich.table import Table

from hortator.workers.engine.build import build_engine
from hortator.workers.engine.engine import PagedEngine
from hortator.workers.engine.parallel import SingleRank
from hortator.workers.engine.step import Request, SamplingParams, StepPlan

VOCAB = 8192


def make_model(folder: Path, args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128),
        vocab_size=VOCAB,
        max_position_embeddings=4096,
        eos_token_id=None,
        bos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def prompts(batch: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(1, VOCAB, (batch, length), generator=generator).tolist()


def hortator_steps(engine: PagedEngine, batch: int, args: argparse.Namespace) -> Iterator[float]:
    """Seconds of each decode step with all rows running."""
    sampling = SamplingParams(max_tokens=args.steps + 1, ignore_eos=True)
    admit = tuple(Request(i, tuple(p), sampling) for i, p in enumerate(prompts(batch, args.context)))
    engine.apply(StepPlan(0, admit))
    engine.execute()
    while not engine.idle:
        start = time.perf_counter()
        engine.apply(StepPlan(0))
        tokens = engine.execute().tokens
        assert len(tokens) == batch
        yield time.perf_counter() - start


def dynamic_steps(model: transformers.PreTrainedModel, batch: int, args: argparse.Namespace) -> Iterator[float]:
    """Seconds of each decode step of one batch of equally long rows."""
    cache = transformers.DynamicCache(config=model.config)
    inputs = torch.tensor(prompts(batch, args.context))
    for step in range(args.steps + 1):
        start = time.perf_counter()
        with torch.inference_mode():
            output = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            inputs = output.logits[:, -1].argmax(-1, keepdim=True)
            inputs.tolist()
        if step:  # the first one is the prompts'
            yield time.perf_counter() - start


def continuous_steps(model: transformers.PreTrainedModel, batch: int, args: argparse.Namespace) -> list[float]:
    """Seconds between the tokens of the last request to be admitted: from then on all rows decode."""
    generation = transformers.GenerationConfig(
        max_new_tokens=args.cb_steps + 1, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    outputs = model.generate_batch(
        prompts(batch, args.context), generation_config=generation, record_timestamps=True, progress_bar=False
    )
    first = max(output.timestamps[0] for output in outputs.values())
    stamps = next(output.timestamps for output in outputs.values() if output.timestamps[0] == first)
    return [b - a for a, b in pairwise(stamps[1:])]


def measure(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The rows of each part."""
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name), args)
        engine = build_engine(
            model_path=Path(name),
            mesh=SingleRank(),
            dtype="float32",
            max_num_seqs=max(*args.batch, args.mix_requests),
            max_model_len=max(args.context + args.steps + 64, args.mix_prompts[1] + args.mix_outputs[1]),
            max_num_batched_tokens=max(2048, max(args.batch) * args.context),
        )
        engine._runner.threads = None  # as many as the other arms, in every step
        model = transformers.LlamaForCausalLM.from_pretrained(name, dtype=torch.float32, attn_implementation="sdpa")
        model.eval()
        found: dict[str, list[dict[str, Any]]] = {}
        if "decode" in args.parts:
            measure_pair(engine, model, 1, args)  # warm-up
            found["decode"] = [measure_batch(engine, model, batch, args) for batch in args.batch]
        if "mix" in args.parts:
            found["mix"] = measure_mix(
                engine,
                model,
                rounds=args.mix_rounds,
                static_batches=args.static_batches,
                load=lambda seed: draw(
                    seed,
                    count=args.mix_requests,
                    vocabulary=VOCAB,
                    prompts=tuple(args.mix_prompts),
                    outputs=tuple(args.mix_outputs),
                ),
            )
        return found


def measure_pair(
    engine: PagedEngine, model: transformers.PreTrainedModel, batch: int, args: argparse.Namespace
) -> list[tuple[float, float]]:
    """One round of both arms, step by step in turn, so that whatever else the machine does falls on both alike."""
    return list(zip(hortator_steps(engine, batch, args), dynamic_steps(model, batch, args), strict=True))


def measure_batch(
    engine: PagedEngine, model: transformers.PreTrainedModel, batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    pairs: list[tuple[float, float]] = []
    continuous: list[float] = []
    for round_ in range(args.rounds):
        pairs += measure_pair(engine, model, batch, args)
        if round_ < args.cb_rounds:
            continuous += continuous_steps(model, batch, args)
    row = {
        "batch": batch,
        "hortator_ms": 1e3 * statistics.median(ours for ours, _ in pairs),
        "dynamic_ms": 1e3 * statistics.median(dynamic for _, dynamic in pairs),
        "continuous_ms": 1e3 * statistics.median(continuous) if continuous else float("nan"),
    }
    row["vs_dynamic"] = row["hortator_ms"] / row["dynamic_ms"]
    row["continuous_vs_hortator"] = row["continuous_ms"] / row["hortator_ms"]
    return row


def print_table(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    table = Table(
        title=f"Decode step, milliseconds (llama {args.hidden} x {args.layers}, float32, "
        f"context {args.context}-{args.context + args.steps}, {torch.get_num_threads()} threads)"
    )
    for column in ("B", "hortator", "DynamicCache", "ratio (<= 1.3)", "continuous batching", "faster by"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["batch"]),
            f"{row['hortator_ms']:.1f}",
            f"{row['dynamic_ms']:.1f}",
            f"{row['vs_dynamic']:.2f}",
            f"{row['continuous_ms']:.1f}",
            f"{row['continuous_vs_hortator']:.1f}x",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["decode", "mix"], default=["decode", "mix"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--context", type=int, default=128, help="prompt tokens of every row")
    parser.add_argument("--steps", type=int, default=24, help="decode steps per round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cb-steps", type=int, default=16, help="decode steps per round of continuous batching")
    parser.add_argument("--cb-rounds", type=int, default=2, help="0: leave continuous batching out")
    parser.add_argument("--mix-requests", type=int, default=64)
    parser.add_argument("--mix-prompts", type=int, nargs=2, default=[8, 256], help="tokens, uniform from and to")
    parser.add_argument("--mix-outputs", type=int, nargs=2, default=[8, 128])
    parser.add_argument("--mix-rounds", type=int, default=2)
    parser.add_argument("--static-batches", type=int, nargs="+", default=[64, 16], help="of generate() in the mix")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    found = measure(args)
    if "decode" in found:
        print_table(found["decode"], args)
    if "mix" in found:
        print_mix(found["mix"], f"{args.mix_requests} requests at once, median of {args.mix_rounds} interleaved rounds")
    if args.json:
        args.json.write_text(json.dumps({"settings": vars(args) | {"json": str(args.json)}} | found, indent=2))


if __name__ == "__main__":
    main()

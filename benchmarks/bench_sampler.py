"""What choosing tokens costs per step, by parameter: python benchmarks/bench_sampler.py [--device cuda] [--rows 256]

Every row uses the parameter, with a history of its own that grows by the chosen tokens.  `host`: until `choose`
returned, which on a GPU is what the step loop pays if nothing waits; `all`: until the tokens were read.  With
--tokenizer (a tokenizer.json) structured rows are measured too.
"""

import argparse
import json
import platform
import random
import time
from array import array
from pathlib import Path
from typing import Any

import torch

from hortator.workers.engine.sampler import Draw, Sampler, scores
from hortator.workers.engine.step import SamplingParams, Structure, StructureKind
from hortator.workers.engine.structure import Grammars

NUM_PROMPT = 300
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}, "minItems": 500}},
    "required": ["name", "tags"],
}
CASES: dict[str, tuple[int, dict[str, Any]]] = {  # name -> (tokens before, parameters)
    "greedy": (700, {}),
    "temperature": (700, {"temperature": 1.0}),
    "temperature, min_p": (700, {"temperature": 1.0, "min_p": 0.05}),
    "temperature, top_k 50": (700, {"temperature": 1.0, "top_k": 50}),
    "temperature, top_p 0.9": (700, {"temperature": 1.0, "top_p": 0.9}),
    "repetition_penalty": (700, {"repetition_penalty": 1.1}),
    "repetition_penalty, 8000 tokens": (8000, {"repetition_penalty": 1.1}),
    "presence and frequency": (700, {"presence_penalty": 0.5, "frequency_penalty": 0.5}),
    "logit_bias of 300": (700, {"logit_bias": tuple((token, 1.0) for token in range(300))}),
    "min_tokens": (700, {"min_tokens": 100_000}),
    "top_logprobs 20": (700, {"logprobs": True, "top_logprobs": 20}),
    "structure": (NUM_PROMPT, {"structure": Structure(StructureKind.JSON_SCHEMA, json.dumps(SCHEMA))}),
}


def measure(
    sampler: Sampler, logits: torch.Tensor, before: int, parameters: dict[str, Any], repeats: int
) -> tuple[float, float]:
    """Median milliseconds: host, all."""
    rng, num_rows = random.Random(0), logits.shape[0]
    tokens = [array("i", [rng.randrange(logits.shape[1]) for _ in range(before)]) for _ in range(num_rows)]
    samplings = [SamplingParams(max_tokens=100_000, seed=row, **parameters) for row in range(num_rows)]
    host, total = [], []
    for _ in range(repeats + 3):
        draws = [
            Draw(samplings[row], before - NUM_PROMPT, id(tokens[row]), tokens[row], NUM_PROMPT, frozenset({1, 2}))
            for row in range(num_rows)
        ]
        if logits.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        chosen = sampler.choose(logits, draws)
        host.append(time.perf_counter() - start)
        scores(logits, chosen, draws)
        ids = chosen.tolist()
        total.append(time.perf_counter() - start)
        for row, token in enumerate(ids):
            if token >= 0:
                tokens[row].append(token)
    return sorted(host[3:])[repeats // 2] * 1000, sorted(total[3:])[repeats // 2] * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tokenizer", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, 1 thread"
    torch.set_num_threads(1)
    grammars = None
    if options.tokenizer:
        grammars = Grammars(options.tokenizer, vocab_size=options.vocabulary, eos_token_ids=[1])
        grammars.wait()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    logits = 4 * torch.randn(options.rows, options.vocabulary, device=device, dtype=dtype)
    print(f"{options.rows} rows, vocabulary {options.vocabulary}, {name}, torch {torch.__version__}")
    print(f"{'':34s}{'host, ms':>10s}{'all, ms':>10s}")
    for case, (before, parameters) in CASES.items():
        if "structure" in parameters and grammars is None:
            continue
        host, total = measure(Sampler(grammars), logits, before, parameters, options.repeats)
        print(f"{case:34s}{host:10.2f}{total:10.2f}", flush=True)
    if grammars is not None:
        grammars.close()


if __name__ == "__main__":
    main()

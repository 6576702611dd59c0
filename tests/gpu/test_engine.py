"""The engine on a GPU against transformers in float32 on the CPU: small models, every path."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hortator.workers.engine.parallel import SingleRank
from hortator.workers.engine.step import Request
from tests.workers.engine.checkpoints import make_checkpoint, mixed_requests
from tests.workers.engine.drive import build, run

pytestmark = pytest.mark.gpu
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "mixtral")
NEAR_TIE = 1e-3  # in logits: closer, rounding may make the second choice the first
CUDA = SingleRank(torch.device("cuda"))
TIGHT = {"max_num_batched_tokens": 64, "block_size": 16, "kv_cache_bytes": 40 * 16 * 1024}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_float32_tokens_are_those_of_generate(name: str, tmp_path: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    extra = {"num_key_value_heads": 2} if name in ("llama", "mistral") else {}
    checkpoint = make_checkpoint(name, tmp_path / name, **extra)
    requests = mixed_requests(48)
    engine = build(checkpoint.path, CUDA, dtype="float32", **TIGHT)
    outcome = run(engine, requests, stagger=3)
    gaps = {r.handle: checkpoint.gap(r.prompt, outcome.tokens[r.handle], r.sampling.max_tokens) for r in requests}
    assert {handle: gap for handle, gap in gaps.items() if gap > NEAR_TIE} == {}
    assert engine.stats().free_blocks == engine.stats().total_blocks


def test_bfloat16_log_probabilities_are_near_the_reference(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama", tmp_path / "llama", initializer_range=0.1)
    sampling = replace(mixed_requests(1)[0].sampling, max_tokens=24, ignore_eos=True, logprobs=True)
    requests = [Request(i, tuple(range(5 + i, 60 + 2 * i)), sampling) for i in range(8)]
    outcome = run(build(checkpoint.path, CUDA, dtype="bfloat16"), requests)
    for request in requests:
        tokens = outcome.tokens[request.handle]
        with torch.inference_mode():
            logits = checkpoint.reference()(torch.tensor([[*request.prompt, *tokens]])).logits[0]
        start = len(request.prompt) - 1
        wanted = logits.log_softmax(-1)[range(start, start + len(tokens)), tokens]
        got = torch.tensor(outcome.logprobs[request.handle], dtype=torch.float32)
        assert float((got - wanted).norm() / wanted.norm()) < 2e-2

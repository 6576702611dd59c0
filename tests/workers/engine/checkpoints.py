"""Tiny random checkpoints of every supported architecture, and what transformers' generate() says about them."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from hortator.workers.engine.step import Request, SamplingParams

VOCAB = 256
EOS = 0
MAX_MODEL_LEN = 512
WINDOW = 24
_GEMMA = {"head_dim": 8, "tie_word_embeddings": True, "num_key_value_heads": 4}
_OWN: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "qwen2": {"tie_word_embeddings": True, "num_hidden_layers": 3},
    "qwen3": {"head_dim": 16, "num_key_value_heads": 2},
    "mistral": {"sliding_window": WINDOW},
    # Caps so low that scores and logits reach them; a scale of queries that is not the usual one.
    "gemma2": {
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
        **_GEMMA,
    },
    "gemma3_text": {"sliding_window_pattern": 2, "sliding_window": WINDOW, **_GEMMA},
    "phi3": {"sliding_window": WINDOW},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {  # the second layer has no experts
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "mlp_only_layers": [1],
        "head_dim": 16,
        "num_key_value_heads": 2,
    },
}
ARCHITECTURES = tuple(_OWN)


@dataclass(frozen=True)
class Checkpoint:
    """A directory in the Hugging Face format."""

    name: str
    path: Path

    @cache  # noqa: B019 - as long as the session
    def reference(self) -> Any:
        """transformers' own model."""
        return transformers.AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()

    @cache  # noqa: B019
    def expected(self, prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
        """Greedy float32 continuation by generate()."""
        rows = torch.tensor([prompt])
        with torch.inference_mode():
            output = self.reference().generate(
                rows, attention_mask=torch.ones_like(rows), max_new_tokens=max_tokens, do_sample=False, pad_token_id=EOS
            )
        return tuple(output[0, len(prompt) :].tolist())

    def gap(self, prompt: tuple[int, ...], got: Sequence[int], max_tokens: int) -> float:
        """0 if `got` is the expected continuation.  Else how much likelier (in logits) the reference finds its own
        token at the first place that differs; infinite unless `got` has its second choice there."""
        wanted = self.expected(prompt, max_tokens)
        at = next((i for i, pair in enumerate(zip(got, wanted, strict=False)) if pair[0] != pair[1]), None)
        if at is None:
            return 0.0 if len(got) == len(wanted) else math.inf
        with torch.inference_mode():
            best = self.reference()(torch.tensor([[*prompt, *wanted[:at]]])).logits[0, -1].topk(2)
        if {got[at], wanted[at]} != set(best.indices.tolist()):
            return math.inf
        return float(best.values[0] - best.values[1])


def make_checkpoint(architecture: str, path: Path, *, seed: int = 0, **changes: Any) -> Checkpoint:
    """Random weights, wide enough that tokens differ clearly."""
    config = transformers.AutoConfig.for_model(
        architecture,
        **{
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "vocab_size": VOCAB,
            "max_position_embeddings": MAX_MODEL_LEN,
            "initializer_range": 0.3,
            "bos_token_id": 1,
            "eos_token_id": EOS,
            "pad_token_id": None,
            **_OWN[architecture],
            **changes,
        },
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero, where a mistake would not show
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    return Checkpoint(architecture, path)


def mixed_requests(count: int = 64, *, seed: int = 1) -> list[Request]:
    """Short and long prompts and outputs; several are longer than the sliding window and than a chunk."""
    rng = random.Random(seed)
    return [
        Request(
            handle,
            tuple(rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 70))),
            SamplingParams(max_tokens=rng.randrange(1, 25)),
        )
        for handle in range(count)
    ]

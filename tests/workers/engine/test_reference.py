"""What tests on a GPU hold tokens against, where rounding differs."""

import math

import torch

from tests.workers.engine.checkpoints import Checkpoint

PROMPT = tuple(range(10, 30))


def test_only_the_second_choice_has_a_gap_and_it_is_that_of_the_logits(llama: Checkpoint) -> None:
    wanted = llama.expected(PROMPT, 6)
    with torch.inference_mode():
        logits = llama.reference()(torch.tensor([[*PROMPT, *wanted[:3]]])).logits[0, -1]
    first, second, third = logits.topk(3).indices.tolist()
    assert wanted[3] == first
    assert llama.gap(PROMPT, wanted, 6) == 0
    assert llama.gap(PROMPT, (*wanted[:3], second, 7, 7), 6) == float(logits[first] - logits[second]) > 1e-3
    assert llama.gap(PROMPT, (*wanted[:3], third, 7, 7), 6) == math.inf
    assert llama.gap(PROMPT, wanted[:5], 6) == math.inf

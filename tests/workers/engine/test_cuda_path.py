"""The llama family's fused layers and the steps in flight, with the kernels' twins in plain torch: all but the kernels
themselves, which tests/gpu holds against the same twins."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from hortator.workers.engine.cuda import body, reference
from hortator.workers.engine.cuda.runner import CudaRunner, ladder
from hortator.workers.engine.engine import Limits, PagedEngine
from hortator.workers.engine.model import load_model, read_config
from hortator.workers.engine.parallel import SingleRank
from tests.workers.engine.checkpoints import MAX_MODEL_LEN, Checkpoint, make_checkpoint, mixed_requests
from tests.workers.engine.drive import Outcome, run, step

FUSED = ("llama", "qwen2", "qwen3", "mistral")
TIGHT = Limits(num_blocks=40, block_size=4, max_num_seqs=64, max_model_len=MAX_MODEL_LEN, max_num_batched_tokens=40)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    root = tmp_path_factory.mktemp("fused")
    biased = {"llama": {"attention_bias": False}}
    return {name: make_checkpoint(name, root / name, **{"head_dim": 16, **biased.get(name, {})}) for name in FUSED}


def fused(checkpoint: Checkpoint, limits: Limits = TIGHT) -> PagedEngine:
    ranks, config = SingleRank(), read_config(checkpoint.path, dtype="float32")
    model = load_model(config, ranks)
    assert body.fits(model)
    return PagedEngine(config, CudaRunner(model, ranks, limits, operations=reference), ranks=ranks, limits=limits)


@pytest.mark.parametrize("name", FUSED)
def test_tokens_are_those_of_generate_with_a_step_in_flight(name: str, checkpoints: dict[str, Checkpoint]) -> None:
    checkpoint, requests = checkpoints[name], mixed_requests(32)
    engine = fused(checkpoint)
    outcome = run(engine, requests, stagger=5)
    assert outcome.tokens == {r.handle: list(checkpoint.expected(r.prompt, r.sampling.max_tokens)) for r in requests}
    assert engine.stats().preemptions
    assert engine.stats().free_blocks == engine.stats().total_blocks


def test_a_token_is_reported_one_step_after_it_was_launched(checkpoints: dict[str, Checkpoint]) -> None:
    engine, outcome = fused(checkpoints["llama"]), Outcome()
    [request] = mixed_requests(1)
    step(engine, outcome, admit=[replace(request, sampling=replace(request.sampling, max_tokens=3, ignore_eos=True))])
    assert not outcome.tokens
    step(engine, outcome)
    assert [len(tokens) for tokens in outcome.tokens.values()] == [1]
    while not engine.idle:
        step(engine, outcome)
    assert [len(tokens) for tokens in outcome.tokens.values()] == [3]


def test_rows_of_all_kinds_mix_while_steps_are_in_flight(checkpoints: dict[str, Checkpoint]) -> None:
    """Greedy, seeded, penalised and scored ones get what each gets alone."""
    kinds: tuple[dict[str, Any], ...] = (
        {},
        {"temperature": 0.9, "seed": 3},
        {"repetition_penalty": 1.3},
        {"logprobs": True, "top_logprobs": 2},
    )
    requests = [
        replace(r, sampling=replace(r.sampling, ignore_eos=True, **kinds[r.handle % 4]))
        for r in mixed_requests(12, seed=4)
    ]
    together = run(fused(checkpoints["llama"]), requests, stagger=2)
    for request in requests[:4]:
        alone = run(fused(checkpoints["llama"]), [request])
        assert together.tokens[request.handle] == alone.tokens[request.handle]
    assert all(p is not None for r in requests if r.sampling.logprobs for p in together.logprobs[r.handle])


@pytest.mark.parametrize("largest", [1, 3, 8, 100, 256, 1000])
def test_the_ladder_of_graphs_ends_with_the_largest_batch_and_fills_little(largest: int) -> None:
    sizes = ladder(largest)
    assert sizes[-1] == largest
    assert sizes == sorted(set(sizes))
    assert all(b <= max(2 * a, a + 64) for a, b in pairwise(sizes))

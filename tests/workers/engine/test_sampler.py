"""Sampling against a straightforward reference, and its independence of everything but seed and position."""

import math
import random
from collections import Counter

import pytest
import torch

from hortator.workers.engine import sampler
from hortator.workers.engine.sampler import BAD_ROW, Draw, Sampler, scores, splitmix64, uniform
from hortator.workers.engine.step import SamplingParams

VOCAB = 40
choose = Sampler().choose
LOGITS = [3 * math.sin(1.7 * i) for i in range(VOCAB)]


def params(**changes: float) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 1, "temperature": 1.0, **changes})  # type: ignore[arg-type]


def reference(logits: list[float], p: SamplingParams) -> dict[int, float]:
    """Probabilities by the definition: temperature, top_k, top_p, min_p, each on what the one before left."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    left = {i: math.exp((logits[i] - logits[order[0]]) / p.temperature) for i in order[: p.top_k or len(order)]}
    total, before, nucleus = sum(left.values()), 0.0, {}
    for token, weight in left.items():
        if before < p.top_p * total:
            nucleus[token] = weight
        before += weight
    best = max(nucleus.values())
    kept = {token: weight for token, weight in nucleus.items() if weight >= p.min_p * best}
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


@pytest.mark.parametrize(
    "sampling",
    [
        params(),
        params(temperature=0.5),
        params(temperature=2.5),
        params(top_k=5),
        params(top_p=0.7),
        params(min_p=0.2),
        params(top_p=0.01),
        params(top_k=12, top_p=0.8),
        params(temperature=1.5, top_k=20, top_p=0.9, min_p=0.1),
        params(top_k=10_000, top_p=0.95),
    ],
    ids=lambda p: f"T{p.temperature}-k{p.top_k}-p{p.top_p}-m{p.min_p}",
)
def test_frequencies_are_those_of_the_filtered_distribution(sampling: SamplingParams) -> None:
    count, expected = 20_000, reference(LOGITS, sampling)
    rows = torch.tensor([LOGITS]).expand(count, -1)
    seen = Counter(choose(rows, [Draw(sampling, position) for position in range(count)]).tolist())
    assert set(seen) <= set(expected), "a token that the filters exclude"
    for token, probability in expected.items():
        spread = math.sqrt(probability * (1 - probability) / count)
        assert abs(seen[token] / count - probability) < 5 * spread + 1e-9


@pytest.mark.parametrize("p", [params(top_p=0.9), params(top_k=700), params(top_k=700, top_p=0.99)])
def test_a_nucleus_larger_than_the_first_candidates_is_still_exact(p: SamplingParams) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3000, generator=generator) * 0.5
    expected = reference(logits[0].tolist(), p)
    assert len(expected) > sampler._FIRST_WIDTH
    threshold = sampler._thresholds(logits - logits.amax(), [Draw(p, 0)])
    kept = ((logits - logits.amax()) >= threshold)[0].nonzero().squeeze(1).tolist()
    assert len(set(kept) ^ set(expected)) <= 1  # the border token may fall on either side of rounding


def test_greedy_rows_are_the_argmax_whatever_their_neighbours_do() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    draws = [Draw(params(temperature=0.0 if row % 2 else 1.5, seed=row), 0) for row in range(6)]
    assert choose(logits, draws).tolist()[1::2] == logits.argmax(-1).tolist()[1::2]


def test_a_row_is_chosen_the_same_alone_and_in_any_batch() -> None:
    rng, generator = random.Random(0), torch.Generator().manual_seed(2)
    logits = torch.randn(64, 500, generator=generator)
    draws = [
        Draw(
            params(
                temperature=rng.choice((0.0, 0.3, 1.0, 3.0)),
                top_k=rng.choice((0, 0, 7, 300)),
                top_p=rng.choice((1.0, 0.9, 0.3)),
                min_p=rng.choice((0.0, 0.05)),
                seed=rng.getrandbits(63),
            ),
            rng.randrange(1000),
        )
        for _ in range(64)
    ]
    alone = [choose(logits[i : i + 1], [draws[i]]).item() for i in range(64)]
    order = rng.sample(range(64), 64)
    assert [alone[i] for i in order] == choose(logits[order], [draws[i] for i in order]).tolist()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_marked_and_the_others_go_on(poison: float, temperature: float) -> None:
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(3))
    draws = [Draw(params(temperature=temperature, top_p=0.9, seed=row), 0) for row in range(5)]
    before = choose(logits.clone(), draws).tolist()
    logits[2, 11] = poison
    assert choose(logits, draws).tolist() == [*before[:2], BAD_ROW, *before[3:]]


@pytest.mark.parametrize("temperature", [1e-4, 1e-300, 100.0])
def test_extreme_temperatures_give_a_token(temperature: float) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    assert choose(logits, [Draw(params(temperature=temperature), 0)]).item() == 0


def test_tokens_that_tie_are_all_kept() -> None:
    tied = torch.zeros(4000, 8)
    seen = Counter(choose(tied, [Draw(params(top_k=2), position) for position in range(4000)]).tolist())
    assert set(seen) == set(range(8))


def test_splitmix64_gives_its_published_sequence() -> None:
    # The first outputs for seed 0: https://rosettacode.org and Vigna's splitmix64.c
    state, step = 0, 0x9E3779B97F4A7C15
    assert [splitmix64(state + i * step) for i in range(2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_uniform_numbers_are_uniform_over_seeds_and_over_positions() -> None:
    for numbers in (
        [uniform(seed, 0) for seed in range(20_000)],
        [uniform(7, position) for position in range(20_000)],
        [uniform(n, n) for n in range(20_000)],
    ):
        assert all(0 <= u < 1 for u in numbers)
        bins = Counter(int(u * 20) for u in numbers)
        assert sum((bins[i] - 1000) ** 2 / 1000 for i in range(20)) < 60  # chi-square, 19 degrees: p < 1e-5


def test_the_largest_uniform_number_still_gives_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "uniform", lambda *_: 1 - 2.0**-53)
    logits = torch.tensor([[0.0, 0.1, 0.2, -30.0]])
    assert choose(logits, [Draw(params(top_k=3), 0)]).item() in (0, 1, 2)


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(4))
    tokens = torch.tensor([1, 7, 19])
    expected = logits.log_softmax(-1)[range(3), tokens].tolist()
    found = scores(logits, tokens, [Draw(params(logprobs=True), 0)] * 3)
    assert [score.logprob for score in found if score] == pytest.approx(expected, abs=1e-5)

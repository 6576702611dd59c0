"""Penalties, biases and min_tokens against transformers' own logits processors, alone and with everything else."""

import contextlib
import itertools
from array import array
from collections import Counter
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from hortator.workers.engine.admission import refusal
from hortator.workers.engine.penalties import News, Table
from hortator.workers.engine.sampler import BAD_ROW, Draw, Sampler, scores, uniform
from hortator.workers.engine.steering import Steering
from hortator.workers.engine.step import EngineInfo, Request, SamplingParams, Structure, StructureKind

VOCAB = 60
STOPS = frozenset({3, 17, 999})
INFO = EngineInfo(max_num_seqs=4, max_model_len=64, vocab_size=VOCAB, kv_tokens=64, eos_token_ids=(3,))

SETTINGS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top_k": {"temperature": 1.0, "top_k": 9},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "presence_penalty": {"presence_penalty": 1.3},
    "frequency_penalty": {"frequency_penalty": -0.6},
    "logit_bias": {"logit_bias": ((5, 4.0), (11, -100.0))},
    "min_tokens": {"min_tokens": 40},
}


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 99, "seed": 7, **changes})


def draw(sampling: SamplingParams, *, handle: int = 1, prompt: int = 12, output: int = 20, seed: int = 0) -> Draw:
    """A row whose tokens repeat, so that there is something to count."""
    rng = np.random.default_rng([seed, handle])
    tokens = array("i", rng.integers(0, VOCAB // 2, prompt + output).tolist())
    return Draw(sampling, output, handle, tokens, prompt, STOPS)


def logits_for(num_rows: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def steered(logits: torch.Tensor, *draws: Draw) -> torch.Tensor:
    changed = logits.clone()
    Steering(None).steer(changed, draws)
    return changed


def reference(logits: torch.Tensor, row: Draw) -> torch.Tensor:
    """What transformers makes of one row's logits [vocabulary], and the OpenAI API's formula where it has nothing."""
    s, scored = row.sampling, logits[None]
    ids = torch.tensor([list(row.tokens)])
    if s.repetition_penalty != 1:
        scored = transformers.RepetitionPenaltyLogitsProcessor(s.repetition_penalty)(ids, scored)
    for token, count in Counter(row.tokens[row.num_prompt :]).items():
        scored[0, token] -= s.frequency_penalty * count + s.presence_penalty
    if s.logit_bias:
        bias = [[[token], value] for token, value in s.logit_bias]
        scored = transformers.SequenceBiasLogitsProcessor(bias)(ids, scored)
    stops = [token for token in row.stops if token < VOCAB]
    least = transformers.MinNewTokensLengthLogitsProcessor(row.num_prompt, s.min_tokens, stops, device="cpu")
    scored = least(ids, scored)
    if s.temperature:
        scored = transformers.TemperatureLogitsWarper(s.temperature)(ids, scored)
    if s.top_k:
        scored = transformers.TopKLogitsWarper(s.top_k)(ids, scored)
    if s.top_p < 1:
        scored = transformers.TopPLogitsWarper(s.top_p)(ids, scored)
    if s.min_p:
        scored = transformers.MinPLogitsWarper(s.min_p)(ids, scored)
    result: torch.Tensor = scored[0]
    return result


def expected(logits: torch.Tensor, row: Draw) -> int:
    """The token that the row's uniform number picks from the reference's distribution."""
    scored = reference(logits.clone(), row)
    if row.greedy:
        return int(scored.argmax())
    cumulative = scored.double().softmax(-1).cumsum(-1)
    return int(torch.searchsorted(cumulative, uniform(row.sampling.seed, row.position) * cumulative[-1], right=True))


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"])
def test_each_changes_the_logits_as_its_definition_says(name: str) -> None:
    row, logits = draw(params(**SETTINGS[name])), logits_for(1)
    torch.testing.assert_close(steered(logits, row)[0], reference(logits[0].clone(), row))


@pytest.mark.parametrize("output", [39, 40])
def test_no_stop_token_is_possible_before_min_tokens_and_each_is_after(output: int) -> None:
    row, logits = draw(params(min_tokens=40), output=output), logits_for(1)
    changed = steered(logits, row)[0]
    torch.testing.assert_close(changed, reference(logits[0].clone(), row))
    assert set(changed.isinf().nonzero().flatten().tolist()) == ({3, 17} if output < 40 else set())


def test_presence_and_frequency_do_not_count_the_prompt() -> None:
    row = Draw(params(presence_penalty=2.0, frequency_penalty=2.0), 1, 1, array("i", [4, 4, 5]), 2)
    changed = steered(torch.zeros(1, VOCAB), row)[0]
    assert {token: value for token, value in enumerate(changed.tolist()) if value} == {5: -4.0}


samplings = st.builds(
    SamplingParams,
    max_tokens=st.just(99),
    temperature=st.sampled_from([0.0, 0.4, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.9, 0.5]),
    top_k=st.sampled_from([0, 1, 5, 30]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(0, 2**63),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.6]),
    presence_penalty=st.sampled_from([0.0, 1.1, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -0.3]),
    logit_bias=st.sampled_from([(), ((1, 3.0),), ((0, -100.0), (29, 5.5), (59, 1.0))]),
    min_tokens=st.sampled_from([0, 10, 30]),
)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(samplings, st.integers(0, 25), st.integers(0, 40)), min_size=1, max_size=12), st.integers(0, 99)
)
def test_any_mixture_in_one_batch_gives_what_transformers_gives_row_by_row(
    rows: list[tuple[SamplingParams, int, int]], seed: int
) -> None:
    logits = logits_for(len(rows), seed=seed)
    draws = [
        draw(sampling, handle=handle, prompt=1 + prompt, output=output, seed=seed)
        for handle, (sampling, prompt, output) in enumerate(rows)
    ]
    before = logits.clone()
    chosen = Sampler().choose(logits, draws).tolist()
    assert chosen == [expected(logits[row], draws[row]) for row in range(len(rows))]
    assert logits.equal(before), "the unmodified distribution is needed for log-probabilities"


def test_every_pair_of_parameters_in_one_batch_is_as_each_alone() -> None:
    pairs = [SETTINGS[a] | SETTINGS[b] for a, b in itertools.combinations(SETTINGS, 2)]
    draws = [draw(params(**pair, seed=at), handle=at) for at, pair in enumerate([{}, *SETTINGS.values(), *pairs])]
    logits = logits_for(len(draws))
    together = Sampler().choose(logits, draws).tolist()
    assert together == [Sampler().choose(logits[row : row + 1], [draws[row]]).item() for row in range(len(draws))]
    assert together == [expected(logits[row], draws[row]) for row in range(len(draws))]


@settings(max_examples=50)
@given(st.lists(st.integers(0, 700), min_size=1), st.lists(st.integers(0, 700), max_size=600), st.booleans(), st.data())
def test_a_tally_that_grows_holds_what_a_fresh_count_does(
    prompt: list[int], output: list[int], with_prompt: bool, data: st.DataObject
) -> None:
    table, tokens = Table(torch.device("cpu")), array("i", prompt)
    table.close(table.open(with_prompt=True))
    tally = table.open(with_prompt=with_prompt)

    def catch_up() -> None:
        news = News()
        tally.catch_up(tokens, len(prompt), news)
        table.add(news, [tally])

    while output:
        catch_up()
        size = data.draw(st.integers(1, len(output)))
        tokens.extend(output[:size])
        output = output[size:]
    catch_up()
    ids, counts = table.read([tally]) if tally.size else (torch.zeros(1, 0), torch.zeros(1, 0))
    counted = dict(zip(ids[0].tolist(), counts[0].tolist(), strict=True))
    fresh = Counter(tokens[len(prompt) :])
    assert counted == {token: fresh[token] for token in {*fresh, *(prompt if with_prompt else ())}}


def test_a_sequence_grows_and_is_counted_on_even_after_it_was_forgotten() -> None:
    sampler, sampling = Sampler(), params(repetition_penalty=1.4, frequency_penalty=0.5)
    sequences = {handle: array("i", [handle % VOCAB, 1, 2]) for handle in range(100)}
    for step in range(40):
        awake = [handle for handle in sequences if handle < 3 or handle % 10 == step % 10]  # the others are forgotten
        draws = [Draw(sampling, len(sequences[h]) - 3, h, sequences[h], 3, STOPS) for h in awake]
        logits = logits_for(len(draws), seed=step)
        chosen = sampler.choose(logits, draws).tolist()
        assert chosen == [expected(logits[row], draws[row]) for row in range(len(draws))]
        for handle, token in zip(awake, chosen, strict=True):
            sequences[handle].append(token)
    assert len(sampler._steering._pasts) < len(sequences)


def test_plain_rows_are_not_steered_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a plain row was steered")

    monkeypatch.setattr(Steering, "steer", fail)
    draws = [draw(params(), handle=0), draw(params(temperature=1.0, top_p=0.9, min_tokens=20), handle=1)]
    Sampler().choose(logits_for(2), draws)


@pytest.mark.parametrize("name", [*SETTINGS, "greedy", "top_k and top_p"])
def test_the_host_waits_for_the_device_only_where_it_must(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a tensor on the host is what would make it wait."""
    more = {"greedy": {}, "top_k and top_p": SETTINGS["top_k"] | SETTINGS["top_p"]}
    draws = [draw(params(**(SETTINGS | more)[name]), handle=handle) for handle in range(3)]
    read: list[str] = []
    for method in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, method, lambda *_, method=method: read.append(method))
    with contextlib.suppress(TypeError):  # nothing can go on with what was not read
        Sampler().choose(logits_for(3), draws)
    assert bool(read) == (name == "top_p")


def test_a_steered_row_that_is_not_finite_is_marked_and_its_neighbours_go_on() -> None:
    logits, draws = logits_for(3), [draw(params(**SETTINGS["repetition_penalty"]), handle=h) for h in range(3)]
    before = Sampler().choose(logits, draws).tolist()
    logits[1, 4] = float("nan")
    assert Sampler().choose(logits, draws).tolist() == [before[0], BAD_ROW, before[2]]


EXTREMES: list[dict[str, Any]] = [
    {"repetition_penalty": 1e-38},
    {"repetition_penalty": 1e-45},
    {"repetition_penalty": 1e38},
    {"frequency_penalty": 3e38},
    {"frequency_penalty": -3e38},
    {"presence_penalty": 3e38},
    {"presence_penalty": -3e38, "frequency_penalty": -3e38},
    {"logit_bias": tuple((token, -3e38) for token in range(VOCAB)), "presence_penalty": 3e38},
    {"repetition_penalty": 1e-38, "logit_bias": ((1, 3e38),), "top_k": 3, "top_p": 0.9},
]


@pytest.mark.parametrize("temperature", [0.0, 1e-4, 1.0, 100.0])
def test_nothing_that_penalties_make_of_logits_becomes_a_token_beyond_the_vocabulary(temperature: float) -> None:
    """Even of what admission refuses."""
    draws = [draw(params(**wild, temperature=temperature), handle=at) for at, wild in enumerate(EXTREMES)]
    for seed in range(5):
        chosen = Sampler().choose(logits_for(len(draws), seed=seed) * 100, draws).tolist()
        assert all(BAD_ROW <= token < VOCAB for token in chosen)


@pytest.mark.parametrize("limit", [0.01, 100.0])
@pytest.mark.parametrize("scale", [1.0, 1e37])
def test_at_the_limits_of_the_repetition_penalty_every_row_has_a_token(limit: float, scale: float) -> None:
    draws = [draw(params(repetition_penalty=limit, temperature=1.0, seed=at), handle=at) for at in range(8)]
    assert all(0 <= token < VOCAB for token in Sampler().choose(logits_for(8) * scale, draws).tolist())


def test_only_penalties_and_structures_need_history() -> None:
    assert {name for name, changes in SETTINGS.items() if params(**changes).needs_history} == {
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    }
    assert params(structure=Structure(StructureKind.REGEX, "a")).needs_history


def test_the_likeliest_tokens_are_those_of_the_unmodified_distribution() -> None:
    wishes: list[dict[str, Any]] = [
        {"logprobs": True, "top_logprobs": 5},
        {},
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 20},
    ]
    draws = [
        draw(params(**wish, logit_bias=((0, 100.0),), presence_penalty=2.0), handle=at)
        for at, wish in enumerate(wishes)
    ]
    logits = logits_for(4)
    tokens = Sampler().choose(logits, draws)
    assert tokens.tolist() == [0, 0, 0, 0]
    found = scores(logits, tokens, draws)
    assert found[1] is None
    truth = logits.log_softmax(-1)
    for row in (0, 2, 3):
        score, count = found[row], wishes[row].get("top_logprobs", 0)
        assert score is not None
        assert score.logprob == pytest.approx(truth[row, 0].item(), abs=1e-5)
        best = truth[row].topk(count)
        assert [token for token, _ in score.top] == best.indices.tolist()
        assert [logprob for _, logprob in score.top] == pytest.approx(best.values.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-38}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty"),
        ({"logit_bias": ((VOCAB, 1.0),)}, f"token id {VOCAB} is outside the vocabulary of {VOCAB}"),
        ({"logit_bias": ((1, float("nan")),)}, "logit_bias"),
        ({"logit_bias": ((1, 1e38),)}, "logit_bias"),
        ({"presence_penalty": -1e300}, "presence_penalty"),
        ({"logit_bias": ((1, 1.0), (1, 2.0))}, "twice"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 1, "stop_token_ids": tuple(range(VOCAB))}, "every token"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ],
)
def test_a_parameter_that_cannot_be_is_refused_by_name(wrong: dict[str, Any], said: str) -> None:
    fault = refusal(Request(5, (1, 2), replace(params(max_tokens=4), **wrong)), INFO)
    assert fault is not None
    assert (fault.handle, fault.code) == (5, "bad_request")
    assert said in fault.message


def test_every_parameter_is_tried_here_or_named() -> None:
    tried = {name for changes in SETTINGS.values() for name in changes}
    elsewhere = {"max_tokens", "seed", "stop_token_ids", "ignore_eos", "logprobs", "top_logprobs", "structure"}
    assert {field.name for field in fields(SamplingParams)} == tried | elsewhere

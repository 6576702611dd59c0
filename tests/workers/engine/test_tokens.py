"""Greedy float32 tokens are those of transformers' generate(): batched, chunked, preempted, and on two ranks."""

from pathlib import Path

import pytest

from hortator.workers.engine.step import Finish
from tests.workers.engine.checkpoints import ARCHITECTURES, EOS, MAX_MODEL_LEN, Checkpoint, mixed_requests
from tests.workers.engine.drive import TIGHT, Outcome, build, run
from tests.workers.engine.pair import PairResult, run_pair
from tests.workers.engine.ways import ways_of_sampling

REQUESTS = mixed_requests()


def mismatches(checkpoint: Checkpoint, outcome: Outcome) -> list[int]:
    return [
        request.handle
        for request in REQUESTS
        if tuple(outcome.tokens[request.handle]) != checkpoint.expected(request.prompt, request.sampling.max_tokens)
    ]


def test_64_staggered_requests_match_generate(checkpoint: Checkpoint) -> None:
    engine = build(checkpoint.path, **TIGHT)
    outcome = run(engine, REQUESTS, stagger=3)
    assert mismatches(checkpoint, outcome) == []
    assert engine.stats().preemptions > 0
    assert max(len(request.prompt) for request in REQUESTS) > TIGHT["max_num_batched_tokens"]


def test_64_requests_at_once_match_generate(checkpoint: Checkpoint) -> None:
    outcome = run(build(checkpoint.path), REQUESTS)
    assert mismatches(checkpoint, outcome) == []


def test_the_finish_says_whether_the_model_stopped(llama: Checkpoint) -> None:
    outcome = run(build(llama.path), REQUESTS)
    for request in REQUESTS:
        stopped = outcome.tokens[request.handle][-1] == EOS
        assert outcome.finished[request.handle] is (Finish.STOP if stopped else Finish.LENGTH)
    assert set(outcome.finished.values()) == {Finish.STOP, Finish.LENGTH}


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_request_may_fill_the_context_to_its_end(name: str, checkpoints: dict[str, Checkpoint]) -> None:
    request = mixed_requests(1, seed=5)[0]
    prompt = (request.prompt * MAX_MODEL_LEN)[: MAX_MODEL_LEN - 12]
    long = type(request)(0, prompt, type(request.sampling)(max_tokens=10_000, ignore_eos=True))
    outcome = run(build(checkpoints[name].path, max_num_batched_tokens=100), [long])
    assert len(outcome.tokens[0]) == 12
    assert outcome.finished == {0: Finish.LENGTH}
    expected = checkpoints[name].expected(prompt, 12)
    assert tuple(outcome.tokens[0])[: len(expected)] == expected


@pytest.fixture(scope="module")
def pair(
    checkpoints: dict[str, Checkpoint], speaking: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PairResult, PairResult]:
    paths = {name: checkpoints[name].path for name in ARCHITECTURES}
    return run_pair(paths, tmp_path_factory.mktemp("pair"), speaking=speaking)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_ranks_match_generate(
    name: str, checkpoints: dict[str, Checkpoint], pair: tuple[PairResult, PairResult]
) -> None:
    assert mismatches(checkpoints[name], pair[0].outcomes[name]) == []
    assert pair[0].preemptions[name] > 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_ranks_agree_on_every_step(name: str, pair: tuple[PairResult, PairResult]) -> None:
    first, second = (result.outcomes[name] for result in pair)
    assert first.digests == second.digests
    assert first.tokens == second.tokens
    assert first.finished == second.finished


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_rank_reads_and_holds_only_its_slices(
    name: str, checkpoints: dict[str, Checkpoint], pair: tuple[PairResult, PairResult]
) -> None:
    reference = checkpoints[name].reference()
    body = {n: p.numel() for n, p in reference.model.named_parameters()}
    cut = {n for n in body if "_proj" in n and not n.endswith("o_proj.bias")}
    per_rank = sum(size // 2 if n in cut else size for n, size in body.items())
    head = 0 if reference.config.tie_word_embeddings else reference.lm_head.weight.numel()
    assert [result.elements_read[name] for result in pair] == [per_rank + head, per_rank]
    assert all(result.wrong_slices[name] == [] for result in pair)


def test_a_bad_row_on_the_first_rank_is_a_fault_on_both(pair: tuple[PairResult, PairResult]) -> None:
    for result in pair:
        assert {handle: fault.code for handle, fault in result.outcomes["bad row"].faults.items()} == {3: "bad_logits"}
        assert set(result.outcomes["bad row"].finished) == set(range(8)) - {3}


def test_two_ranks_agree_on_every_way_of_sampling_and_choose_as_one_does(
    speaking: Path, pair: tuple[PairResult, PairResult]
) -> None:
    first, second = (result.outcomes["sampling"] for result in pair)
    assert (first.digests, first.tokens, first.finished) == (second.digests, second.tokens, second.finished)
    assert first.faults.keys() == second.faults.keys()
    alone = run(build(speaking), ways_of_sampling(greedy=True))
    assert (first.tokens, first.finished, first.faults) == (alone.tokens, alone.finished, alone.faults)

"""Greedy float32 tokens are those of transformers' generate(): batched, chunked, preempted, and on several ranks."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

from hortator.workers.engine.step import Finish, Request
from tests.workers.engine.checkpoints import (
    ARCHITECTURES,
    EOS,
    MAX_MODEL_LEN,
    Checkpoint,
    make_checkpoint,
    mixed_requests,
)
from tests.workers.engine.drive import TIGHT, Outcome, build, run
from tests.workers.engine.group import NUM_REQUESTS, WAYS, RankResult, run_groups
from tests.workers.engine.ways import ways_of_sampling

REQUESTS = mixed_requests()

pytestmark = pytest.mark.timeout(240)  # four processes on a busy machine


def mismatches(checkpoint: Checkpoint, outcome: Outcome, requests: list[Request] = REQUESTS) -> list[int]:
    return [
        request.handle
        for request in requests
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


@pytest.mark.parametrize(("name", "budget"), [("llama", 100), ("mistral", 100), ("gemma2", 300), ("mixtral", 300)])
def test_a_request_may_fill_the_context_to_its_end(name: str, budget: int, checkpoints: dict[str, Checkpoint]) -> None:
    request = mixed_requests(1, seed=5)[0]
    prompt = (request.prompt * MAX_MODEL_LEN)[: MAX_MODEL_LEN - 12]
    long = type(request)(0, prompt, type(request.sampling)(max_tokens=10_000, ignore_eos=True))
    outcome = run(build(checkpoints[name].path, max_num_batched_tokens=budget), [long])
    assert len(outcome.tokens[0]) == 12
    assert outcome.finished == {0: Finish.LENGTH}
    expected = checkpoints[name].expected(prompt, 12)
    assert tuple(outcome.tokens[0])[: len(expected)] == expected


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: str(rope["rope_type"]),
)
def test_rope_types_that_look_at_the_position_alone_match_generate(rope: dict[str, object], tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama", tmp_path, rope_parameters={"rope_theta": 1e4, **rope})
    outcome = run(build(checkpoint.path, **TIGHT), REQUESTS[:16], stagger=3)
    assert mismatches(checkpoint, outcome, REQUESTS[:16]) == []


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_may_be_stacked_in_the_checkpoint(
    name: str, checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    for file in ("config.json", "generation_config.json"):
        shutil.copy(checkpoints[name].path / file, tmp_path)
    stacked = {key: tensor.contiguous() for key, tensor in checkpoints[name].reference().state_dict().items()}
    assert stacked["model.layers.0.mlp.experts.gate_up_proj"].dim() == 3
    save_file(stacked, tmp_path / "model.safetensors")
    assert run(build(tmp_path), REQUESTS).tokens == run(build(checkpoints[name].path), REQUESTS).tokens


# Every architecture on two tensor parallel ranks, and in a pipeline, alone or with tensor parallel stages.
STAGED = {
    "1x2": ("qwen2", "qwen3", "mistral", "gemma3_text", "mixtral"),
    "2x2": ("llama", "gemma2", "phi3", "qwen3_moe"),
}
ROWS = [("2x1", name) for name in ARCHITECTURES] + [(shape, name) for shape in STAGED for name in STAGED[shape]]


@pytest.fixture(scope="module")
def groups(
    checkpoints: dict[str, Checkpoint], speaking: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[RankResult]]:
    """By shape: tensor x pipeline parallel sizes."""
    paths: dict[str, dict[str, Path]] = {shape: {} for shape, _ in ROWS}
    paths["2x2"][WAYS] = speaking
    for shape, name in ROWS:
        paths[shape][name] = checkpoints[name].path
    return run_groups(paths, tmp_path_factory.mktemp("groups"))


@pytest.fixture
def group(shape: str, groups: dict[str, list[RankResult]]) -> list[RankResult]:
    return groups[shape]


@pytest.mark.parametrize(("shape", "name"), ROWS)
def test_a_group_matches_generate(name: str, checkpoints: dict[str, Checkpoint], group: list[RankResult]) -> None:
    assert mismatches(checkpoints[name], group[0].outcomes[name], REQUESTS[:NUM_REQUESTS]) == []
    assert group[0].preemptions[name] > 0


@pytest.mark.parametrize(("shape", "name"), ROWS)
def test_ranks_agree_on_every_step(name: str, group: list[RankResult]) -> None:
    first, *others = (result.outcomes[name] for result in group)
    for other in others:
        assert first.digests == other.digests
        assert first.tokens == other.tokens
        assert first.finished == other.finished


@pytest.mark.parametrize(("shape", "name"), ROWS)
def test_a_rank_reads_and_holds_only_its_part(
    name: str, checkpoints: dict[str, Checkpoint], group: list[RankResult]
) -> None:
    assert [result.wrong_slices[name] for result in group] == [[] for _ in group]
    assert [result.elements_read[name] for result in group] == [result.elements_held[name] for result in group]
    reference = checkpoints[name].reference()
    whole = sum(parameter.numel() for parameter in reference.parameters())
    vocabulary = reference.lm_head.weight.numel()  # not cut, neither the embedding nor the head
    assert all(result.elements_held[name] < 0.6 * whole + 2 * vocabulary for result in group)


@pytest.mark.parametrize("shape", ["2x1", *STAGED])
def test_a_bad_row_on_the_rank_that_samples_is_a_fault_on_all(group: list[RankResult]) -> None:
    for result in group:
        assert {handle: fault.code for handle, fault in result.outcomes["bad row"].faults.items()} == {3: "bad_logits"}
        assert set(result.outcomes["bad row"].finished) == set(range(8)) - {3}


@pytest.mark.parametrize("shape", STAGED)
def test_what_a_stage_sends_arrives_though_the_next_step_overwrites_it(group: list[RankResult]) -> None:
    assert [result.arrived["ids"] for result in group] == [[5, 6, 7]] * len(group)
    received = [result.arrived["hidden"] for result in group if "hidden" in result.arrived]
    assert received == [[1.0, 2.0]] * (len(group) // 2)


@pytest.mark.parametrize("shape", ["2x2"])
def test_ranks_agree_on_every_way_of_sampling_and_choose_as_one_alone_does(
    group: list[RankResult], speaking: Path
) -> None:
    alone = run(build(speaking), ways_of_sampling(greedy=True))
    assert len({tuple(result.outcomes[WAYS].digests) for result in group}) == 1
    for result in group:
        outcome = result.outcomes[WAYS]
        assert (outcome.tokens, outcome.finished) == (alone.tokens, alone.finished)
        assert outcome.faults.keys() == alone.faults.keys()
    assert group[0].outcomes[WAYS].faults == alone.faults

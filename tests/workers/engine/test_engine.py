"""The engine through its seam: what others in the batch must not notice, and what a request is told."""

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from hortator.producer.errors import ConfigError
from hortator.workers.engine import sampler
from hortator.workers.engine.runner import TorchRunner
from hortator.workers.engine.step import Finish, Request, SamplingParams, StepPlan
from tests.workers.engine.checkpoints import EOS, MAX_MODEL_LEN, VOCAB, Checkpoint, mixed_requests
from tests.workers.engine.drive import TIGHT, Outcome, build, run, step

PROMPT = tuple(range(10, 30))
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
TIGHT_LEN = 160  # tokens of a pool as in TIGHT, and hence of a sequence
SEEDED = replace(GREEDY, temperature=1.2, top_p=0.95, top_k=100, seed=42)


def crowd() -> list[Request]:
    """Others, of every kind."""
    return [
        replace(r, handle=100 + r.handle, sampling=replace(r.sampling, temperature=r.handle % 3 / 2, seed=r.handle))
        for r in mixed_requests(12, seed=9)
    ]


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_tokens_do_not_depend_on_who_else_is_in_the_batch(sampling: SamplingParams, checkpoint: Checkpoint) -> None:
    request = Request(1, PROMPT, sampling)
    alone = run(build(checkpoint.path), [request]).tokens[1]
    crowded = run(build(checkpoint.path, **TIGHT), [*crowd()[:6], request, *crowd()[6:]], stagger=1).tokens[1]
    assert alone == crowded
    assert len(alone) == 12


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("accepted", [1, 5, 11])
def test_a_resumed_request_ends_as_if_never_interrupted(
    accepted: int, sampling: SamplingParams, llama: Checkpoint
) -> None:
    whole = run(build(llama.path), [Request(1, PROMPT, sampling)]).tokens[1]
    resumed = Request(1, PROMPT, sampling, generated=tuple(whole[:accepted]))
    assert run(build(llama.path), [*crowd(), resumed]).tokens[1] == whole[accepted:]


def test_different_seeds_give_different_tokens(llama: Checkpoint) -> None:
    requests = [Request(seed, PROMPT, replace(SEEDED, seed=seed)) for seed in range(8)]
    outcome = run(build(llama.path), requests)
    assert len({tuple(tokens) for tokens in outcome.tokens.values()}) == 8


@pytest.mark.parametrize(
    ("generated", "finish"), [((5,) * 12, Finish.LENGTH), ((5, EOS), Finish.STOP)], ids=["length", "stop"]
)
def test_a_complete_journal_finishes_without_a_token(
    generated: tuple[int, ...], finish: Finish, llama: Checkpoint
) -> None:
    request = Request(1, PROMPT, SamplingParams(max_tokens=12), generated=generated)
    outcome = run(build(llama.path), [request])
    step(engine := build(llama.path), outcome, admit=[request])
    assert outcome.finished == {1: finish}
    assert outcome.tokens == {}
    assert engine.idle


def test_a_stop_token_is_the_last_one_reported_even_with_ignore_eos(llama: Checkpoint) -> None:
    tokens = run(build(llama.path), [Request(1, PROMPT, GREEDY)]).tokens[1]
    stop = next(t for i, t in enumerate(tokens) if i >= 3 and t not in tokens[:i])
    stopping = replace(GREEDY, stop_token_ids=(stop, VOCAB - 1))
    outcome = run(build(llama.path), [Request(1, PROMPT, stopping)])
    assert outcome.tokens[1] == tokens[: tokens.index(stop) + 1]
    assert outcome.finished == {1: Finish.STOP}


def test_logprobs_are_those_of_the_model(llama: Checkpoint) -> None:
    outcome = run(build(llama.path), [Request(1, PROMPT, replace(SEEDED, logprobs=True)), Request(2, PROMPT, SEEDED)])
    tokens = outcome.tokens[1]
    with torch.inference_mode():
        logits = llama.reference()(torch.tensor([[*PROMPT, *tokens]])).logits[0]
    expected = logits.log_softmax(-1)[range(len(PROMPT) - 1, len(PROMPT) + 11), tokens].tolist()
    assert outcome.logprobs[1] == pytest.approx(expected, abs=1e-4)
    assert outcome.logprobs[2] == [None] * 12


def test_a_cancel_frees_all_blocks_in_the_same_step(llama: Checkpoint) -> None:
    engine, outcome = build(llama.path, max_num_batched_tokens=16), Outcome()
    step(engine, outcome, admit=[Request(h, PROMPT, GREEDY) for h in range(3)])
    step(engine, outcome)
    assert engine.stats().free_blocks < engine.stats().total_blocks
    step(engine, outcome, cancel=[0, 1, 2, 77])
    assert engine.idle
    assert engine.stats().free_blocks == engine.stats().total_blocks
    assert outcome.finished == {}


def test_a_leak_is_an_internal_error_when_idle(llama: Checkpoint) -> None:
    engine = build(llama.path)
    engine._scheduler.pool.take(1)
    engine.apply(StepPlan(0))
    with pytest.raises(RuntimeError, match="leaked"):
        engine.execute()


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        (Request(1, (3,) * TIGHT_LEN, GREEDY), "prompt_too_long", f"tokens; the limit is {TIGHT_LEN - 1}"),
        (Request(1, (), GREEDY), "bad_request", "no tokens"),
        (Request(1, (3, VOCAB), GREEDY), "bad_request", f"token id {VOCAB} at position 1 of the prompt"),
        (Request(1, (3, -1), GREEDY), "bad_request", "token id -1"),
        (Request(1, (3, 2**40), GREEDY), "bad_request", "outside the vocabulary"),
        (Request(1, (3,), GREEDY, generated=(VOCAB + 5,)), "bad_request", "journal"),
        (
            Request(1, (3,), replace(GREEDY, stop_token_ids=(5, 99_999))),
            "bad_request",
            f"stop_token_ids: token id 99999 is outside the vocabulary of {VOCAB}",
        ),
        (Request(1, (3,), replace(GREEDY, max_tokens=0)), "bad_request", "max_tokens"),
        (Request(1, (3,), replace(GREEDY, temperature=math.nan)), "bad_request", "temperature"),
        (Request(1, (3,), replace(GREEDY, top_p=0.0)), "bad_request", "top_p"),
        (Request(1, (3,), replace(GREEDY, top_k=-1)), "bad_request", "top_k"),
        (Request(1, (3,), replace(GREEDY, min_p=1.5)), "bad_request", "min_p"),
    ],
)
def test_a_request_that_can_never_run_is_a_fault_of_its_own(
    request_: Request, code: str, words: str, llama: Checkpoint
) -> None:
    fine = Request(2, PROMPT, GREEDY)
    outcome = run(build(llama.path, **TIGHT), [request_, fine])
    assert outcome.faults[1].code == code
    assert words in outcome.faults[1].message
    assert set(outcome.faults) == {1}
    assert tuple(outcome.tokens[2]) == tuple(run(build(llama.path), [fine]).tokens[2])


def test_the_largest_request_that_fits_the_pool_finishes(llama: Checkpoint) -> None:
    engine = build(llama.path, **TIGHT)
    largest = Request(1, (3,) * 100, replace(GREEDY, max_tokens=engine.info.kv_tokens - 100))
    outcome = run(engine, [largest, replace(largest, handle=2)])
    assert len(outcome.tokens[1]) == len(outcome.tokens[2]) == 60


def test_long_contexts_and_many_rows_that_fill_the_pool_are_preempted_and_end_as_in_a_large_one(
    llama: Checkpoint,
) -> None:
    """Two of them end where the model's context does; the pool holds no more than those."""
    requests = [
        Request(
            handle,
            tuple((7 * handle + 3 * n) % 250 + 1 for n in range(100 + 9 * handle)),
            replace(SEEDED if handle % 3 else GREEDY, seed=handle, max_tokens=120 if handle < 18 else 999),
        )
        for handle in range(20)
    ]
    large, small = (
        build(llama.path, kv_cache_bytes=size * MAX_MODEL_LEN * 512, max_num_batched_tokens=256) for size in (20, 2)
    )
    unbounded, outcome = run(large, requests), run(small, requests)
    assert large.stats().preemptions == 0
    assert small.stats().preemptions > 5
    assert outcome.tokens == unbounded.tokens
    assert outcome.finished == dict.fromkeys(range(20), Finish.LENGTH)
    assert len(outcome.tokens[19]) == MAX_MODEL_LEN - len(requests[19].prompt)
    assert small.stats().free_blocks == small.stats().total_blocks


def test_a_handle_admitted_twice_fails_that_handle_only(llama: Checkpoint) -> None:
    engine, outcome = build(llama.path), Outcome()
    step(engine, outcome, admit=[Request(1, PROMPT, GREEDY), Request(2, PROMPT, GREEDY)])
    step(engine, outcome, admit=[Request(1, PROMPT, GREEDY)])
    while not engine.idle:
        step(engine, outcome)
    assert outcome.faults[1].code == "bad_request"
    assert set(outcome.finished) == {2}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [0, 2])
def test_bad_logits_fail_one_request_and_nobody_sees_its_cache(bad: int, temperature: float, llama: Checkpoint) -> None:
    """The victim's keys and values are NaN as well; whoever gets its blocks, or is padded, must not read them."""
    requests = [Request(h, PROMPT[h : 5 + 2 * h], replace(GREEDY, temperature=temperature, seed=h)) for h in range(6)]
    healthy = run(build(llama.path, **TIGHT), requests).tokens
    engine, outcome = build(llama.path, **TIGHT), Outcome()
    step(engine, outcome, admit=requests)
    step(engine, outcome)
    victim = next(s for s in engine._scheduler.running if s.handle == bad)
    assert isinstance(engine._runner, TorchRunner)
    engine._runner._cache._storage[:, :, victim.blocks.tolist()] = math.nan
    while not engine.idle:
        step(engine, outcome)
    assert {handle: fault.code for handle, fault in outcome.faults.items()} == {bad: "bad_logits"}
    again = run(engine, [replace(request, handle=10 + request.handle) for request in requests])
    for handle in set(healthy) - {bad}:
        assert outcome.tokens[handle] == healthy[handle]
    assert again.faults == {}
    assert {handle - 10: tokens for handle, tokens in again.tokens.items()} == healthy


def test_a_token_beyond_the_vocabulary_fails_its_own_request(
    llama: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = sampler.Sampler.choose

    def broken(self: sampler.Sampler, logits: torch.Tensor, draws: Sequence[sampler.Draw]) -> torch.Tensor:
        bad = torch.tensor([draw.handle == 1 and draw.position == 3 for draw in draws])
        return torch.where(bad, VOCAB, choose(self, logits, draws))

    monkeypatch.setattr(sampler.Sampler, "choose", broken)
    outcome = run(build(llama.path), [Request(1, PROMPT, GREEDY), Request(2, PROMPT, GREEDY)])
    assert outcome.faults[1].code == "bad_logits"
    assert (len(outcome.tokens[1]), len(outcome.tokens[2])) == (3, 12)


def test_progress_moves_with_every_layer_and_by_the_same_in_every_step(llama: Checkpoint) -> None:
    engine, outcome, seen = build(llama.path), Outcome(), list[int]()
    for _ in range(3):
        before = engine.progress
        step(engine, outcome, admit=[] if outcome.digests else [Request(1, PROMPT, GREEDY)])
        seen.append(engine.progress - before)
    num_layers = 2
    assert seen == [num_layers + 2 + num_layers, num_layers + 2, num_layers + 2]


def test_an_empty_step_is_harmless(llama: Checkpoint) -> None:
    engine, outcome = build(llama.path), Outcome()
    step(engine, outcome)
    assert engine.idle
    assert len(outcome.digests) == 1


def test_info_tells_the_limits(llama: Checkpoint) -> None:
    info = build(llama.path, **TIGHT, max_model_len=150, max_num_seqs=7).info
    assert (info.max_num_seqs, info.max_model_len, info.vocab_size, info.kv_tokens) == (7, 150, VOCAB, 160)
    assert info.eos_token_ids == (EOS,)
    assert info.details["architecture"] == "LlamaForCausalLM"


def test_the_pool_is_no_larger_than_all_sequences_could_need(llama: Checkpoint) -> None:
    assert build(llama.path, kv_cache_bytes=None, max_num_seqs=3, max_model_len=100).info.kv_tokens == 304


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_model_len": MAX_MODEL_LEN + 1}, "is more than the 512 positions"),
        ({"kv_cache_bytes": 100}, r"kv_cache_bytes=100 .* 0 tokens .*: kv_cache_bytes=8192 is the least"),
        (
            {"kv_cache_bytes": 50_000, "max_model_len": 512},
            " 96 tokens .* less than one sequence of 512: kv_cache_bytes=262144 is .*, or lower max_model_len to 96",
        ),
        ({"max_model_len": 1}, "leaves no room"),
    ],
)
def test_limits_that_cannot_work_are_refused(changes: dict[str, object], words: str, llama: Checkpoint) -> None:
    with pytest.raises(ConfigError, match=words):
        build(llama.path, **changes)  # type: ignore[arg-type]


def test_what_the_refusal_names_works(llama: Checkpoint) -> None:
    assert build(llama.path, kv_cache_bytes=8192).info.kv_tokens == 16
    assert build(llama.path, kv_cache_bytes=262_144, max_model_len=512).info.max_model_len == 512
    assert build(llama.path, kv_cache_bytes=50_000, max_model_len=96).info.max_model_len == 96


def test_a_pool_smaller_than_the_model_s_context_clips_a_max_model_len_that_was_not_set(
    llama: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    engine = build(llama.path, kv_cache_bytes=50_000)
    assert (engine.info.kv_tokens, engine.info.max_model_len) == (96, 96)
    assert "max_model_len is 96, not the model's 512" in caplog.text
    outcome = run(engine, [Request(1, PROMPT, replace(GREEDY, max_tokens=256))])
    assert len(outcome.tokens[1]) == 96 - len(PROMPT)


def test_bfloat16_works(llama: Checkpoint) -> None:
    outcome = run(build(llama.path, dtype="bfloat16", **TIGHT), mixed_requests(10))
    assert len(outcome.finished) == 10


def test_a_single_rank_needs_neither_deepspeed_nor_a_process_group(llama: Checkpoint) -> None:
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from tests.workers.engine.drive import build, run\n"
        "from hortator.workers.engine.step import Request, SamplingParams\n"
        f"run(build(Path({str(llama.path)!r})), [Request(1, (5, 6), SamplingParams(max_tokens=3))])\n"
        "assert 'deepspeed' not in sys.modules\n"
        "assert not torch.distributed.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_greedy_rows_pay_for_an_argmax_only(llama: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    sample = sampler._sample

    def counting(logits: torch.Tensor, draws: list[sampler.Draw]) -> torch.Tensor:
        rows.append(len(draws))
        return sample(logits, draws)

    monkeypatch.setattr(sampler, "_sample", counting)
    run(build(llama.path), [Request(1, PROMPT, GREEDY), Request(2, PROMPT, SEEDED)])
    assert set(rows) == {1}

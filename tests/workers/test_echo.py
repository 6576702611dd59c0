"""The echo engine."""

import time

import pytest

from hortator.workers.engine.echo import EchoEngine
from hortator.workers.engine.step import Fault, Finish, Request, SamplingParams, StepOutput, StepPlan


def request(
    handle: int, text: bytes = b"abc", max_tokens: int = 5, *, generated: bytes = b"", **sampling: object
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
    return Request(handle, tuple(text), params, tuple(generated))


class Driver:
    """Steps an engine and collects what it says."""

    def __init__(self, engine: EchoEngine) -> None:
        self.engine = engine
        self.step_number = 0
        self.said: dict[int, bytes] = {}
        self.finished: dict[int, Finish] = {}
        self.faults: list[Fault] = []

    def step(self, *admit: Request, cancel: tuple[int, ...] = ()) -> StepOutput:
        self.step_number += 1
        self.engine.apply(StepPlan(self.step_number, admit, cancel))
        output = self.engine.execute()
        for token in output.tokens:
            self.said[token.handle] = self.said.get(token.handle, b"") + bytes([token.token_id])
        self.finished |= dict(output.finished)
        self.faults += output.faults
        return output

    def run(self, *admit: Request) -> "Driver":
        self.step(*admit)
        while not self.engine.idle:
            self.step()
        return self


def test_it_answers_with_the_prompt_over_and_over_until_max_tokens() -> None:
    driver = Driver(EchoEngine()).run(request(1, b"abc", 7), request(2, b"x", 2))
    assert driver.said == {1: b"abcabca", 2: b"xx"}
    assert driver.finished == {1: Finish.LENGTH, 2: Finish.LENGTH}


def test_it_speaks_all_at_once_or_a_few_tokens_a_step() -> None:
    assert Driver(EchoEngine()).run(request(1)).step_number == 1
    slow = Driver(EchoEngine(tokens_per_step=2)).run(request(1))
    assert (slow.step_number, slow.said) == (3, {1: b"abcab"})


def test_it_goes_on_after_the_journal_and_does_not_repeat_it() -> None:
    driver = Driver(EchoEngine()).run(request(1, b"abc", 7, generated=b"abca"))
    assert driver.said == {1: b"bca"}


def test_a_journal_that_is_already_complete_ends_at_once() -> None:
    driver = Driver(EchoEngine()).run(request(1, b"abc", 3, generated=b"abc"))
    assert (driver.said, driver.finished) == ({}, {1: Finish.LENGTH})


def test_a_stop_token_is_the_last_one() -> None:
    driver = Driver(EchoEngine()).run(request(1, stop_token_ids=(ord("b"),)))
    assert (driver.said, driver.finished) == ({1: b"ab"}, {1: Finish.STOP})


def test_no_more_than_max_num_seqs_run_and_the_others_follow_in_order() -> None:
    driver = Driver(EchoEngine(max_num_seqs=2, tokens_per_step=1))
    driver.step(*(request(handle, max_tokens=2) for handle in (1, 2, 3)))
    stats = driver.engine.stats()
    assert (stats.running, stats.waiting, stats.free_blocks) == (2, 1, 0)
    assert sorted(driver.said) == [1, 2]
    driver.run()
    assert len(driver.finished) == 3


def test_a_cancelled_job_says_nothing_more_wherever_it_is() -> None:
    driver = Driver(EchoEngine(max_num_seqs=1, tokens_per_step=1))
    driver.step(request(1, max_tokens=9), request(2))
    driver.step(cancel=(1, 2, 99))
    assert driver.engine.idle
    assert (driver.said, driver.finished) == ({1: b"a"}, {})


def test_a_bad_request_is_a_fault_of_its_own_and_harms_nobody() -> None:
    driver = Driver(EchoEngine(max_model_len=10)).run(request(1, b""), request(2, b"x" * 10), request(3))
    assert [(fault.handle, fault.code) for fault in driver.faults] == [(1, "bad_request"), (2, "prompt_too_long")]
    assert driver.said == {3: b"abcab"}


def test_the_context_ends_a_job_like_max_tokens() -> None:
    assert Driver(EchoEngine(max_model_len=5)).run(request(1, b"abc", 9)).said == {1: b"ab"}


def test_logprobs_come_only_if_asked_for() -> None:
    driver = Driver(EchoEngine())
    output = driver.step(request(1, max_tokens=1, logprobs=True), request(2, max_tokens=1))
    assert [token.logprob for token in output.tokens] == [0.0, None]


def test_the_latency_passes_before_the_first_token_without_burning_the_cpu() -> None:
    driver = Driver(EchoEngine(latency_s=0.1))
    started, cpu = time.monotonic(), time.process_time()
    driver.run(request(1), request(2))
    assert time.monotonic() - started >= 0.1
    assert time.process_time() - cpu < 0.05
    assert driver.said == {1: b"abcab", 2: b"abcab"}


def test_jobs_that_come_later_wait_for_their_own_latency() -> None:
    driver = Driver(EchoEngine(latency_s=0.05))
    started = time.monotonic()
    driver.step(request(1))
    while time.monotonic() - started < 0.03:
        driver.step()
    driver.run(request(2))
    assert time.monotonic() - started >= 0.08


@pytest.mark.parametrize("latency_s", [0.0, 0.002])
def test_ranks_that_apply_the_same_plans_have_the_same_digest(latency_s: float) -> None:
    engines = [EchoEngine(latency_s=latency_s) for _ in range(2)]
    plans = [StepPlan(1, (request(1),)), StepPlan(2), StepPlan(3, (request(2),), (1,))]
    for plan in plans:
        assert len({engine.apply(plan) for engine in engines}) == 1
        for engine in engines:
            engine.execute()


@pytest.mark.parametrize(
    "other",
    [
        StepPlan(2, (request(2),), (1,)),
        StepPlan(1, (request(3),), (1,)),
        StepPlan(1, (request(2, b"abd"),), (1,)),
        StepPlan(1, (request(2),)),
    ],
)
def test_another_plan_gives_another_digest(other: StepPlan) -> None:
    assert EchoEngine().apply(other) != EchoEngine().apply(StepPlan(1, (request(2),), (1,)))


def test_progress_moves_with_every_step() -> None:
    engine = EchoEngine()
    Driver(engine).run(request(1))
    assert engine.progress == 1

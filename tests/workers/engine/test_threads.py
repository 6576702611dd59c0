"""As few threads as take no longer."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hortator.workers.engine.attention import Paged
from hortator.workers.engine.model import LoadedModel
from hortator.workers.engine.parallel import SingleRank
from hortator.workers.engine.step import Request, SamplingParams
from hortator.workers.engine.threads import LONG_S, Threads, threads_by_trial
from tests.workers.engine.checkpoints import Checkpoint, mixed_requests
from tests.workers.engine.drive import TIGHT, build, run


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Steps:
    """What a step takes, in ms, by number of threads; the first one of all takes a second."""

    def __init__(self, **ms: float) -> None:
        self._ms = {int(threads.removeprefix("with_")): value for threads, value in ms.items()}
        self.now = 0.0
        self.taken = 0

    def __call__(self) -> None:
        self.now += self._ms[torch.get_num_threads()] / 1e3 if self.taken else 1.0
        self.taken += 1

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("ms", "few"),
    [
        ({"with_8": 10, "with_4": 10, "with_2": 10.5, "with_1": 11}, 1),
        ({"with_8": 10, "with_4": 9, "with_2": 12}, 4),
        ({"with_8": 10, "with_4": 12}, 8),
        ({"with_8": 1.01e3 * LONG_S}, 8),
    ],
)
def test_half_as_many_threads_as_long_as_they_take_no_longer(ms: dict[str, float], few: int) -> None:
    torch.set_num_threads(8)
    steps = Steps(**ms)
    found = threads_by_trial(steps, SingleRank(), num_rows=16, clock=steps.clock)
    assert found == Threads(few, most=8, small=32)
    assert torch.get_num_threads() == 8


def test_nothing_is_tried_where_there_is_one_thread() -> None:
    steps = Steps()
    assert threads_by_trial(steps, SingleRank(), num_rows=16, clock=steps.clock).few == 1
    assert steps.taken == 0


def test_ranks_try_and_agree_together_whatever_each_has() -> None:
    script = Path(__file__).with_name("thread_ranks.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=True)
    assert sorted(done.stdout.splitlines()) == ["rank 0: 1 of 2 in 22 steps", "rank 1: 3 of 6 in 22 steps"]


def test_small_steps_use_few_threads_and_long_prompts_all(llama: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(llama.path, max_num_seqs=2)
    engine._runner.threads = Threads(2, most=5, small=4)
    used, hidden = [], LoadedModel.hidden

    def spy(model: LoadedModel, inputs: torch.Tensor, positions: torch.Tensor, paged: Paged) -> torch.Tensor:
        used.append(torch.get_num_threads())
        return hidden(model, inputs, positions, paged)

    monkeypatch.setattr(LoadedModel, "hidden", spy)
    run(engine, [Request(0, tuple(range(10, 15)), SamplingParams(max_tokens=3, ignore_eos=True))])
    assert used == [5, 2, 2]


def test_an_engine_that_has_tried_says_what_it_found_and_answers_the_same(llama: Checkpoint) -> None:
    requests = mixed_requests(12)
    wanted = run(build(llama.path, **TIGHT), requests)
    torch.set_num_threads(2)
    engine = build(llama.path, **TIGHT)
    assert engine.info.details["threads"] in {"2", "1 (2 beyond 80 tokens a step)"}
    assert run(engine, requests).tokens == wanted.tokens

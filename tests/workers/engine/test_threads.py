"""As few threads as take no longer."""

import random
from collections.abc import Iterator

import pytest
import torch

from hortator.workers.engine.attention import Paged
from hortator.workers.engine.model import LoadedModel
from hortator.workers.engine.threads import LATER, PAIRS, SOON, Threads
from tests.workers.engine.checkpoints import Checkpoint, mixed_requests
from tests.workers.engine.drive import TIGHT, build, run

SMALL = 32


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Machine:
    """Steps that take so many ms, by number of threads; `used` are the threads of each."""

    def __init__(self, ms: dict[int, float], most: int = 8) -> None:
        torch.set_num_threads(most)
        self.ms = ms
        self.used: list[int] = []
        self._now = 0.0
        self._rng = random.Random(3)
        self.threads = Threads(small=SMALL, clock=lambda: self._now)

    def run(self, steps: int, *, num_tokens: int = SMALL, disturbed: float = 0.0) -> None:
        """`disturbed`: the share of steps that take ten times as long."""
        for _ in range(steps):
            assert self.threads.run(num_tokens, lambda: self._step(disturbed)) == "done"

    def _step(self, disturbed: float) -> str:
        self.used.append(torch.get_num_threads())
        self._now += self.ms[self.used[-1]] / 1e3 * (10 if self._rng.random() < disturbed else 1)
        return "done"


@pytest.mark.parametrize(
    ("ms", "few"),
    [
        ({8: 10, 4: 10, 2: 10.5, 1: 11}, 1),
        ({8: 10, 4: 9, 2: 12, 1: 24}, 4),
        ({8: 10, 4: 12, 2: 24, 1: 48}, 8),
    ],
)
def test_fewer_threads_as_long_as_they_take_no_longer(ms: dict[int, float], few: int) -> None:
    machine = Machine(ms)
    machine.run(4 * (SOON + 2 * PAIRS), disturbed=0.1)
    assert machine.threads.few == few
    machine.run(20 * (LATER + 2 * PAIRS), disturbed=0.1)
    assert machine.threads.few == few
    assert machine.used[-LATER:].count(few) >= LATER - PAIRS


def test_a_number_of_threads_that_is_no_power_of_two() -> None:
    machine = Machine({6: 10, 3: 10, 2: 10, 1: 30}, most=6)
    machine.run(3 * LATER)
    assert machine.threads.few == 3
    machine.ms = {6: 10, 3: 20, 2: 30, 1: 60}
    machine.run(3 * LATER)
    assert machine.threads.few == 6


def test_what_was_right_on_a_busy_machine_is_tried_again_and_again() -> None:
    idle, busy = {4: 10.0, 2: 20.0, 1: 40.0}, {4: 80.0, 2: 60.0, 1: 40.0}
    machine = Machine(busy, most=4)
    for ms, few in ((busy, 1), (idle, 4), (busy, 1)):
        machine.ms = ms
        machine.run(5 * LATER)
        assert machine.threads.few == few


def test_long_prompts_use_all_threads_and_are_not_compared() -> None:
    machine = Machine({8: 10, 4: 10, 2: 10, 1: 10})
    machine.run(10 * (SOON + 2 * PAIRS), num_tokens=SMALL + 1)
    assert set(machine.used) == {8}
    machine.run(SOON + 2 * PAIRS)
    assert machine.used[-1 - 2 * PAIRS :] == [8, *[8, 4] * PAIRS]


def test_trying_costs_little() -> None:
    machine = Machine({8: 10, 4: 20, 2: 40, 1: 80})
    machine.run(SOON + 2 * PAIRS)
    machine.used.clear()
    machine.run(10 * LATER)
    assert sum(machine.ms[threads] for threads in machine.used) < 1.01 * machine.ms[8] * len(machine.used)


def test_one_thread_is_one_thread() -> None:
    machine = Machine({1: 10}, most=1)
    machine.run(3 * LATER)
    assert set(machine.used) == {1}


def test_a_step_that_fails_says_so_and_is_not_compared() -> None:
    machine = Machine({8: 10, 4: 10, 2: 10, 1: 10})

    def fail() -> None:
        raise MemoryError

    for _ in range(2 * SOON):
        with pytest.raises(MemoryError):
            machine.threads.run(1, fail)
    machine.run(SOON)
    assert set(machine.used) == {8}


def test_an_engine_uses_them_says_how_many_and_answers_the_same(
    llama: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, used, hidden = mixed_requests(24), set[int](), LoadedModel.hidden
    wanted = run(build(llama.path, **TIGHT), requests)

    def spy(model: LoadedModel, inputs: torch.Tensor, positions: torch.Tensor, paged: Paged) -> torch.Tensor:
        used.add(torch.get_num_threads())
        return hidden(model, inputs, positions, paged)

    monkeypatch.setattr(LoadedModel, "hidden", spy)
    torch.set_num_threads(2)
    engine = build(llama.path, **TIGHT)
    assert run(engine, requests).tokens == wanted.tokens
    assert used == {1, 2}
    assert engine.stats().threads in used

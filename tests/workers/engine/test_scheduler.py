"""The scheduler against a pretended model and a pretended cache that notices every misuse."""

import random
from collections import deque
from dataclasses import dataclass, field
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hortator.workers.engine.blocks import BlockPool
from hortator.workers.engine.lines import LOOK_AHEAD
from hortator.workers.engine.scheduler import Batch, Row, Scheduler
from hortator.workers.engine.step import Finish, Request, SamplingParams


def next_token(tokens: list[int]) -> int:
    """The pretended model: depends on every token before."""
    return crc32(repr(tokens).encode()) % 50


def continuation(prompt: tuple[int, ...], limit: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < limit:
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@dataclass
class Harness:
    """Runs a scheduler; `slots` is the cache: of each slot, the tokens that what is written there depends on."""

    num_blocks: int = 8
    block_size: int = 4
    max_num_seqs: int = 4
    budget: int = 16
    depth: int = 0  # steps in flight
    waves: int = 1
    speculate: bool = False
    slots: dict[int, int] = field(default_factory=dict)
    known: dict[int, list[int]] = field(default_factory=dict)  # to the device: all tokens, those in flight too
    out: dict[int, list[int]] = field(default_factory=dict)
    finished: dict[int, Finish] = field(default_factory=dict)
    flying: deque[list[tuple[Row, int]]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(
            BlockPool(self.num_blocks, block_size=self.block_size),
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.budget,
            waves=self.waves,
            speculate=self.speculate,
        )

    def add(
        self, handle: int, prompt: tuple[int, ...], max_tokens: int, generated: tuple[int, ...] = (), **more: int
    ) -> None:
        request = Request(handle, prompt, SamplingParams(max_tokens=max_tokens), generated, **more)
        self.out[handle] = []
        self.known[handle] = list(prompt + generated)
        self.scheduler.add(request, limit=len(prompt) + max_tokens, stops=frozenset())

    @property
    def idle(self) -> bool:
        return self.scheduler.idle and not self.flying

    def step(self) -> Batch:
        batch = self.scheduler.schedule()
        self.check(batch)
        for row in batch.rows:
            self.write(row)
        chosen = [(row, self.choose(row)) for row in batch.rows if row.samples]
        for row in batch.rows:
            self.read(row)
        if batch.rows:
            self.flying.append(chosen)
        if len(self.flying) > self.depth or (self.flying and not batch.rows):
            for row, token in self.flying.popleft():
                self.accept(row, token)
        return batch

    def check(self, batch: Batch) -> None:
        assert batch.num_tokens <= self.budget
        assert len(self.scheduler.running) <= self.max_num_seqs
        handles = [row.sequence.handle for row in batch.rows]
        assert len(handles) == len(set(handles))
        owned = {block for sequence in self.scheduler.running for block in sequence.blocks}
        assert len(owned) == self.num_blocks - self.scheduler.pool.num_free
        assert bool(batch.rows or self.flying) == (not self.idle), "live requests, and nothing is scheduled"

    def write(self, row: Row) -> None:
        for position in range(row.start, row.context):
            self.slots[self.slot(row, position)] = self.content(row, position)

    def read(self, row: Row) -> None:
        for position in range(row.context):  # what attention would read
            seen = self.slots.get(self.slot(row, position))
            assert seen == self.content(row, position), "somebody else's keys and values"

    def choose(self, row: Row) -> int:
        tokens = self.known[row.sequence.handle]
        chosen = next_token(tokens[: row.context])
        if len(tokens) == row.context:
            tokens.append(chosen)
        return chosen

    def content(self, row: Row, position: int) -> int:
        tokens = self.known[row.sequence.handle][: position + 1]
        return crc32(repr((row.sequence.request.salt, tokens)).encode())

    def accept(self, row: Row, token: int) -> None:
        if row.sequence.ended:
            self.scheduler.accept(row, token)
            return
        self.out[row.sequence.handle].append(token)
        finish = self.scheduler.accept(row, token)
        if finish is not None:
            self.finished[row.sequence.handle] = finish

    def slot(self, row: Row, position: int) -> int:
        return row.sequence.blocks[position // self.block_size] * self.block_size + position % self.block_size

    def finish_all(self) -> int:
        steps = 0
        while not self.idle:
            self.step()
            steps += 1
            assert steps < 50_000
        self.scheduler.pool.check_all_free()
        return steps


sizes = st.tuples(st.integers(1, 24), st.integers(1, 24))


modes = st.sampled_from([(0, 1, False), (1, 1, True), (1, 2, False), (3, 4, False)])  # depth, waves, speculate


def some_prompt(rng: random.Random, length: int) -> tuple[int, ...]:
    """Prompts that often share a beginning."""
    return tuple([7] * rng.randrange(length + 1) + [rng.randrange(3) for _ in range(length)])[:length]


@settings(max_examples=200)
@given(
    requests=st.lists(sizes, min_size=1, max_size=20),
    block_size=st.integers(1, 5),
    spare_blocks=st.integers(0, 12),
    max_num_seqs=st.integers(1, 8),
    budget=st.integers(1, 30),
    mode=modes,
    seed=st.integers(0, 1000),
)
def test_everything_finishes_right_whatever_the_pool_the_budget_and_the_steps_in_flight(
    requests: list[tuple[int, int]],
    block_size: int,
    spare_blocks: int,
    max_num_seqs: int,
    budget: int,
    mode: tuple[int, int, bool],
    seed: int,
) -> None:
    rng = random.Random(seed)
    largest = max(-(-(prompt + output) // block_size) for prompt, output in requests)
    depth, waves, speculate = mode
    harness = Harness(largest + spare_blocks, block_size, max_num_seqs, budget, depth, waves, speculate)
    wanted = {}
    for handle, (num_prompt, max_tokens) in enumerate(requests):
        prompt = some_prompt(rng, num_prompt)
        wanted[handle] = continuation(prompt, num_prompt + max_tokens)
        harness.add(handle, prompt, max_tokens, priority=rng.randrange(3), salt=rng.randrange(2))
        for _ in range(rng.randrange(3)):
            if not harness.idle:
                harness.step()
    harness.finish_all()
    assert harness.out == wanted


@settings(max_examples=80)
@given(requests=st.lists(sizes, min_size=1, max_size=12), mode=modes, seed=st.integers(0, 1000))
def test_cancels_at_any_moment_leak_nothing_and_harm_nobody(
    requests: list[tuple[int, int]], mode: tuple[int, int, bool], seed: int
) -> None:
    rng = random.Random(seed)
    depth, waves, speculate = mode
    harness, wanted = Harness(num_blocks=14, depth=depth, waves=waves, speculate=speculate), {}
    for handle, (num_prompt, max_tokens) in enumerate(requests):
        prompt = some_prompt(rng, num_prompt)
        wanted[handle] = continuation(prompt, num_prompt + max_tokens)
        harness.add(handle, prompt, max_tokens)
    cancelled = set()
    while not harness.idle:
        harness.step()
        if rng.random() < 0.2:
            victim = rng.randrange(len(requests))
            harness.scheduler.drop(victim)
            cancelled.add(victim)
    harness.scheduler.pool.check_all_free()
    for handle, tokens in wanted.items():
        got = harness.out[handle]
        assert got == (tokens[: len(got)] if handle in cancelled else tokens)


def test_equal_calls_give_equal_digests_and_a_different_token_does_not() -> None:
    def digests(prompt: tuple[int, ...]) -> list[int]:
        harness, digest, found = Harness(), 0, []
        harness.add(1, prompt, 8)
        harness.add(2, (5,) * 20, 8)
        while not harness.idle:
            digest = harness.step().digest(digest)
            found.append(digest)
        return found

    assert digests((1, 2, 3)) == digests((1, 2, 3))
    assert digests((1, 2, 3))[0] != digests((1, 2, 4))[0]
    assert digests((1, 2, 3))[-1] != digests((1, 2, 4))[-1]
    assert all(0 <= digest < 2**63 for digest in digests((1, 2, 3)))


def test_decodes_come_first_and_a_long_prompt_takes_what_is_left() -> None:
    harness = Harness(num_blocks=64, budget=10)
    harness.add(1, (1,) * 4, 20)
    harness.step()
    harness.add(2, (2,) * 25, 5)
    shapes = [[(row.sequence.handle, row.count) for row in harness.step().rows] for _ in range(4)]
    assert shapes == [[(1, 1), (2, 9)], [(1, 1), (2, 9)], [(1, 1), (2, 7)], [(1, 1), (2, 1)]]


def test_the_youngest_is_preempted_and_keeps_its_tokens() -> None:
    harness = Harness(num_blocks=6, block_size=2, budget=32)
    harness.add(1, (1, 2, 3), 9)
    harness.add(2, (4, 5, 6), 9)
    while not harness.scheduler.preemptions:
        harness.step()
    assert [s.handle for s in harness.scheduler.running] == [1]
    assert [s.handle for s in harness.scheduler.waiting] == [2]
    assert harness.scheduler.waiting[0].tokens.tolist()[3:] == harness.out[2]
    harness.finish_all()
    assert harness.out == {1: continuation((1, 2, 3), 12), 2: continuation((4, 5, 6), 12)}


def test_requests_are_admitted_in_order_of_arrival() -> None:
    harness = Harness(num_blocks=8, block_size=4)
    harness.add(1, (1,) * 12, 4)
    harness.add(2, (2,) * 24, 4)  # does not fit beside the first
    harness.add(3, (3,) * 2, 1)  # would, but it is not its turn
    assert [row.sequence.handle for row in harness.step().rows] == [1]


def test_more_sequences_than_the_budget_has_tokens_all_finish() -> None:
    harness = Harness(num_blocks=64, max_num_seqs=50, budget=3)
    for handle in range(8):
        harness.add(handle, (handle,) * 5, 4)
    harness.finish_all()
    assert all(len(tokens) == 4 for tokens in harness.out.values())


@pytest.mark.parametrize(("generated", "finish"), [((9, 7), Finish.STOP), ((9, 8, 6), Finish.LENGTH)])
def test_a_journal_that_is_complete_needs_no_step(generated: tuple[int, ...], finish: Finish) -> None:
    harness = Harness()
    request = Request(1, (1, 2), SamplingParams(max_tokens=3), generated)
    assert harness.scheduler.add(request, limit=5, stops=frozenset({7})) is finish
    assert harness.scheduler.idle


def test_a_prefix_that_is_cached_is_not_computed_again() -> None:
    harness = Harness(num_blocks=64, budget=64)
    harness.add(1, (5,) * 22, 3)
    harness.finish_all()
    harness.add(2, (*(5,) * 18, 6, 6, 6), 3)
    assert [(row.start, row.count) for row in harness.step().rows] == [(16, 5)]
    assert harness.scheduler.num_cached_tokens == 16


def test_equal_prompts_of_one_step_share_their_blocks() -> None:
    harness = Harness(num_blocks=64, budget=64)
    for handle in range(3):
        harness.add(handle, (5,) * 17, 2)
    assert [(row.start, row.count) for row in harness.step().rows] == [(0, 17), (16, 1), (16, 1)]
    harness.finish_all()


def test_a_prompt_of_another_salt_shares_nothing() -> None:
    harness = Harness(num_blocks=64, budget=64)
    harness.add(1, (5,) * 17, 2, salt=1)
    harness.add(2, (5,) * 17, 2, salt=2)
    assert [(row.start, row.count) for row in harness.step().rows] == [(0, 17), (0, 17)]


def test_what_was_retracted_is_computed_again() -> None:
    harness = Harness(num_blocks=64, budget=64)
    harness.add(1, (5,) * 17, 9)
    harness.step()
    harness.scheduler.retract(1)
    harness.add(2, (5,) * 17, 2)
    assert [(row.start, row.count) for row in harness.step().rows] == [(17, 1), (0, 17)]


def test_classes_are_admitted_by_weight_and_none_starves() -> None:
    harness = Harness(num_blocks=64, max_num_seqs=1)
    for handle in range(60):
        harness.add(handle, (1, 2), 1, priority=handle % 3)
    order = []
    while not harness.idle:
        order += [row.sequence.request.priority for row in harness.step().rows]
    assert [order[:26].count(c) for c in range(3)] == [16, 8, 2]


def test_the_nearest_deadline_of_a_class_is_admitted_first() -> None:
    harness = Harness(num_blocks=64, max_num_seqs=1)
    for handle, deadline_ms in enumerate((0, 900, 300, 600)):
        harness.add(handle, (1, 2), 1, deadline_ms=deadline_ms)
    order = []
    while not harness.idle:
        order += [row.sequence.handle for row in harness.step().rows]
    assert order == [2, 3, 1, 0]


def test_who_shares_a_cached_prefix_goes_first_but_nobody_is_passed_over_for_ever() -> None:
    harness = Harness(num_blocks=64, max_num_seqs=1, budget=64)
    harness.add(0, (5,) * 16, 1)
    harness.finish_all()
    harness.add(1, (9,) * 16, 1)
    for handle in range(2, 40):
        harness.add(handle, (5,) * 16, 1)
    order = []
    while not harness.idle:
        order += [row.sequence.handle for row in harness.step().rows]
    assert order.index(1) == LOOK_AHEAD


def test_nobody_of_a_class_is_passed_over_more_often_than_the_first() -> None:
    harness = Harness(num_blocks=64, max_num_seqs=1, budget=64)
    harness.add(0, (5,) * 16, 1)
    harness.finish_all()
    harness.add(1, (9,) * 16, 1)
    harness.add(2, (8,) * 16, 1)
    for handle in range(3, 60):
        harness.add(handle, (5,) * 16, 1)
    order = []
    while not harness.idle:
        order += [row.sequence.handle for row in harness.step().rows]
    assert order[LOOK_AHEAD : LOOK_AHEAD + 2] == [1, 2]


def crowded_out(waiting: int) -> Harness:
    """A standard job holds most of a pool; a batch job was preempted, or is too large to begin (`waiting`)."""
    harness = Harness(num_blocks=40, block_size=4, budget=256, max_num_seqs=8)
    harness.add(1, (1,) * 100, 56, priority=1)
    harness.add(2, (2,) * (80 if waiting else 44), 60, priority=2)
    while not (waiting or harness.scheduler.preemptions):
        harness.step()
    if waiting:
        harness.step()
    assert [s.handle for s in harness.scheduler.running] == [1]
    return harness


@pytest.mark.parametrize("waiting", [0, 1], ids=["preempted", "too large"])
def test_a_batch_job_without_room_does_not_lock_out_interactive_ones(waiting: int) -> None:
    harness = crowded_out(waiting)
    harness.add(3, (3,) * 4, 1, priority=2)  # of its own class, and behind it
    for handle in range(4, 20):  # by then it was the turn of all classes
        harness.add(handle, (handle,) * 4, 1, priority=0)
        harness.step()
        assert handle in harness.finished
    assert 1 not in harness.finished
    assert [s.handle for s in harness.scheduler.waiting] == [2, 3]


@pytest.mark.parametrize("waiting", [0, 1], ids=["preempted", "too large"])
def test_a_batch_job_without_room_is_next_once_only_those_who_went_past_it_are_in_its_way(waiting: int) -> None:
    harness = crowded_out(waiting)
    handle = 3
    while 2 not in {s.handle for s in harness.scheduler.running}:
        while len(harness.scheduler.waiting) < 8:
            harness.add(handle, (handle,) * 15, 8, priority=0)
            handle += 1
        harness.step()
        assert handle < 200, "it starves"
    assert 1 in harness.finished
    assert handle > 10
    harness.finish_all()
    assert harness.out[2] == continuation((2,) * (80 if waiting else 44), (80 if waiting else 44) + 60)


def test_a_decode_that_depends_on_its_tokens_sits_out_while_they_are_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(num_blocks=64, depth=1, speculate=True)
    harness.add(1, (1, 2), 4)
    shapes = [[(row.start, row.pending) for row in harness.step().rows] for _ in range(3)]
    assert shapes == [[(0, False)], [(2, True)], [(3, True)]]
    monkeypatch.setattr(SamplingParams, "needs_history", True)
    harness = Harness(num_blocks=64, depth=1, speculate=True)
    harness.add(1, (1, 2), 4)
    shapes = [[(row.start, row.pending) for row in harness.step().rows] for _ in range(3)]
    assert shapes == [[(0, False)], [], [(2, False)]]

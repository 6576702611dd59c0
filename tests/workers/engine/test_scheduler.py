"""The scheduler against a pretended model and a pretended cache that notices every misuse."""

import random
from dataclasses import dataclass, field
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hortator.workers.engine.blocks import BlockPool
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
    """Runs a scheduler; `slots` is the cache: what was last written in each slot."""

    num_blocks: int = 8
    block_size: int = 4
    max_num_seqs: int = 4
    budget: int = 16
    slots: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    out: dict[int, list[int]] = field(default_factory=dict)
    finished: dict[int, Finish] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(
            BlockPool(self.num_blocks, block_size=self.block_size),
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.budget,
        )

    def add(self, handle: int, prompt: tuple[int, ...], max_tokens: int, generated: tuple[int, ...] = ()) -> None:
        request = Request(handle, prompt, SamplingParams(max_tokens=max_tokens), generated)
        self.out[handle] = []
        self.scheduler.add(request, limit=len(prompt) + max_tokens, stops=frozenset())

    def step(self) -> Batch:
        batch = self.scheduler.schedule()
        self.check(batch)
        for row in batch.rows:
            self.compute(row)
        return batch

    def check(self, batch: Batch) -> None:
        assert batch.num_tokens <= self.budget
        assert len(self.scheduler.running) <= self.max_num_seqs
        handles = [row.sequence.handle for row in batch.rows]
        assert len(handles) == len(set(handles))
        owned = [block for sequence in self.scheduler.running for block in sequence.blocks]
        assert len(owned) == len(set(owned)) == self.num_blocks - self.scheduler.pool.num_free
        assert bool(batch.rows) == (not self.scheduler.idle), "live requests, and nothing is scheduled"

    def compute(self, row: Row) -> None:
        sequence = row.sequence
        for position, token in enumerate(row.tokens, start=row.start):
            self.slots[self.slot(row, position)] = (sequence.handle, position, token)
        for position in range(row.context):  # what attention would read
            seen = self.slots.get(self.slot(row, position))
            assert seen == (sequence.handle, position, sequence.tokens[position]), "somebody else's keys and values"
        chosen = next_token(sequence.tokens.tolist()) if row.samples else None
        finish = self.scheduler.advance(row, chosen)
        if chosen is not None:
            self.out[sequence.handle].append(chosen)
        if finish is not None:
            self.finished[sequence.handle] = finish

    def slot(self, row: Row, position: int) -> int:
        return row.sequence.blocks[position // self.block_size] * self.block_size + position % self.block_size

    def finish_all(self) -> int:
        steps = 0
        while not self.scheduler.idle:
            self.step()
            steps += 1
            assert steps < 50_000
        self.scheduler.pool.check_all_free()
        return steps


sizes = st.tuples(st.integers(1, 24), st.integers(1, 24))


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(sizes, min_size=1, max_size=20),
    block_size=st.integers(1, 5),
    spare_blocks=st.integers(0, 12),
    max_num_seqs=st.integers(1, 8),
    budget=st.integers(1, 30),
    seed=st.integers(0, 1000),
)
def test_everything_finishes_right_whatever_the_pool_and_the_budget(
    requests: list[tuple[int, int]], block_size: int, spare_blocks: int, max_num_seqs: int, budget: int, seed: int
) -> None:
    rng = random.Random(seed)
    largest = max(-(-(prompt + output) // block_size) for prompt, output in requests)
    harness = Harness(largest + spare_blocks, block_size, max_num_seqs, budget)
    wanted = {}
    for handle, (num_prompt, max_tokens) in enumerate(requests):
        prompt = tuple(rng.randrange(50) for _ in range(num_prompt))
        wanted[handle] = continuation(prompt, num_prompt + max_tokens)
        harness.add(handle, prompt, max_tokens)
        for _ in range(rng.randrange(3)):
            if not harness.scheduler.idle:
                harness.step()
    harness.finish_all()
    assert harness.out == wanted


@settings(max_examples=60, deadline=None)
@given(requests=st.lists(sizes, min_size=1, max_size=12), seed=st.integers(0, 1000))
def test_cancels_at_any_moment_leak_nothing_and_harm_nobody(requests: list[tuple[int, int]], seed: int) -> None:
    rng = random.Random(seed)
    harness, wanted = Harness(num_blocks=14, block_size=4), {}
    for handle, (num_prompt, max_tokens) in enumerate(requests):
        prompt = tuple(rng.randrange(50) for _ in range(num_prompt))
        wanted[handle] = continuation(prompt, num_prompt + max_tokens)
        harness.add(handle, prompt, max_tokens)
    cancelled = set()
    while not harness.scheduler.idle:
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
        while not harness.scheduler.idle:
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

"""Ownership of KV blocks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hortator.workers.engine.blocks import BlockPool


@given(st.integers(1, 40), st.lists(st.integers(1, 8), max_size=30))
def test_no_block_has_two_owners_and_all_come_back(num_blocks: int, wishes: list[int]) -> None:
    pool, held = BlockPool(num_blocks, block_size=4), list[list[int]]()
    for wish in wishes:
        if wish <= pool.num_free:
            held.append(pool.take(wish))
        elif held:
            pool.give_back(held.pop(0))
        flat = [block for blocks in held for block in blocks]
        assert len(flat) == len(set(flat)) == num_blocks - pool.num_free
        assert all(0 <= block < num_blocks for block in flat)
    for blocks in held:
        pool.give_back(blocks)
    pool.check_all_free()


def test_a_block_freed_twice_is_noticed() -> None:
    pool = BlockPool(4, block_size=4)
    blocks = pool.take(2)
    pool.give_back(blocks)
    with pytest.raises(RuntimeError, match="freed twice"):
        pool.give_back(blocks)


def test_a_leak_is_noticed() -> None:
    pool = BlockPool(4, block_size=4)
    pool.take(1)
    with pytest.raises(RuntimeError, match="leaked"):
        pool.check_all_free()


def test_taking_more_than_there_is_is_an_internal_error() -> None:
    with pytest.raises(RuntimeError, match="did not check"):
        BlockPool(4, block_size=4).take(5)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_blocks_are_counted_in_whole_ones(tokens: int, blocks: int) -> None:
    assert BlockPool(4, block_size=4).blocks_for(tokens) == blocks

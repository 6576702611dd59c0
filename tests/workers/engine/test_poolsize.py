"""The size of the KV pool, and what is said where it cannot be."""

from dataclasses import replace

import pytest

from hortator.producer.errors import ConfigError
from hortator.workers.engine.build import build_engine
from hortator.workers.engine.parallel import SingleRank
from hortator.workers.engine.poolsize import PoolSize, Room, size_pool
from tests.workers.engine.checkpoints import Checkpoint

GPU = Room(num_bytes=6000, spare_bytes=6000, device_bytes=1_000_000, kv_cache_bytes=None, gpu_memory_utilization=0.9)


def size(room: Room, *, model_len: int = 100, is_set: bool = True) -> PoolSize:
    return size_pool(
        room, SingleRank(), token_bytes=100, block_size=16, max_num_seqs=2, model_len=model_len, is_set=is_set
    )


def test_the_pool_holds_what_the_room_is_worth_and_no_more_than_all_sequences_need() -> None:
    assert size(replace(GPU, num_bytes=11_250)) == PoolSize(7, 100)
    assert size(replace(GPU, num_bytes=10**6)) == PoolSize(13, 100)


@pytest.mark.parametrize(
    ("room", "says"),
    [
        (GPU, "gpu_memory_utilization=0.9 leaves .* 48 tokens .*: gpu_memory_utilization=0.91 is the least"),
        (
            replace(GPU, spare_bytes=-200_000, num_bytes=0),
            "lower max_num_batched_tokens or max_num_seqs, use more",
        ),
        (
            replace(GPU, kv_cache_bytes=6000),
            "^kv_cache_bytes=6000 leaves .*: kv_cache_bytes=11200 is the least",
        ),
        (replace(GPU, device_bytes=0), r"^the default kv_cache_bytes \(a fifth .*: kv_cache_bytes=11200 is the least"),
    ],
)
def test_a_pool_without_room_for_one_sequence_names_the_setting_and_the_least_that_works(room: Room, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        size(room)


def test_a_length_that_nobody_asked_for_is_what_the_pool_holds() -> None:
    assert size(GPU, is_set=False) == PoolSize(3, 48)
    with pytest.raises(ConfigError, match="less than one sequence of 2: "):
        size(replace(GPU, num_bytes=1500), is_set=False)


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens", "block_size"])
def test_limits_below_one_are_refused_by_name(llama: Checkpoint, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        build_engine(model_path=llama.path, mesh=SingleRank(), **{name: 0})  # type: ignore[arg-type]

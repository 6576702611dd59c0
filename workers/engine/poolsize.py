"""How many KV blocks every rank gets, and how long a sequence those hold.

One sequence must fit, as in topology/memory.py, which counts the same before the start.
"""

import logging
import math
from dataclasses import dataclass

import psutil
import torch

from hortator.producer.errors import ConfigError

from .parallel import Ranks, agree_on_minimum

CPU_FRACTION = 0.2  # of the host's available memory, shared by the ranks of this host

log = logging.getLogger("hortator.engine")


@dataclass(frozen=True, slots=True)
class Room:
    """The memory that a rank has for its pool, and which setting says so."""

    num_bytes: int
    spare_bytes: int  # beside the weights and what a step needs; below 0: not even these fit
    device_bytes: int
    kv_cache_bytes: int | None
    gpu_memory_utilization: float

    @classmethod
    def of(cls, ranks: Ranks, work_bytes: int, *, kv_cache_bytes: int | None, gpu_memory_utilization: float) -> "Room":
        """As it is once the weights are loaded; `work_bytes` is what the largest step needs."""
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info(ranks.device)
            spare = int(total * gpu_memory_utilization) - (total - free) - work_bytes
        else:
            # Ranks of one host cannot be told from those of others here, so all are taken to share this one.
            total = 0
            spare = int(psutil.virtual_memory().available * CPU_FRACTION) // ranks.world_size
        return cls(kv_cache_bytes or max(0, spare), spare, total, kv_cache_bytes, gpu_memory_utilization)

    @property
    def setting(self) -> str:
        """What decides."""
        if self.kv_cache_bytes:
            return f"kv_cache_bytes={self.kv_cache_bytes}"
        if self.device_bytes:
            return f"gpu_memory_utilization={self.gpu_memory_utilization:g}"
        return f"the default kv_cache_bytes (a fifth of the available memory, shared by the ranks: {self.num_bytes})"

    @property
    def smaller(self) -> str:
        """What to lower where the memory is not there after all."""
        if self.kv_cache_bytes and self.spare_bytes < self.kv_cache_bytes:
            return f"{self.setting} to {max(0, self.spare_bytes)} or less"
        return self.setting

    def percent_for(self, num_bytes: int) -> int:
        """The gpu_memory_utilization, in hundredths, that gives so much to the pool."""
        lacking = (num_bytes - self.spare_bytes) / self.device_bytes if self.device_bytes else 0.0
        return math.ceil(100 * (self.gpu_memory_utilization + lacking))


@dataclass(frozen=True, slots=True)
class PoolSize:
    """The same on all ranks."""

    num_blocks: int
    max_model_len: int


def size_pool(
    room: Room, ranks: Ranks, *, token_bytes: int, block_size: int, max_num_seqs: int, model_len: int, is_set: bool
) -> PoolSize:
    """What the poorest rank can afford, and no more than all sequences could need.  Collective.

    A pool that does not hold `model_len` tokens is refused if they were asked for (`is_set`); else sequences may be as
    long as it is.
    """
    most = -(-max_num_seqs * model_len // block_size)
    blocks = agree_on_minimum(min(room.num_bytes // (token_bytes * block_size), most), ranks)
    held = blocks * block_size
    shortest = model_len if is_set else 2  # a prompt's token and a new one
    if held < shortest:
        raise ConfigError(_refusal(room, ranks, held, shortest, -(-shortest // block_size) * block_size * token_bytes))
    if held < model_len:
        log.warning(
            "max_model_len is %d, not the model's %d: the KV pool holds no more (%s)",
            held,
            model_len,
            room.setting,
        )
    return PoolSize(blocks, min(model_len, held))


def _refusal(room: Room, ranks: Ranks, held: int, wanted: int, num_bytes: int) -> str:
    """Names what the rank that needs most would have to get."""
    least = -agree_on_minimum(-num_bytes, ranks)
    percent = -agree_on_minimum(-room.percent_for(num_bytes), ranks)
    by_utilization = not room.kv_cache_bytes and room.device_bytes
    if by_utilization and percent > 100:
        cures = ["lower max_num_batched_tokens or max_num_seqs", "use more ranks"]
    else:
        cures = [f"gpu_memory_utilization={percent / 100:g}" if by_utilization else f"kv_cache_bytes={least}"]
        cures[0] += " is the least that works"
    if held >= 2:
        cures.append(f"or lower max_model_len to {held}")
    return (
        f"{room.setting} leaves the KV pool {held} tokens on the rank with the fewest, less than one sequence of "
        f"{wanted}: {', '.join(cures)}"
    )

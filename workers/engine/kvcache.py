"""The memory of the paged KV cache: one tensor for all layers of this rank."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Ints = NDArray[np.int32]


def slots_of(blocks: Ints, at: NDArray[np.integer], block_size: int) -> Ints:
    """Where the tokens at these positions of a sequence that has these blocks are in the cache."""
    slots: Ints = (blocks[at // block_size] * block_size + at % block_size).astype(np.int32)
    return slots


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What one token needs on this rank."""

    num_layers: int
    num_kv_heads: int  # of this rank
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class PagedCache:
    """Keys and values as [layer, 2, block, slot in block, kv head, head_dim].

    One block more than the pool hands out: `null_block` pads the gathers of short rows.  It is never written, and a
    block is zeroed when it changes hands, so that a NaN of one request cannot reach another through padding (a masked
    position weighs zero, and zero times NaN is NaN).
    """

    def __init__(self, shape: CacheShape, *, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.null_block = num_blocks
        self._storage = torch.zeros(
            (shape.num_layers, 2, num_blocks + 1, block_size, shape.num_kv_heads, shape.head_dim),
            dtype=shape.dtype,
            device=device,
        )
        slots = self._storage.flatten(2, 3)  # [layer, 2, slot, kv head, head_dim]
        blocks = self._storage.flatten(3)  # [layer, 2, block, everything in it]
        self._slots = [(pair[0], pair[1]) for pair in slots]
        self._blocks = list(blocks)  # by layer
        self._tail = (shape.num_kv_heads, shape.head_dim)
        self._workspace = torch.empty(0, dtype=shape.dtype, device=device)

    def forget(self, blocks: torch.Tensor) -> None:
        """Zero these blocks in all layers."""
        self._storage.index_fill_(2, blocks, 0)

    def write(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store `key` and `value` [tokens, kv heads, head_dim] at `slots` [tokens]."""
        keys, values = self._slots[layer]
        keys.index_copy_(0, slots, key)
        values.index_copy_(0, slots, value)

    def shrink(self) -> None:
        """Let go of the workspace; the next gather makes another."""
        self._workspace = self._workspace.new_empty(0)

    def gather(self, layer: int, blocks: torch.Tensor, *, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of `blocks` [rows * width] as [rows, kv heads, width * block_size, head_dim].

        They are views of a workspace that the next gather overwrites: a fresh allocation of this size costs up to
        seven times the copy itself in page faults.
        """
        source = self._blocks[layer]
        size = 2 * len(blocks) * source.shape[2]
        if len(self._workspace) < size:
            self.shrink()  # before the larger one is there, not after
            self._workspace = self._workspace.new_empty(size + size // 4)
        keys, values = gathered = self._workspace[:size].view(2, len(blocks), source.shape[2])
        torch.index_select(source, 1, blocks, out=gathered)
        shape = (num_rows, -1, *self._tail)
        return keys.view(shape).transpose(1, 2), values.view(shape).transpose(1, 2)

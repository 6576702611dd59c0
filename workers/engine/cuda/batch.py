"""One step's rows as the kernels want them: int32 tensors that travel to the device in one copy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from hortator.workers.engine.kvcache import Ints, slots_of
from hortator.workers.engine.scheduler import Row

Array = TypeVar("Array", Ints, torch.Tensor)
_NONE = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class Decodes:
    """Rows of one token each, first in the batch.  Row i reads `contexts[i]` tokens of `pages[page_starts[i]:]`."""

    pages: torch.Tensor
    page_starts: torch.Tensor
    contexts: torch.Tensor
    splits: int


@dataclass(frozen=True, slots=True)
class Chunks:
    """Rows of several tokens, one behind the other.  `query_ends` and `key_ends` begin with a zero.  `key_places`: the
    block of each key, and its place there; None: the chunks have no past, and their own keys are all there is."""

    num_tokens: int
    query_ends: torch.Tensor
    key_ends: torch.Tensor
    max_queries: int
    max_keys: int
    key_places: tuple[torch.Tensor, torch.Tensor] | None


@dataclass(frozen=True, slots=True)
class Attended:
    """A step: of every token its position and its slot, and what it attends to: decodes first, then the chunks."""

    positions: torch.Tensor
    slots: torch.Tensor
    num_decodes: int
    decodes: Decodes | None
    chunks: tuple[Chunks, ...] = ()


class DecodeArrays(NamedTuple):
    """Of rows of one token each."""

    positions: Ints = _NONE
    slots: Ints = _NONE
    contexts: Ints = _NONE
    page_starts: Ints = _NONE
    pages: Ints = _NONE


class ChunkArrays(NamedTuple):
    """Of rows of several tokens; no `key_slots` if none has a past."""

    positions: Ints = _NONE
    slots: Ints = _NONE
    query_ends: Ints = _NONE
    key_ends: Ints = _NONE
    key_slots: Ints = _NONE


class Packed(NamedTuple, Generic[Array]):
    """All of one step that travels to the device, here or there: decodes, then prompts' beginnings, then later parts
    of prompts."""

    ids: Array
    sources: Array
    last: Array  # places of the tokens after which rows sample
    positions: Array
    slots: Array
    contexts: Array  # of the decodes, as the next two
    page_starts: Array
    pages: Array
    first_query_ends: Array
    first_key_ends: Array
    first_key_slots: Array
    later_query_ends: Array
    later_key_ends: Array
    later_key_slots: Array


def blocks_of(row: Row) -> Ints:
    """The row's block table."""
    return np.frombuffer(row.sequence.blocks, dtype=np.int32)


def decode_arrays(rows: Sequence[Row], block_size: int) -> DecodeArrays:
    """Of rows of one token each."""
    if not rows:
        return DecodeArrays()
    positions = np.fromiter((row.start for row in rows), np.int32, len(rows))
    counts = positions // block_size + 1
    starts = np.zeros(len(rows), np.int32)
    np.cumsum(counts[:-1], out=starts[1:])
    pages = np.concatenate([blocks_of(row)[:count] for row, count in zip(rows, counts, strict=True)])
    slots = pages[starts + counts - 1] * block_size + positions % block_size
    return DecodeArrays(positions, slots, positions + 1, starts, pages)


def chunk_arrays(rows: Sequence[Row], block_size: int) -> ChunkArrays:
    """Of rows of several tokens, of which all or none have a past."""
    if not rows:
        return ChunkArrays()
    spans = [np.arange(row.start, row.context) for row in rows]
    slots = np.concatenate([slots_of(blocks_of(row), at, block_size) for row, at in zip(rows, spans, strict=True)])
    key_slots = np.zeros(0, np.int32)
    if rows[0].start:
        key_slots = np.concatenate([slots_of(blocks_of(row), np.arange(row.context), block_size) for row in rows])
    query_ends = np.cumsum([0, *(row.count for row in rows)], dtype=np.int32)
    key_ends = np.cumsum([0, *(row.context for row in rows)], dtype=np.int32)
    return ChunkArrays(np.concatenate(spans).astype(np.int32), slots, query_ends, key_ends, key_slots)


def packed_to_device(arrays: Sequence[Ints], device: torch.device) -> list[torch.Tensor]:
    """All arrays in one copy, for which the host does not wait; the tensors are views of one.

    Each begins at a multiple of 16 bytes: Triton compiles a kernel anew for pointers that do not.
    """
    begins = np.cumsum([0, *(aligned(len(array)) for array in arrays)]).tolist()
    host = torch.empty(begins[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
    filled = host.numpy()
    for begin, array in zip(begins, arrays, strict=False):
        filled[begin : begin + len(array)] = array
    there = host.to(device, non_blocking=True)
    return [there[begin : begin + len(array)] for begin, array in zip(begins, arrays, strict=False)]


def aligned(count: int) -> int:
    """As many int32 as fill whole pieces of 16 bytes."""
    return -(-count // 4) * 4

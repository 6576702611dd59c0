"""Parts of a checkpoint's tensors, read straight into a rank's parameters.

A rank reads the bytes of its own slices (whole rows where a matrix is cut by columns) through a few small buffers,
page-locked when the device is a GPU.  So loading takes no more host memory than the parameters that stay there and
`NUM_READERS * BUFFER_BYTES`; a memory map would count every page that it touched until the shard is closed.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from queue import SimpleQueue
from typing import Self

import torch

from hortator.producer.errors import ConfigError

from .checkpoint import TensorEntry
from .parallel import Cut

NUM_READERS = 4  # threads: one alone is slower than the disk, and than the way to a GPU
BUFFER_BYTES = 4 << 20  # each
_STORED_AS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class Piece:
    """A contiguous run of a tensor's bytes: `rows` of `width` elements, of which `columns` are wanted."""

    offset: int  # elements from the tensor's begin
    rows: int
    width: int
    columns: tuple[slice, ...]


def pieces(shape: tuple[int, ...], cut: Cut, max_elements: int) -> Iterator[Piece]:
    """What to read of a tensor of this shape, in the order in which the slice holds it.

    A piece is as large as the buffer allows, and at least one row.
    """
    dim = cut.dim or 0
    outer, length, inner = prod(shape[:dim]), shape[dim] if shape else 1, prod(shape[dim + 1 :])
    ranges = cut.ranges if cut.dim is not None else (range(length),)
    if inner == 1 and outer > 1:
        columns = tuple(slice(r.start, r.stop) for r in ranges)
        for row, count in _batches(range(outer), max_elements // length):
            yield Piece(row * length, count, length, columns)
        return
    for index in range(outer):
        for wanted in ranges:
            for row, count in _batches(wanted, max_elements // inner):
                yield Piece((index * length + row) * inner, count, inner, (slice(None),))


def _batches(rows: range, size: int) -> Iterator[tuple[int, int]]:
    size = max(1, size)
    return ((row, min(size, rows.stop - row)) for row in range(rows.start, rows.stop, size))


class ShardReader:
    """Open shards and the buffers.  Use as a context."""

    def __init__(self, device: torch.device, *, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._stack = ExitStack()
        self._files: dict[Path, int] = {}
        self._pinned = device.type == "cuda"
        self._buffers: SimpleQueue[torch.Tensor] = SimpleQueue()
        for _ in range(NUM_READERS):
            self._buffers.put(self._allocate(buffer_bytes))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read_all(self, parts: Iterable[tuple[TensorEntry, Cut, torch.Tensor]]) -> None:
        """`read` each of them, several at a time."""
        with ThreadPoolExecutor(NUM_READERS) as pool:
            for done in [pool.submit(self.read, *part) for part in parts]:
                done.result()

    def read(self, entry: TensorEntry, cut: Cut, target: torch.Tensor) -> None:
        """Fill `target` (contiguous, of the slice's shape) from the checkpoint, converting to its type."""
        dtype = _dtype_of(entry)
        buffer = self._buffers.get()
        try:
            flat, done = target.view(-1), 0
            for piece in pieces(entry.shape, cut, buffer.numel() // dtype.itemsize):
                size = piece.rows * piece.width * dtype.itemsize
                if size > buffer.numel():  # a single row
                    buffer = self._allocate(size)
                self._fetch(entry, piece.offset * dtype.itemsize, buffer[:size])
                done += _place(buffer[:size].view(dtype).view(piece.rows, -1), piece.columns, flat[done:])
        finally:
            self._buffers.put(buffer)

    def _fetch(self, entry: TensorEntry, offset: int, into: torch.Tensor) -> None:
        room, position = into.numpy().data, entry.begin + offset
        while room:
            count = os.preadv(self._file(entry.file), [room], position)
            if count == 0:
                raise ConfigError(f"{entry.file} became shorter while it was read: download it again")
            room, position = room[count:], position + count

    def _file(self, path: Path) -> int:
        if path not in self._files:
            try:
                self._files[path] = self._stack.enter_context(path.open("rb", buffering=0)).fileno()
            except OSError as error:
                raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        return self._files[path]

    def _allocate(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)


def _place(rows: torch.Tensor, columns: tuple[slice, ...], target: torch.Tensor) -> int:
    """Copy the columns of `rows` to the beginning of the flat `target`; returns how many elements that were."""
    parts = [rows[:, wanted] for wanted in columns]
    widths = [part.shape[1] for part in parts]
    block = target[: len(rows) * sum(widths)].view(len(rows), sum(widths))
    for part, room in zip(parts, torch.split(block, widths, dim=1), strict=True):
        room.copy_(part)
    return block.numel()


def _dtype_of(entry: TensorEntry) -> torch.dtype:
    if entry.dtype not in _STORED_AS:
        raise ConfigError(
            f"{entry.file} holds tensors of type {entry.dtype}, which is not supported: use a checkpoint in "
            f"{', '.join(_STORED_AS)}"
        )
    return _STORED_AS[entry.dtype]

"""A directory of safetensors shards: which tensor lies where, checked before anything is loaded.  No torch."""

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from hortator.producer.errors import ConfigError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: `begin` and `end` are byte offsets in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the model directory."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}): download the file again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object: download the file again")
    return content


def read_entries(model_dir: Path) -> dict[str, TensorEntry]:
    """Every tensor of the checkpoint by name.  Reads only the shards' headers, and checks that each file is as long as
    its header says."""
    entries: dict[str, TensorEntry] = {}
    for shard in _shards(model_dir):
        entries.update(_read_header(shard))
    return entries


def _shards(model_dir: Path) -> list[Path]:
    if (model_dir / INDEX_FILE).is_file():
        names = read_json(model_dir / INDEX_FILE).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ConfigError(f"{model_dir / INDEX_FILE} has no weight_map: download the file again")
        if odd := [tensor for tensor, name in names.items() if not isinstance(name, str)]:
            raise ConfigError(f"{model_dir / INDEX_FILE} names no file for {odd[0]}: download the file again")
        return [_listed_shard(model_dir, name) for name in sorted(set(names.values()))]
    if os.path.lexists(model_dir / SINGLE_FILE):
        return [model_dir / SINGLE_FILE]
    if shards := sorted(model_dir.glob("*.safetensors")):
        return shards
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in model_dir.glob(pattern))
    if pickled:
        raise ConfigError(
            f"{model_dir} has only pickled weights ({pickled[0]}), which can run code when they are read: load the "
            f"model once with transformers on a machine you trust and save it with save_pretrained()"
        )
    raise ConfigError(f"{model_dir} has no weights: expected {SINGLE_FILE} or {INDEX_FILE} and its shards")


def _listed_shard(model_dir: Path, name: str) -> Path:
    if Path(name).name != name:
        raise ConfigError(f"{model_dir / INDEX_FILE} names a shard outside the directory: {name!r}")
    if not (model_dir / name).is_file():
        raise ConfigError(f"{model_dir} lacks the shard {name} that its index lists: download it again")
    return model_dir / name


def _read_header(shard: Path) -> dict[str, TensorEntry]:
    """The layout is an 8-byte little-endian length, a JSON header, the bytes.
    See https://huggingface.co/docs/safetensors/index#format"""
    raw, size = _header_bytes(shard)
    start = 8 + len(raw)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{shard} has a damaged header ({error!r}): download it again") from error
    if not isinstance(header, dict):
        raise ConfigError(f"{shard} has a damaged header (no JSON object): download it again")
    entries = {name: _entry(shard, name, said, start) for name, said in header.items() if name != "__metadata__"}
    promised = max((entry.end for entry in entries.values()), default=start)
    if promised != size:
        raise ConfigError(
            f"{shard} is truncated: its header promises {promised} bytes, it has {size}: download it again"
        )
    _check_apart(shard, entries.items())
    return entries


def _header_bytes(shard: Path) -> tuple[bytes, int]:
    """The header, and how long the file is."""
    try:
        size = shard.stat().st_size
        with shard.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise ConfigError(f"{shard} is truncated or no safetensors file ({size} bytes): download it again")
            return file.read(length), size
    except OSError as error:
        raise ConfigError(f"cannot read {shard}: {error.strerror}") from error


def _entry(shard: Path, name: str, said: Any, start: int) -> TensorEntry:
    """What the header says of one tensor; `start` is where the bytes begin."""
    values: Any = said if isinstance(said, dict) else {}
    dtype, shape, offsets = (values.get(key) for key in ("dtype", "shape", "data_offsets"))
    problem = None
    if not isinstance(dtype, str):
        problem = f"its dtype is {dtype!r}"
    elif not _are_sizes(shape):
        problem = f"its shape is {shape!r}"
    elif not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        problem = f"its data_offsets are {offsets!r}"
    elif dtype in _ITEM_BYTES and offsets[1] - offsets[0] != prod(shape) * _ITEM_BYTES[dtype]:
        problem = f"{offsets[1] - offsets[0]} bytes are not what {dtype} of {shape} takes"
    if problem:
        raise ConfigError(f"{shard} has a damaged header: tensor {name}: {problem[:200]}: download it again")
    return TensorEntry(shard, str(dtype), tuple(shape), start + offsets[0], start + offsets[1])


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_apart(shard: Path, entries: Iterable[tuple[str, TensorEntry]]) -> None:
    """No byte belongs to two tensors."""
    for (one, first), (other, second) in pairwise(sorted(entries, key=lambda item: (item[1].begin, item[1].end))):
        if second.begin < first.end:
            raise ConfigError(
                f"{shard} has a damaged header: tensors {one} and {other} overlap: download the file again"
            )

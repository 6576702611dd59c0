"""A directory of safetensors shards: which tensor lies where, checked before anything is loaded.  No torch."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hortator.producer.errors import ConfigError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


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
        return [_listed_shard(model_dir, str(name)) for name in sorted(set(names.values()))]
    if (model_dir / SINGLE_FILE).is_file():
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
    size = shard.stat().st_size
    with shard.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise ConfigError(f"{shard} is truncated or no safetensors file ({size} bytes): download it again")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        start = 8 + length
        entries = {
            name: TensorEntry(shard, t["dtype"], tuple(t["shape"]), *(start + o for o in t["data_offsets"]))
            for name, t in header.items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{shard} has a damaged header ({error!r}): download it again") from error
    promised = max((entry.end for entry in entries.values()), default=8 + length)
    if promised != size:
        raise ConfigError(
            f"{shard} is truncated: its header promises {promised} bytes, it has {size}: download it again"
        )
    return entries

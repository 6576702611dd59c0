"""What ranks compare before they serve together: the same model, number for number, and the same code.  No torch."""

import json
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path

import hortator

from .checkpoint import TensorEntry, read_entries, read_json

_SAMPLES = 8  # pieces read of each tensor
_SAMPLE_BYTES = 64


def fingerprint(model_dir: Path, *, dtype: str, weights: bool = True, **settings: object) -> dict[str, str]:
    """Facts that must be equal on all ranks, by name, so that a difference can be named.

    Weights are judged by every tensor's name, type and shape, and by `_SAMPLES` evenly spread pieces of its bytes: a
    few kilobytes of a large model, yet no two training runs or random seeds agree in them.  How the tensors are spread
    over files does not matter; without `weights` none are looked for.  `settings` are more facts that must be equal.
    """
    return {
        "config": _config(model_dir),
        "weights": _weights(read_entries(model_dir)) if weights else "none",
        "tokenizer": _tokenizer(model_dir / "tokenizer.json"),
        "dtype": dtype,
        "hortator": hortator.__version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
        **{name: str(value) for name, value in settings.items()},
    }


def _config(model_dir: Path) -> str:
    state = blake2b(digest_size=16)
    for name in ("config.json", "generation_config.json"):
        if name == "config.json" or (model_dir / name).is_file():
            state.update(json.dumps(read_json(model_dir / name), sort_keys=True).encode())
    return state.hexdigest()


def _tokenizer(file: Path) -> str:
    """The rank that samples reads its own for structured output, and may be on another host than the front."""
    return blake2b(file.read_bytes(), digest_size=16).hexdigest() if file.is_file() else "none"


def _weights(entries: dict[str, TensorEntry]) -> str:
    state = blake2b(digest_size=16)
    for name, entry in sorted(entries.items()):
        state.update(repr((name, entry.dtype, entry.shape)).encode())
        state.update(_samples(entry))
    return state.hexdigest()


def _samples(entry: TensorEntry) -> bytes:
    room = max(0, entry.end - entry.begin - _SAMPLE_BYTES)
    offsets = sorted({entry.begin + room * i // (_SAMPLES - 1) for i in range(_SAMPLES)})
    with entry.file.open("rb", buffering=0) as file:
        pieces = []
        for offset in offsets:
            file.seek(offset)
            pieces.append(file.read(min(_SAMPLE_BYTES, entry.end - offset)))
    return b"".join(pieces)

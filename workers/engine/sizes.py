"""Whether the numbers of a config.json are numbers that a model can have.  No torch."""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hortator.producer.errors import ConfigError

_LARGEST = 2**32
# Far beyond any model; the libraries make lists as long as these before anybody compares them with the weights.
_LIMITS = {"num_hidden_layers": 10_000, "vocab_size": 2**24}
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    *_LIMITS,
)
_ROPE_BASES = frozenset({"rope_theta", "rope_local_base_freq"})  # at the top, or in the table of a kind of layer
_DEPTH = 3  # of tables inside tables that are looked at
_LAYERS = "model.layers."


def check_sizes(config: Mapping[str, Any], where: Path) -> None:
    """All sizes that it has are positive integers, and all numbers finite; what is left out, or null, has a default."""
    for name in _SIZES:
        value, limit = config.get(name), _LIMITS.get(name, _LARGEST)
        if value is not None and (type(value) is not int or not 0 < value <= limit):
            raise ConfigError(
                f"cannot read {where}: {name} is {str(value)[:80]}, not a number from 1 to {limit}:"
                " use the model's own file"
            )
    for name, value in _numbers(config):
        if not math.isfinite(value) or (name in _ROPE_BASES and value <= 0):
            wanted = "a number above 0" if name in _ROPE_BASES else "a finite number"
            raise ConfigError(f"cannot read {where}: {name} is {value:g}, not {wanted}: use the model's own file")


def _numbers(config: Mapping[str, Any], depth: int = _DEPTH) -> Iterator[tuple[str, float]]:
    """Those of tables inside it, too: positions are turned by what stands there, and NaN makes every token nonsense."""
    for name, value in config.items():
        if isinstance(value, Mapping) and depth:
            yield from _numbers(value, depth - 1)
        elif isinstance(value, float):
            yield name, value
        elif name in _ROPE_BASES and isinstance(value, int):
            yield name, float(value) if abs(value) <= _LARGEST else math.inf


def check_token_ids(ids: object, where: Path, *, vocab_size: int) -> tuple[int, ...]:
    """The ids of one token, several or none (null)."""
    several = ids if isinstance(ids, list | tuple) else [] if ids is None else [ids]
    for token in several:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ConfigError(
                f"{where}: eos_token_id has {str(token)[:80]}, which is no token of the {vocab_size}: use the"
                " model's own file"
            )
    return tuple(several)


def check_num_layers(num_layers: int, tensors: Iterable[str], where: Path) -> None:
    """The checkpoint has as many: building a model takes time by the number that config.json gives."""
    numbers = (name.removeprefix(_LAYERS).partition(".")[0] for name in tensors if name.startswith(_LAYERS))
    found = max((int(number) + 1 for number in numbers if number.isascii() and number.isdecimal()), default=0)
    if found < num_layers:
        raise ConfigError(
            f"the checkpoint in {where} lacks layers: config.json names {num_layers}, it has {found}: it is"
            " incomplete or of another model than its config.json"
        )

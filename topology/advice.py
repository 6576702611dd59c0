"""What would fit where something does not: the settings to change, nearest first.  Pure."""

from collections.abc import Mapping
from itertools import islice
from typing import Any

from .errors import BadModel, DoesNotFit
from .fleet import ModelSpec
from .memory import affordable_tokens, dtype_of, fit, tensor_parallel_sizes
from .modelshape import ModelShape

MAX_STAGES = 16
_MIN_BLOCKS = 4  # a model that cannot take more is not worth starting

Change = Mapping[str, Any]


def changed(spec: ModelSpec, change: Change) -> ModelSpec:
    """The model with some settings changed."""
    return spec.model_copy(update=dict(change))


def worded(change: Change) -> str:
    """As in the fleet file."""
    return " and ".join(f"{k} left out" if v is None else f"{k}={v}" for k, v in change.items())


def fits(shape: ModelShape, spec: ModelSpec, gpu_bytes: int | None) -> bool:
    """Whether a group can run on GPUs that are all of this size."""
    try:
        fit(shape, spec, [gpu_bytes] * spec.world_size)
    except (BadModel, DoesNotFit):
        return False
    return True


def for_memory(shape: ModelShape, spec: ModelSpec, gpu_bytes: int | None, *, max_tp: int = 8) -> list[Change]:
    """Changes after which a group of `spec` fits GPUs of this size; `max_tp` is the number of GPUs in a host.
    Raises BadModel if the model cannot even be cut as `spec` says."""
    own = _own_pool(spec)
    candidates = [own, _shorter(shape, spec, gpu_bytes), _narrower(shape, spec)]
    if own and not fits(shape, changed(spec, own), gpu_bytes):
        candidates.insert(1, {**own, **_shorter(shape, changed(spec, own), gpu_bytes)})
    found = [change for change in candidates if change and fits(shape, changed(spec, change), gpu_bytes)]
    if found and own:
        return found
    sizes = group_sizes(shape, spec, max_tp=max_tp)
    larger = ({**own, **cut(spec, tp, pp)} for tp, pp in sizes if tp * pp > spec.world_size)
    return found + list(islice((change for change in larger if fits(shape, changed(spec, change), gpu_bytes)), 1))


def group_sizes(shape: ModelShape, spec: ModelSpec, *, max_tp: int) -> list[tuple[int, int]]:
    """(tp, pp) that cut the model, fewest ranks first; among equals those with fewer stages, which answer faster."""
    stages = range(1, min(shape.num_layers, max(MAX_STAGES, spec.pipeline_parallel_size)) + 1)
    pairs = [(tp, pp) for tp in tensor_parallel_sizes(shape) if tp <= max_tp for pp in stages]
    return sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[1]))


def cut(spec: ModelSpec, tp: int, pp: int) -> Change:
    """The change to groups of this size: only what differs."""
    change = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    return {name: value for name, value in change.items() if value != getattr(spec, name)}


def _own_pool(spec: ModelSpec) -> Change:
    """A pool as large as the memory allows, instead of the one that was asked for."""
    return {} if spec.kv_cache_bytes is None else {"kv_cache_bytes": None}


def _shorter(shape: ModelShape, spec: ModelSpec, gpu_bytes: int | None) -> Change:
    """The longest sequence that the pool would hold, in whole blocks."""
    tokens = affordable_tokens(shape, spec, gpu_bytes) or 0
    return {"max_model_len": tokens} if tokens >= _MIN_BLOCKS * spec.block_size else {}


def _narrower(shape: ModelShape, spec: ModelSpec) -> Change:
    return {"dtype": "bfloat16"} if dtype_of(shape, spec) == "float32" else {}


def listed(changes: list[Change]) -> str:
    """The end of a refusal."""
    if not changes:
        return "no setting fits: use GPUs with more memory"
    return "what fits: " + ", or ".join(worded(change) for change in changes)

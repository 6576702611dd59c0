"""What each rank of a group needs of its GPU's memory, what fits besides, and what would fit where something does not.

    weights     exact, for the families in modelshape: this stage's layers divided by the tensor parallel ranks; the
                embedding whole on each rank of the first stage; the final norm on the last; the head whole on the rank
                that samples (tied: the embedding serves, or a copy of it where that is on another stage)
    KV cache    blocks of `block_size` tokens and one spare, as many on every rank as the poorest can afford, and no
                more than max_num_seqs sequences of max_model_len could use
    workspace   what the engine sets aside for a step (workspace.py); on GPUs also a slack, and the CUDA context, an
                estimate

`gpu_memory_utilization` of a GPU's memory may be used.  Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import BadModel, DoesNotFit, TooManyStages
from .fleet import ModelSpec
from .modelshape import DTYPE_BYTES, ModelShape
from .stages import stage_layers
from .workspace import CUDA_SLACK_BYTES, step_bytes

CUDA_CONTEXT_BYTES = 600 << 20  # what a process has of a GPU before it allocates anything
_MAX_TENSOR_RANKS = 64


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes that one rank needs before any KV block, and for each token in the cache."""

    rank: int
    tp_rank: int
    pp_rank: int
    layers: range
    weight_bytes: int
    workspace_bytes: int
    token_bytes: int

    @property
    def fixed_bytes(self) -> int:
        return self.weight_bytes + self.workspace_bytes


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """What a group has room for.  `num_blocks` is None if it depends on memory that is not known."""

    ranks: tuple[RankMemory, ...]
    block_size: int
    max_model_len: int
    num_blocks: int | None
    max_sequences: int | None  # of max_model_len tokens, at the same time
    is_set: bool  # the pool's size, by kv_cache_bytes: it does not follow from the GPU's

    @property
    def kv_tokens(self) -> int | None:
        return None if self.num_blocks is None else self.num_blocks * self.block_size

    def kv_bytes(self, rank: RankMemory) -> int | None:
        """The rank's pool, with its spare block."""
        return None if self.num_blocks is None else (self.num_blocks + 1) * self.block_size * rank.token_bytes

    def least_bytes(self, rank: RankMemory) -> int:
        """What the rank cannot do without: weights, workspace, and a pool for one sequence or as large as it is set."""
        blocks = max(self.num_blocks or 0 if self.is_set else 0, -(-self.max_model_len // self.block_size))
        return rank.fixed_bytes + (blocks + 1) * self.block_size * rank.token_bytes

    def needed_bytes(self, rank: RankMemory) -> int:
        """With the pool that there will be; the least where that is not known."""
        pool = self.kv_bytes(rank)
        return self.least_bytes(rank) if pool is None else rank.fixed_bytes + pool


def dtype_of(shape: ModelShape, spec: ModelSpec) -> str:
    """The number format that the ranks will hold the weights in."""
    return shape.dtype if spec.dtype == "auto" else spec.dtype


def model_len_of(shape: ModelShape, spec: ModelSpec) -> int:
    """Tokens that a sequence may have.  Raises BadModel if the model has fewer positions."""
    if spec.max_model_len is not None and spec.max_model_len > shape.max_model_len:
        raise BadModel(
            f"{spec.name}: max_model_len={spec.max_model_len} is more than the {shape.max_model_len} positions of "
            f"{shape.source}: give at most {shape.max_model_len}"
        )
    return spec.max_model_len or shape.max_model_len


def rank_memories(shape: ModelShape, spec: ModelSpec) -> tuple[RankMemory, ...]:
    """One entry a rank, stage by stage.  Raises BadModel if the model cannot be cut that way."""
    tp_size, pp_size = spec.tensor_parallel_size, spec.pipeline_parallel_size
    _check_divides(shape, spec)
    item = DTYPE_BYTES[dtype_of(shape, spec)]
    return tuple(
        RankMemory(
            rank=pp_rank * tp_size + tp_rank,
            tp_rank=tp_rank,
            pp_rank=pp_rank,
            layers=layers,
            weight_bytes=item * _elements(shape, layers, tp_rank=tp_rank, tp_size=tp_size, pp_size=pp_size),
            workspace_bytes=_workspace(shape, spec),
            token_bytes=item * len(layers) * shape.kv_width // tp_size,
        )
        for pp_rank, layers in enumerate(_stages(shape, spec))
        for tp_rank in range(tp_size)
    )


def fit(shape: ModelShape, spec: ModelSpec, gpu_bytes: Sequence[int | None]) -> MemoryFit:
    """What a group has room for on GPUs of these sizes, one a rank (None: not known).

    Raises DoesNotFit, with the numbers, unless one sequence of max_model_len does; `advice` knows what would.
    """
    ranks = rank_memories(shape, spec)
    limit = model_len_of(shape, spec)
    blocks = _affordable_blocks(ranks, spec, gpu_bytes)
    if blocks is not None:
        blocks = min(blocks, -(-spec.max_num_seqs * limit // spec.block_size))
    sequences = None if blocks is None else min(spec.max_num_seqs, blocks // -(-limit // spec.block_size))
    found = MemoryFit(ranks, spec.block_size, limit, blocks, sequences, spec.kv_cache_bytes is not None)
    if problem := _problem(found, spec, gpu_bytes):
        raise DoesNotFit(problem)
    return found


def affordable_tokens(shape: ModelShape, spec: ModelSpec, gpu_bytes: int | None) -> int | None:
    """Tokens that a pool on GPUs of this size could hold, however many are wanted; None if that is not known."""
    ranks = rank_memories(shape, spec)
    blocks = _affordable_blocks(ranks, spec, [gpu_bytes] * len(ranks))
    return None if blocks is None else blocks * spec.block_size


def usable_bytes(gpu_bytes: int, spec: ModelSpec) -> int:
    """The part of a GPU's memory that its rank may use."""
    return int(gpu_bytes * spec.gpu_memory_utilization)


def tensor_parallel_sizes(shape: ModelShape) -> list[int]:
    """Tensor parallel sizes that cut the model into equal parts."""
    smallest = min(shape.divisible.values(), default=_MAX_TENSOR_RANKS)
    return [n for n in range(1, smallest + 1) if all(size % n == 0 for size in shape.divisible.values())]


def human(size: int) -> str:
    """Bytes for people."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


# --- what a rank holds


def _stages(shape: ModelShape, spec: ModelSpec) -> tuple[range, ...]:
    """As the engine cuts them: by what a rank reads in one step.  The head is not divided."""
    costs = [layer.matrices / spec.tensor_parallel_size for layer in shape.layers]
    try:
        return stage_layers(len(costs), spec.pipeline_parallel_size, costs=costs, last_extra=float(shape.embedding))
    except TooManyStages as error:
        size = spec.pipeline_parallel_size
        raise BadModel(f"{spec.name}: pipeline_parallel_size={size} is too much: {error}") from error


def _elements(shape: ModelShape, layers: range, *, tp_rank: int, tp_size: int, pp_size: int) -> int:
    held = sum(shape.layers[layer].cut // tp_size + shape.layers[layer].whole for layer in layers)
    first, last = layers.start == 0, layers.stop == shape.num_layers
    held += shape.embedding if first else 0
    held += shape.final_norm if last else 0
    has_own_head = last and tp_rank == 0 and not (shape.tied and pp_size == 1)
    return held + (shape.embedding if has_own_head else 0)


def _workspace(shape: ModelShape, spec: ModelSpec) -> int:
    """Beside weights and cache, for the largest step."""
    needed = step_bytes(
        shape,
        item=DTYPE_BYTES[dtype_of(shape, spec)],
        tp_size=spec.tensor_parallel_size,
        num_tokens=spec.max_num_batched_tokens,
        num_rows=spec.max_num_seqs,
    )
    return needed + (0 if spec.device == "cpu" else CUDA_SLACK_BYTES + CUDA_CONTEXT_BYTES)


def _check_divides(shape: ModelShape, spec: ModelSpec) -> None:
    uneven = {name: size for name, size in shape.divisible.items() if size % spec.tensor_parallel_size}
    if uneven:
        sizes = ", ".join(f"{name}={size}" for name, size in uneven.items())
        nearest = min(tensor_parallel_sizes(shape), key=lambda n: abs(n - spec.tensor_parallel_size))
        raise BadModel(
            f"{spec.name}: tensor_parallel_size={spec.tensor_parallel_size} does not divide {sizes} of {shape.source}: "
            f"the nearest that works is {nearest}"
        )


# --- what fits


def _affordable_blocks(ranks: Sequence[RankMemory], spec: ModelSpec, gpu_bytes: Sequence[int | None]) -> int | None:
    """KV blocks on every rank; None if neither a GPU's size nor kv_cache_bytes is known."""
    counts = []
    for rank, size in zip(ranks, gpu_bytes, strict=True):
        block_bytes = rank.token_bytes * spec.block_size
        if spec.kv_cache_bytes is not None:
            counts.append(spec.kv_cache_bytes // block_bytes)
        elif size is not None:
            counts.append(max(0, (usable_bytes(size, spec) - rank.fixed_bytes) // block_bytes - 1))
    return min(counts, default=None)


def _problem(found: MemoryFit, spec: ModelSpec, gpu_bytes: Sequence[int | None]) -> str | None:
    """The numbers of the rank that lacks most; None if all have room for the pool and it for a sequence."""
    known = [
        (found.least_bytes(rank) - usable_bytes(size, spec), rank, size)
        for rank, size in zip(found.ranks, gpu_bytes, strict=True)
        if size is not None
    ]
    lacking, rank, size = max(known, key=lambda entry: entry[0], default=(0, None, None))
    if rank is not None and size is not None and lacking > 0:
        pool = found.least_bytes(rank) - rank.fixed_bytes
        return (
            f"{spec.name}: rank {rank.rank} needs {human(rank.fixed_bytes + pool)} "
            f"(weights {human(rank.weight_bytes)}, workspace {human(rank.workspace_bytes)}, "
            f"KV cache {human(pool)} {_why_so_large(found)}), "
            f"but may use {human(usable_bytes(size, spec))} of its GPU's {human(size)} "
            f"(gpu_memory_utilization={spec.gpu_memory_utilization:g})"
        )
    if found.max_sequences == 0:
        return (
            f"{spec.name}: kv_cache_bytes={spec.kv_cache_bytes} holds {found.kv_tokens} tokens, less than one sequence "
            f"of max_model_len={found.max_model_len}"
        )
    return None


def _why_so_large(found: MemoryFit) -> str:
    """Whose wish the least possible pool is."""
    if found.is_set and found.max_sequences:
        return "as kv_cache_bytes has it"
    return f"for at least one sequence of {found.max_model_len} tokens"

"""From settings to a rank's engine: load, size the KV pool, choose how steps run."""

from dataclasses import replace
from pathlib import Path

from hortator.producer.errors import ConfigError
from hortator.topology.memory import human
from hortator.topology.modelshape import model_shape
from hortator.topology.workspace import CUDA_SLACK_BYTES, step_bytes

from .engine import Limits, PagedEngine
from .model import LoadedModel, LoadFormat, ModelConfig, load_model, read_config
from .parallel import Ranks
from .poolsize import Room, size_pool
from .runner import Runner, TorchRunner
from .shortage import memory_for
from .structure import Grammars


def build_engine(
    *,
    model_path: Path,
    mesh: Ranks,
    dtype: str = "auto",
    load_format: LoadFormat = "safetensors",
    max_num_seqs: int = 64,
    max_model_len: int | None = None,
    max_num_batched_tokens: int = 2048,
    block_size: int = 16,
    kv_cache_bytes: int | None = None,
    gpu_memory_utilization: float = 0.9,
    prefix_cache: bool = True,
) -> PagedEngine:
    """Load this rank's part of the model and size its KV pool.  Collective: all ranks of the group call it together.

    Without `max_model_len` sequences may be as long as the model has positions, or as the pool is if that is less.

    Raises ConfigError if the directory, the limits or the number of ranks cannot work, OutOfMemory if what they need is
    not there (now: somebody else may have it).
    """
    _check_positive(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, block_size=block_size)
    config = read_config(model_path, dtype=dtype)
    model_len = _model_len(max_model_len, config)
    model, grammars = _load(config, mesh, load_format)
    work_bytes = _work_bytes(config, mesh, num_tokens=max_num_batched_tokens, num_rows=max_num_seqs)
    room = Room.of(mesh, work_bytes, kv_cache_bytes=kv_cache_bytes, gpu_memory_utilization=gpu_memory_utilization)
    wanted = Limits(0, block_size, max_num_seqs, model_len, max_num_batched_tokens, prefix_cache)
    limits = _within(room, wanted, config, mesh, is_set=max_model_len is not None)
    pool_bytes = limits.kv_tokens * config.cache_shape(mesh).token_bytes
    with memory_for(f"the KV pool of {human(pool_bytes)} beside the weights", f"lower {room.smaller}"):
        runner = make_runner(model, mesh, limits, grammars)
    return PagedEngine(config, runner, ranks=mesh, limits=limits)


def _check_positive(**limits: int) -> None:
    for name, value in limits.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}: it must be at least 1")


def make_runner(model: LoadedModel, ranks: Ranks, limits: Limits, grammars: Grammars | None) -> Runner:
    """The fastest way that this device and architecture have."""
    if ranks.device.type == "cuda":
        from .cuda import body, kernels
        from .cuda.runner import CudaRunner

        if body.fits(model):
            return CudaRunner(model, ranks, limits, operations=kernels, grammars=grammars)
    return TorchRunner(model, ranks, num_blocks=limits.num_blocks, block_size=limits.block_size, grammars=grammars)


def _load(config: ModelConfig, mesh: Ranks, load_format: LoadFormat) -> tuple[LoadedModel, Grammars | None]:
    """This rank's part; where tokens are chosen, the tokenizer is read meanwhile."""
    grammars = None
    if mesh.pp_rank == mesh.pp_size - 1 and mesh.tp_rank == 0:  # the rank that samples
        grammars = Grammars.of(config.path, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids)
    with memory_for(f"this rank's part of {config.path}", _fewer_weights(config, mesh)):
        model = load_model(config, mesh, load_format=load_format)
    if grammars is not None:
        grammars.wait()
    return model, grammars


def _within(room: Room, wanted: Limits, config: ModelConfig, mesh: Ranks, *, is_set: bool) -> Limits:
    """With as many blocks as there is room for, and sequences no longer than those hold."""
    size = size_pool(
        room,
        mesh,
        token_bytes=config.cache_shape(mesh).token_bytes,
        block_size=wanted.block_size,
        max_num_seqs=wanted.max_num_seqs,
        model_len=wanted.max_model_len,
        is_set=is_set,
    )
    return replace(wanted, num_blocks=size.num_blocks, max_model_len=size.max_model_len)


def _fewer_weights(config: ModelConfig, ranks: Ranks) -> str:
    """What makes a rank's part smaller."""
    more = f"use more ranks than tensor_parallel_size={ranks.tp_size} x pipeline_parallel_size={ranks.pp_size}"
    return more if config.dtype.itemsize == 2 else f"{more}, or dtype=bfloat16"


def _model_len(wanted: int | None, config: ModelConfig) -> int:
    if wanted is not None and wanted > config.max_model_len:
        raise ConfigError(
            f"max_model_len={wanted} is more than the {config.max_model_len} positions of {config.path}: lower it"
        )
    limit = wanted or config.max_model_len
    if limit < 2:
        raise ConfigError(f"max_model_len={limit} leaves no room for a prompt and one new token: raise it")
    return limit


def _work_bytes(config: ModelConfig, ranks: Ranks, *, num_tokens: int, num_rows: int) -> int:
    """What the largest step needs beside weights and cache, and some slack: as `hortator plan` counts it."""
    raw = config.hf.to_dict() | {"architectures": [config.architecture]}
    shape = model_shape(raw, source=str(config.path))
    item = config.dtype.itemsize
    needed = step_bytes(shape, item=item, tp_size=ranks.tp_size, num_tokens=num_tokens, num_rows=num_rows)
    return needed + CUDA_SLACK_BYTES

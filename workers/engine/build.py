"""From settings to a rank's engine: load, size the KV pool, choose how steps run."""

from pathlib import Path

import psutil
import torch

from hortator.producer.errors import ConfigError
from hortator.topology.memory import human
from hortator.topology.modelshape import model_shape
from hortator.topology.workspace import CUDA_SLACK_BYTES, step_bytes

from .engine import Limits, PagedEngine
from .kvcache import CacheShape
from .model import LoadedModel, LoadFormat, ModelConfig, load_model, read_config
from .parallel import Ranks, agree_on_minimum
from .runner import Runner, TorchRunner
from .shortage import memory_for
from .structure import Grammars

_CPU_FRACTION = 0.2  # of the host's available memory, shared by the ranks of this host


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

    Raises ConfigError if the directory, the limits or the number of ranks cannot work, OutOfMemory if what they need is
    not there (now: somebody else may have it).
    """
    config = read_config(model_path, dtype=dtype)
    model_len = _model_len(max_model_len, config)
    grammars = None
    if mesh.pp_rank == mesh.pp_size - 1 and mesh.tp_rank == 0:  # the rank that samples
        grammars = Grammars.of(config.path, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids)
    with memory_for(f"this rank's part of {config.path}", _fewer_weights(config, mesh)):
        model = load_model(config, mesh, load_format=load_format)
    if grammars is not None:
        grammars.wait()
    work_bytes = _work_bytes(config, mesh, num_tokens=max_num_batched_tokens, num_rows=max_num_seqs)
    spare_bytes = _spare_bytes(mesh, gpu_memory_utilization, work_bytes)
    limits = Limits(
        num_blocks=_num_blocks(
            config.cache_shape(mesh),
            mesh,
            affordable_bytes=kv_cache_bytes or spare_bytes,
            block_size=block_size,
            max_tokens=max_num_seqs * model_len,
        ),
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_model_len=model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        prefix_cache=prefix_cache,
    )
    pool_bytes = limits.kv_tokens * config.cache_shape(mesh).token_bytes
    smaller = f"gpu_memory_utilization={gpu_memory_utilization:g}"
    if kv_cache_bytes:
        smaller = f"kv_cache_bytes={kv_cache_bytes}"
        if spare_bytes < kv_cache_bytes:
            smaller += f" to {spare_bytes} or less"
    with memory_for(f"the KV pool of {human(pool_bytes)} beside the weights", f"lower {smaller}"):
        runner = make_runner(model, mesh, limits, grammars)
    return PagedEngine(config, runner, ranks=mesh, limits=limits)


def make_runner(model: LoadedModel, ranks: Ranks, limits: Limits, grammars: Grammars | None) -> Runner:
    """The fastest way that this device and architecture have."""
    if ranks.device.type == "cuda":
        from .cuda import body, kernels
        from .cuda.runner import CudaRunner

        if body.fits(model):
            return CudaRunner(model, ranks, limits, operations=kernels, grammars=grammars)
    return TorchRunner(model, ranks, num_blocks=limits.num_blocks, block_size=limits.block_size, grammars=grammars)


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


def _num_blocks(shape: CacheShape, ranks: Ranks, *, affordable_bytes: int, block_size: int, max_tokens: int) -> int:
    """Blocks in every rank's pool: what the poorest rank can afford, and no more than all sequences could need."""
    block_bytes = shape.token_bytes * block_size
    blocks = agree_on_minimum(min(affordable_bytes // block_bytes, -(-max_tokens // block_size)), ranks)
    if blocks < 1:
        raise ConfigError(
            f"no room for a single KV block of {block_size} tokens ({block_bytes} bytes a rank): raise kv_cache_bytes "
            f"or gpu_memory_utilization, lower max_num_batched_tokens, or use more tensor parallel ranks"
        )
    return blocks


def _spare_bytes(ranks: Ranks, gpu_memory_utilization: float, work_bytes: int) -> int:
    """What is left for the KV pool once the weights are loaded."""
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(ranks.device)
        return max(0, int(total * gpu_memory_utilization) - (total - free) - work_bytes)
    # Ranks of one host cannot be told from those of others here, so all are taken to share this one.
    return int(psutil.virtual_memory().available * _CPU_FRACTION) // ranks.world_size


def _work_bytes(config: ModelConfig, ranks: Ranks, *, num_tokens: int, num_rows: int) -> int:
    """What the largest step needs beside weights and cache, and some slack: as `hortator plan` counts it."""
    raw = config.hf.to_dict() | {"architectures": [config.architecture]}
    shape = model_shape(raw, source=str(config.path))
    item = config.dtype.itemsize
    needed = step_bytes(shape, item=item, tp_size=ranks.tp_size, num_tokens=num_tokens, num_rows=num_rows)
    return needed + CUDA_SLACK_BYTES

"""What a step takes beside weights and cache: as measured, as planned, as the engine sets it aside."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hortator.topology.fleet import ModelSpec
from hortator.topology.memory import CUDA_CONTEXT_BYTES, rank_memories
from hortator.topology.modelshape import ModelShape, model_shape
from hortator.workers.engine import build
from hortator.workers.engine.build import build_engine
from hortator.workers.engine.model import read_config
from hortator.workers.engine.parallel import SingleRank
from hortator.workers.engine.step import Request, SamplingParams, StepPlan
from tests.workers.engine.checkpoints import ARCHITECTURES, make_checkpoint
from tests.workers.engine.meshes import Stage

# Sizes in the proportions of real models; vocabularies and heads small, for they are not what is measured.
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 688, "head_dim": 32, "vocab_size": 300}
MANY_SMALL = {"num_experts": 16, "num_experts_per_tok": 8, "moe_intermediate_size": 96, "mlp_only_layers": []}
LIMITS: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 512, "max_model_len": 512}


def shape_of(path: Path) -> ModelShape:
    return model_shape(json.loads((path / "config.json").read_text()), source=path.name)


def spec(**settings: Any) -> ModelSpec:
    return ModelSpec.model_validate({"name": "m", "path": "/models/m", **settings})


def allocated_by(work: Callable[[], object], folder: Path) -> int:
    """The most bytes of tensors that were there at once besides those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    sizes = [e["args"]["Bytes"] for e in sorted(events, key=lambda e: e.get("ts", 0)) if e.get("name") == "[memory]"]
    return int(max(itertools.accumulate(sizes, initial=0)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "own"), [*((name, {}) for name in ARCHITECTURES), ("qwen3_moe", MANY_SMALL)])
def test_a_full_step_takes_within_an_eighth_what_is_set_aside(
    name: str, own: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    path = make_checkpoint(name, tmp_path / name, **SIZES, **own).path
    engine = build_engine(model_path=path, mesh=SingleRank(), dtype=dtype, kv_cache_bytes=64 << 20, **LIMITS)
    prompts = [tuple(range(n + 1, n + 129)) for n in (0, 40, 80, 120)]
    requests = (Request(n, prompt, SamplingParams(max_tokens=2)) for n, prompt in enumerate(prompts))
    engine.apply(StepPlan(0, tuple(requests)))
    allocated = allocated_by(engine.execute, tmp_path)
    (rank,) = rank_memories(shape_of(path), spec(device="cpu", dtype=dtype, **LIMITS))
    assert 7 / 8 < allocated / rank.workspace_bytes < 9 / 8


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_plan_counts_what_the_engine_sets_aside(name: str, tmp_path: Path) -> None:
    path = make_checkpoint(name, tmp_path / name).path
    for tp_size in (1, 2):
        limits = {"max_num_batched_tokens": 777, "max_num_seqs": 5}
        (rank, *_) = rank_memories(shape_of(path), spec(tensor_parallel_size=tp_size, **limits))
        ranks = Stage(0, 1, tp_size=tp_size)
        aside = build._work_bytes(read_config(path), ranks, num_tokens=777, num_rows=5)
        assert rank.workspace_bytes == aside + CUDA_CONTEXT_BYTES


def test_a_mixture_whose_config_names_no_number_of_experts_has_that_of_transformers(tmp_path: Path) -> None:
    path = make_checkpoint("mixtral", tmp_path / "mixtral", num_experts_per_tok=2).path
    raw = json.loads((path / "config.json").read_text())
    del raw["num_experts_per_tok"]
    assert model_shape(raw, source="x").feeds == shape_of(path).feeds

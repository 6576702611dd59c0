"""What is refused from the settings and config.json alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from hortator.producer.errors import ConfigError
from hortator.workers.modelcheck import check_gpu, check_model
from hortator.workers.settings import WorkerSettings
from tests.topology.test_memory import LLAMA_8B


def check(directory: Path, config: dict[str, Any] | None = None, **settings: Any) -> None:
    (directory / "config.json").write_text(json.dumps(LLAMA_8B | (config or {})))
    check_model(WorkerSettings(model_path=directory, model="m", device="cpu", **settings))


@pytest.mark.parametrize(
    ("config", "settings", "said"),
    [
        ({}, {"tensor_parallel_size": 3}, "tensor_parallel_size=3 does not divide num_attention_heads=32"),
        ({}, {"pipeline_parallel_size": 33}, "32 layers"),
        ({}, {"max_model_len": 200_000}, "more than the 131072 positions"),
        ({"architectures": ["GPT2LMHeadModel"]}, {}, "architecture GPT2LMHeadModel is not supported; supported: Llama"),
        ({"architectures": "LlamaForCausalLM"}, {}, "architecture none is not supported"),
        ({"auto_map": {}}, {}, "auto_map"),
        ({"quantization_config": {}}, {}, "quantised"),
        ({"num_attention_heads": 0}, {}, "config.json: num_attention_heads is 0, not a number from 1 to"),
        ({"rope_theta": 0}, {}, "config.json: rope_theta is 0, not a number above 0"),
        ({"rope_theta": 10**400}, {}, "config.json: rope_theta is inf, not a number above 0"),
        ({"rope_theta": float("nan")}, {}, "config.json: rope_theta is nan, not a number above 0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": -1.0}}}, {}, "rope_theta is -1, not a number above 0"),
        ({"rms_norm_eps": float("nan")}, {}, "config.json: rms_norm_eps is nan, not a finite number"),
    ],
)
def test_what_the_config_shows_cannot_work_is_refused(
    tmp_path: Path, config: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check(tmp_path, config, **settings)


def test_what_can_work_is_let_through(tmp_path: Path) -> None:
    check(tmp_path, tensor_parallel_size=2, max_model_len=131_072)
    check(tmp_path, {"max_position_embeddings": None})  # transformers may know better
    check_model(WorkerSettings(engine="echo", model="m", device="cpu"))


def test_cuda_on_a_host_without_a_gpu_is_refused(tmp_path: Path) -> None:
    check_gpu((tmp_path / "absent", tmp_path))
    with pytest.raises(ConfigError, match="device=cuda: this host has no GPU"):
        check_gpu((tmp_path / "absent",))

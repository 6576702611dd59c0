"""The architectures that are served: one table, and what the engine must know of each beyond transformers' own class.

All of them name their linears alike (q_proj, o_proj, gate_up_proj, ...), so cutting them needs no table: parallel.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hortator.producer.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Experts:
    """What a checkpoint calls the parts of a mixture of experts; transformers stacks them in two 3-D parameters."""

    block: str  # instead of transformers' "mlp"
    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True)
class Architecture:
    """A row of the table.  The flags say what its configs may ask for."""

    window: str = ""  # which layers may have a sliding window: "", "all" or "some"
    softcap: bool = False  # of attention scores and of logits
    fused: bool = False  # q/k/v, and gate/up, are one matrix each in the checkpoint
    experts: Experts | None = None


ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture(),
    "MistralForCausalLM": Architecture(window="all"),
    "Qwen2ForCausalLM": Architecture(window="some"),
    "Qwen3ForCausalLM": Architecture(window="some"),
    "Gemma2ForCausalLM": Architecture(window="some", softcap=True),
    "Gemma3ForCausalLM": Architecture(window="some", softcap=True),
    "Phi3ForCausalLM": Architecture(window="all", fused=True),
    "MixtralForCausalLM": Architecture(window="all", experts=Experts("block_sparse_moe", "w1", "w3", "w2")),
    "Qwen3MoeForCausalLM": Architecture(window="all", experts=Experts("mlp", "gate_proj", "up_proj", "down_proj")),
}
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")


def supported() -> str:
    """The names, for a refusal."""
    return ", ".join(ARCHITECTURES)


def architecture_of(raw: Mapping[str, Any], model_path: Path) -> str:
    """The architecture that this config.json names.  Raises ConfigError if the engine does not serve it."""
    if "auto_map" in raw:
        raise ConfigError(
            f"{model_path / 'config.json'} has auto_map: the model brings its own Python code, which is never run. "
            f"Use a checkpoint of one of {supported()}"
        )
    if "quantization_config" in raw:
        raise ConfigError(f"{model_path} is quantised, which is not supported: use the unquantised checkpoint")
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and names else "none"
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ConfigError(f"{model_path}: architecture {str(name)[:80]} is not supported; supported: {supported()}")
    return name


def check_features(hf: Any, where: str) -> None:
    """Refuse what a config of a supported architecture may ask for and the engine cannot do."""
    for rope in _rope_types(hf):
        if rope in _BATCH_DEPENDENT_ROPE:
            raise ConfigError(
                f"{where}: rope_type {rope!r} makes a token depend on what else is in the batch; it is not supported"
            )
    if getattr(hf, "use_bidirectional_attention", None):
        raise ConfigError(f"{where}: use_bidirectional_attention is not supported: it is no model that generates text")


def _rope_types(hf: Any) -> list[str]:
    """One for all layers, or one for each kind of layer."""
    parameters = getattr(hf, "rope_parameters", None) or {}
    groups = [group for group in parameters.values() if isinstance(group, dict)] or [parameters]
    return [str(group.get("rope_type", "default")) for group in groups]


def head_dim(hf: Any) -> int:
    return int(getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads)


def divided_sizes(hf: Any) -> dict[str, int]:
    """Everything that tensor parallelism cuts into equal parts."""
    names = ["num_attention_heads", "num_key_value_heads", "moe_intermediate_size"]
    if not all(_has_experts(hf, layer) for layer in range(hf.num_hidden_layers)) or not hasattr(hf, names[-1]):
        names.append("intermediate_size")
    return {name: int(getattr(hf, name)) for name in names if hasattr(hf, name)}


def layer_elements(hf: Any) -> list[int]:
    """Weights of each layer, norms and biases left out."""
    attention = hf.hidden_size * head_dim(hf) * 2 * (hf.num_attention_heads + hf.num_key_value_heads)
    return [attention + 3 * hf.hidden_size * _mlp_width(hf, layer) for layer in range(hf.num_hidden_layers)]


def _mlp_width(hf: Any, layer: int) -> int:
    if not _has_experts(hf, layer):
        return int(hf.intermediate_size)
    return _num_experts(hf) * int(getattr(hf, "moe_intermediate_size", hf.intermediate_size))


def _num_experts(hf: Any) -> int:
    return int(getattr(hf, "num_local_experts", None) or getattr(hf, "num_experts", None) or 0)


def _has_experts(hf: Any, layer: int) -> bool:
    """qwen3_moe may have layers without experts."""
    sparse = (layer + 1) % getattr(hf, "decoder_sparse_step", 1) == 0
    return _num_experts(hf) > 0 and sparse and layer not in (getattr(hf, "mlp_only_layers", None) or ())

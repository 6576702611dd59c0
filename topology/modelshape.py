"""How large a model is, piece by piece, from its config.json alone.  Pure: no torch, no transformers.

What is counted is what transformers' classes of these families allocate; `tests/topology/test_memory.py` compares the
two, and the engine's loaded parameters, element by element.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import BadModel
from .workspace import Feed

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Elements of one layer: `cut` are divided by the tensor parallel ranks, `whole` are held by each of them."""

    cut: int
    whole: int
    matrices: int  # of `cut`, those of matrices: what stages are balanced by


@dataclass(frozen=True, slots=True)
class ModelShape:
    """All that memory and traffic follow from.  Sizes are in elements, but for `dtype`."""

    source: str
    architecture: str
    dtype: str  # the checkpoint's own
    layers: tuple[LayerShape, ...]
    hidden_size: int
    vocab_size: int
    max_model_len: int
    kv_width: int  # keys and values of one token in one layer, over all KV heads
    feeds: tuple[Feed, ...]  # the kinds of feed-forward that its layers have
    final_norm: int
    tied: bool
    divisible: Mapping[str, int] = field(default_factory=dict)  # sizes that tensor parallelism cuts into equal parts

    @property
    def embedding(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def num_layers(self) -> int:
        return len(self.layers)


@dataclass(frozen=True, slots=True)
class Family:
    """What distinguishes an architecture.  `defaults`: what its class assumes for keys that config.json leaves out."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    norms: int = 2
    head_norms: bool = False  # a norm over each head's queries and keys
    qkv_bias: str = ""  # the config key that says, or "always"
    output_bias: str = ""
    mlp_bias: str = ""
    fused: bool = False  # gate and up are one matrix
    experts: Callable[["Config", int], tuple[int, int]] | None = None
    """Of a layer: number of experts, and width of each; (0, 0) where it is dense."""


class Config:
    """A config.json with a family's defaults; a key that is needed and missing is named."""

    def __init__(self, raw: Mapping[str, Any], defaults: Mapping[str, Any], source: str) -> None:
        self._raw, self._defaults, self._source = raw, defaults, source

    def has(self, name: str) -> bool:
        return self._raw.get(name, self._defaults.get(name)) is not None

    def size(self, name: str, *, limit: int = 2**32) -> int:
        """A positive integer."""
        value = self._raw.get(name)
        value = self._defaults.get(name) if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
            problem = "has no" if value is None else f"has no usable ({value!r})"
            raise BadModel(f"{self._source}/config.json {problem} {name}: use the model's own config.json")
        return value

    def flag(self, name: str) -> bool:
        return name == "always" or bool(self._raw.get(name, self._defaults.get(name, False)))

    def get(self, name: str) -> Any:
        return self._raw.get(name, self._defaults.get(name))


def _mixtral_experts(config: Config, layer: int) -> tuple[int, int]:
    return config.size("num_local_experts"), config.size("intermediate_size")


def _qwen3_experts(config: Config, layer: int) -> tuple[int, int]:
    if layer in (config.get("mlp_only_layers") or ()) or (layer + 1) % config.size("decoder_sparse_step"):
        return 0, 0
    count = "num_local_experts" if config.has("num_local_experts") else "num_experts"  # transformers writes the former
    return config.size(count), config.size("moe_intermediate_size")


_GEMMA = {"head_dim": 256, "tie_word_embeddings": True}
FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),
    "MistralForCausalLM": Family(defaults={"num_key_value_heads": 8}),
    "Qwen2ForCausalLM": Family(defaults={"num_key_value_heads": 32}, qkv_bias="always"),
    "Qwen3ForCausalLM": Family(
        defaults={"head_dim": 128, "num_key_value_heads": 32},
        head_norms=True,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
    ),
    "Gemma2ForCausalLM": Family(defaults=_GEMMA, norms=4, qkv_bias="attention_bias", output_bias="attention_bias"),
    "Gemma3ForCausalLM": Family(
        defaults=_GEMMA, norms=4, head_norms=True, qkv_bias="attention_bias", output_bias="attention_bias"
    ),
    "Phi3ForCausalLM": Family(fused=True),
    "MixtralForCausalLM": Family(
        defaults={"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}, experts=_mixtral_experts
    ),
    "Qwen3MoeForCausalLM": Family(
        defaults={
            "num_key_value_heads": 4,
            "decoder_sparse_step": 1,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "intermediate_size": 6144,
        },
        head_norms=True,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        experts=_qwen3_experts,
    ),
}


def model_shape(raw: Mapping[str, Any], *, source: str) -> ModelShape:
    """The shape of the model whose config.json is `raw`.  Raises BadModel."""
    if "quantization_config" in raw:
        raise BadModel(f"{source} is quantised, which is not supported: use the unquantised checkpoint")
    architecture = _architecture(raw)
    family = FAMILIES.get(architecture)
    if family is None:
        raise BadModel(
            f"{source}: the sizes of architecture {architecture} are not known: use one of {', '.join(FAMILIES)}"
        )
    return _from_config(Config(raw, family.defaults, source), family, architecture, source)


def _architecture(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "none"


def _from_config(config: Config, family: Family, architecture: str, source: str) -> ModelShape:
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads") if config.has("num_key_value_heads") else heads
    head_dim = config.size("head_dim") if config.has("head_dim") else hidden // heads
    attention = _attention(config, family, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    feeds = [
        _feed_forward(config, family, hidden, layer) for layer in range(config.size("num_hidden_layers", limit=10_000))
    ]
    widths = {"num_attention_heads": heads, "num_key_value_heads": kv_heads} | {key: f.width for _, key, f in feeds}
    return ModelShape(
        source=source,
        architecture=architecture,
        dtype=_dtype(config),
        layers=tuple(_sum(attention, layer, norms=family.norms * hidden) for layer, _, _ in feeds),
        hidden_size=hidden,
        vocab_size=config.size("vocab_size"),
        max_model_len=config.size("max_position_embeddings"),
        kv_width=2 * kv_heads * head_dim,
        feeds=tuple({feed: None for _, _, feed in feeds}),
        final_norm=hidden,
        tied=config.flag("tie_word_embeddings"),
        divisible=widths,
    )


def _attention(config: Config, family: Family, *, hidden: int, heads: int, kv_heads: int, head_dim: int) -> LayerShape:
    queries, keys_and_values = heads * head_dim, 2 * kv_heads * head_dim
    matrices = hidden * (2 * queries + keys_and_values)
    bias = queries + keys_and_values if config.flag(family.qkv_bias) else 0
    whole = hidden if config.flag(family.output_bias) else 0
    return LayerShape(matrices + bias, whole + (2 * head_dim if family.head_norms else 0), matrices)


def _feed_forward(config: Config, family: Family, hidden: int, layer: int) -> tuple[LayerShape, str, Feed]:
    """The layer's part, and the config key of its width."""
    count, width = family.experts(config, layer) if family.experts else (0, 0)
    if not count:
        width = config.size("intermediate_size")
        matrices = 3 * hidden * width
        bias = config.flag(family.mlp_bias)
        shape = LayerShape(matrices + (2 * width if bias else 0), hidden if bias else 0, matrices)
        return shape, "intermediate_size", Feed(width, fused=family.fused)
    matrices = 3 * hidden * width * count
    key = "moe_intermediate_size" if config.has("moe_intermediate_size") else "intermediate_size"
    return LayerShape(matrices, count * hidden, matrices), key, Feed(width, config.size("num_experts_per_tok"))


def _sum(attention: LayerShape, feed: LayerShape, *, norms: int) -> LayerShape:
    return LayerShape(
        attention.cut + feed.cut, attention.whole + feed.whole + norms, attention.matrices + feed.matrices
    )


def _dtype(config: Config) -> str:
    """As transformers: the config's own, else float32."""
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    name = str(name).removeprefix("torch.")
    return name if name in DTYPE_BYTES else "float32"

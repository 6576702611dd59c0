"""The layers of the llama family (llama, mistral, qwen2, qwen3) as ten kernels each, over transformers' weights.

Queries, keys and values are one matrix, gate and up another; residual sums ride with the norms, rotation with the write
to the cache.  Row-parallel linears stay the modules that they are: they sum over the tensor-parallel group.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import linear

from hortator.workers.engine.model import LoadedModel

from .batch import Attended

FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


class Operations(Protocol):
    """What kernels.py and reference.py have in common."""

    add_rms_norm: Any
    silu_mul: Any
    rotate_and_store: Any
    decode: Any
    prefill: Any
    greedy: Any


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    norms: tuple[torch.Tensor, torch.Tensor, float] | None  # of queries and keys
    output: torch.nn.Module
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.nn.Module
    scale: float
    window: int  # 0: all of the context


def fits(model: LoadedModel) -> bool:
    """Whether this model can run as these kernels."""
    hf, head_dim = model.config.hf, model.config.head_dim
    return (
        model.config.architecture in FAMILY
        and hf.hidden_act == "silu"
        and head_dim >= 16
        and head_dim & (head_dim - 1) == 0
        and not getattr(hf, "mlp_bias", False)
        and getattr(hf, "partial_rotary_factor", 1.0) == 1.0
    )


class FusedBody:
    """A pipeline stage's layers.  Takes the weights out of `model`, whose own modules are of no use afterwards."""

    def __init__(self, model: LoadedModel, operations: Operations, *, num_heads: int, max_model_len: int) -> None:
        body: Any = model.body
        self._do = operations
        self._first, self._last = model.first, model.last
        self._num_heads = num_heads
        self._eps = float(model.config.hf.rms_norm_eps)
        self._embedding = body.embed_tokens
        self._norm = body.norm.weight if model.last else None
        self._layers = [_layer(layer) for layer in body.layers]
        device = next(body.parameters()).device
        self._cos_sin = _cos_sin(body.rotary_emb, max_model_len, model.config.head_dim, device)

    def __call__(self, inputs: torch.Tensor, batch: Attended, cache: torch.Tensor) -> torch.Tensor:
        """Token ids [T] on the first stage, else hidden states [T, hidden size]; gives [T, hidden size].

        `cache` is [layers, 2, blocks, KV heads, block_size, head_dim].
        """
        do, eps = self._do, self._eps
        hidden: torch.Tensor = self._embedding(inputs) if self._first else inputs
        normed: torch.Tensor
        residual: torch.Tensor | None = None
        for layer, own_cache in zip(self._layers, cache, strict=True):
            normed, residual = do.add_rms_norm(hidden, residual, layer.input_norm, eps)
            qkv = linear(normed, layer.qkv, layer.qkv_bias)
            do.rotate_and_store(
                qkv,
                batch.positions,
                batch.slots,
                self._cos_sin,
                own_cache,
                num_heads=self._num_heads,
                norms=layer.norms,
            )
            hidden = layer.output(self._attend(qkv, batch, own_cache, layer))
            normed, residual = do.add_rms_norm(hidden, residual, layer.mlp_norm, eps)
            hidden = layer.down(do.silu_mul(linear(normed, layer.gate_up)))
        if self._norm is None:
            return hidden if residual is None else hidden + residual
        normed, _ = do.add_rms_norm(hidden, residual, self._norm, eps)
        return normed

    def _attend(self, qkv: torch.Tensor, batch: Attended, cache: torch.Tensor, layer: Layer) -> torch.Tensor:
        options = {"num_heads": self._num_heads, "scale": layer.scale, "window": layer.window}
        parts = []
        if batch.decodes is not None:
            d = batch.decodes
            parts.append(self._do.decode(qkv, cache, d.pages, d.page_starts, d.contexts, splits=d.splits, **options))
        first = batch.num_decodes
        for chunks in batch.chunks:
            parts.append(self._do.prefill(qkv[first : first + chunks.num_tokens], cache, chunks, **options))
            first += chunks.num_tokens
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _layer(layer: Any) -> Layer:
    """The merged weights replace the separate ones, so that memory holds both only of one layer."""
    attention, mlp = layer.self_attn, layer.mlp
    heads = [attention.q_proj, attention.k_proj, attention.v_proj]
    biases = [head.bias for head in heads]
    norms = None
    if hasattr(attention, "q_norm"):
        norms = (attention.q_norm.weight, attention.k_norm.weight, float(attention.q_norm.variance_epsilon))
    merged = Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=torch.cat([head.weight for head in heads]),
        qkv_bias=None if biases[0] is None else torch.cat(biases),
        norms=norms,
        output=attention.o_proj,
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
        down=mlp.down_proj,
        scale=float(attention.scaling),
        # Some classes keep the window of each layer, mistral's the one of all in its configuration.
        window=int(getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None)) or 0),
    )
    del attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj
    return merged


def _cos_sin(rotary: Any, max_model_len: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """[positions, head_dim] in float32: the cosines of the head_dim/2 frequencies, then the sines."""
    positions = torch.arange(max_model_len, device=device).unsqueeze(0)
    cos, sin = rotary(torch.empty(0, dtype=torch.float32, device=device), positions)
    half = head_dim // 2
    return torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1).float().contiguous()

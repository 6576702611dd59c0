"""What kernels.py computes, in plain torch on any device: the twin for tests, and the definition."""

import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from .batch import Chunks


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See kernels.add_rms_norm."""
    total = x if residual is None else residual.copy_(x.float() + residual.float())
    return _rms_norm(total, weight, eps), total


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See kernels.silu_mul."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate.float()).to(gate.dtype) * up


def rotate_and_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos_sin: torch.Tensor,
    cache: torch.Tensor,
    *,
    num_heads: int,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> None:
    """See kernels.rotate_and_store."""
    _, _, kv_heads, block_size, head_dim = cache.shape
    heads = qkv.view(len(qkv), num_heads + 2 * kv_heads, head_dim)
    queries, keys, values = torch.split(heads, [num_heads, kv_heads, kv_heads], dim=1)
    cos, sin = cos_sin[positions.long()].unsqueeze(1).chunk(2, dim=-1)
    q_norm, k_norm, eps = norms or (None, None, 0.0)
    for part, weight in ((queries, q_norm), (keys, k_norm)):
        normed = part if weight is None else _rms_norm(part, weight, eps)
        first, second = normed.float().chunk(2, dim=-1)
        part.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))
    block, place = slots.long() // block_size, slots.long() % block_size
    cache[0][block, :, place] = keys
    cache[1][block, :, place] = values


def decode(
    qkv: torch.Tensor,
    cache: torch.Tensor,
    pages: torch.Tensor,
    page_starts: torch.Tensor,
    contexts: torch.Tensor,
    *,
    num_heads: int,
    scale: float,
    splits: int = 1,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """See kernels.decode; `splits` changes nothing here."""
    _, _, _, block_size, head_dim = cache.shape
    out = torch.zeros((len(contexts), num_heads * head_dim), dtype=qkv.dtype, device=qkv.device)
    for row, (start, context) in enumerate(zip(page_starts.tolist(), contexts.tolist(), strict=True)):
        if not context:
            continue
        begin = max(0, context - window) if window else 0
        blocks = pages[start : start + -(-context // block_size)].long()
        keys, values = cache[:, blocks].transpose(2, 3).flatten(1, 2)[:, begin:context].float()
        queries = qkv[row, : num_heads * head_dim].view(num_heads, head_dim).float()
        group = num_heads // keys.shape[1]
        scores = torch.einsum("hd,nhd->hn", queries, keys.repeat_interleave(group, dim=1)) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        attended = torch.einsum("hn,nhd->hd", scores.softmax(-1), values.repeat_interleave(group, dim=1))
        out[row] = attended.flatten().to(out.dtype)
    return out


def prefill(
    qkv: torch.Tensor, cache: torch.Tensor, chunks: Chunks, *, num_heads: int, scale: float, window: int = 0
) -> torch.Tensor:
    """See kernels.prefill."""
    queries, keys, values = split_heads(qkv, cache, chunks, num_heads=num_heads)
    out = torch.empty_like(queries)
    q_ends, k_ends = chunks.query_ends.tolist(), chunks.key_ends.tolist()
    for row in range(len(q_ends) - 1):
        q, k = slice(q_ends[row], q_ends[row + 1]), slice(k_ends[row], k_ends[row + 1])
        at_key = torch.arange(k.stop - k.start)
        at_query = at_key[len(at_key) - (q.stop - q.start) :, None]
        seen = at_key <= at_query
        if window:
            seen &= at_key > at_query - window
        query, key, value = (part.transpose(0, 1) for part in (queries[q], keys[k], values[k]))
        out[q] = scaled_dot_product_attention(
            query, key, value, attn_mask=seen.to(qkv.device), scale=scale, enable_gqa=True
        ).transpose(0, 1)
    return out.flatten(1)


def split_heads(
    qkv: torch.Tensor, cache: torch.Tensor, chunks: Chunks, *, num_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values [tokens, heads, head_dim] of the chunks; keys and values with their past, if any."""
    _, _, kv_heads, _, head_dim = cache.shape
    heads = qkv.view(len(qkv), num_heads + 2 * kv_heads, head_dim)
    queries, keys, values = torch.split(heads, [num_heads, kv_heads, kv_heads], dim=1)
    if chunks.key_places is not None:
        block, place = chunks.key_places
        keys, values = cache[0][block, :, place], cache[1][block, :, place]
    return queries, keys, values


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """See kernels.greedy."""
    return torch.where(torch.isfinite(logits).all(dim=-1), logits.argmax(dim=-1), -1)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return scaled.to(x.dtype) * weight

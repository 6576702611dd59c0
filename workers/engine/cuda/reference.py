"""What kernels.py computes, in plain torch on any device: the twin for tests, and the definition."""

import torch


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See kernels.add_rms_norm."""
    total = x if residual is None else residual.copy_(x.float() + residual.float())
    return _rms_norm(total, weight, eps), total


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See kernels.silu_mul."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate.float()).to(gate.dtype) * up


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


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """See kernels.greedy."""
    return torch.where(torch.isfinite(logits).all(dim=-1), logits.argmax(dim=-1), -1)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return scaled.to(x.dtype) * weight

"""The Triton kernels of a step, each with the function that launches it.  reference.py says the same in plain torch.

Shapes: T tokens, Hq query and Hk key-value heads of dimension D (a power of two), hidden size H.  The cache of one
layer is [2, blocks, Hk, block_size, D].  Arithmetic inside is float32; what is stored has the model's type.
"""

import torch
import triton
import triton.language as tl

from . import reference
from .batch import Chunks

_TILE = 64  # keys that a program of `decode` reads at a time
_HEADS = 8  # that a program of `rotate_and_store` turns
_MIN_ROWS = 16  # of a matrix product's left side


@triton.jit
def _add_rms_norm(x, residual, weight, out, eps, H: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < H
    value = tl.load(x + row * H + at, mask=mask, other=0.0)
    if ADD:
        value = (value.to(tl.float32) + tl.load(residual + row * H + at, mask=mask, other=0.0).to(tl.float32)).to(
            residual.dtype.element_ty
        )
        tl.store(residual + row * H + at, value, mask=mask)
    value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / H + eps)
    normed = (value * scale).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * H + at, normed * tl.load(weight + at, mask=mask, other=0.0).to(tl.float32), mask=mask)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMS norm of `x + residual` [T, H], and that sum, which takes residual's place.  None: x alone is the sum."""
    out = torch.empty_like(x)
    hidden = x.shape[1]
    block = triton.next_power_of_2(hidden)
    _add_rms_norm[(x.shape[0],)](
        x, x if residual is None else residual, weight, out, eps,
        H=hidden, ADD=residual is not None, BLOCK=block, num_warps=max(4, min(16, block // 512)),
    )  # fmt: skip
    return out, x if residual is None else residual


@triton.jit
def _silu_mul(gate_up, out, INTER: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < INTER
    gate = tl.load(gate_up + row * 2 * INTER + at, mask=mask).to(tl.float32)
    up = tl.load(gate_up + row * 2 * INTER + INTER + at, mask=mask).to(tl.float32)
    gated = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * INTER + at, gated * up, mask=mask)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half: [T, 2 * I] to [T, I]."""
    num_tokens, width = gate_up.shape
    out = gate_up.new_empty((num_tokens, width // 2))
    _silu_mul[(num_tokens, triton.cdiv(width // 2, 1024))](gate_up, out, INTER=width // 2, BLOCK=1024, num_warps=4)
    return out


@triton.jit
def _rotate_and_store(
    qkv, positions, slots, cos_sin, q_norm, k_norm, cache, eps, cache_half,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, NORM: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """One token, HEADS of its heads."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half = tl.arange(0, D // 2)[None, :]
    exists = (head < HQ + 2 * HK)[:, None]
    source = qkv + (token * (HQ + 2 * HK) + head)[:, None] * D + half
    first = tl.load(source, mask=exists, other=0.0).to(tl.float32)
    second = tl.load(source + D // 2, mask=exists, other=0.0).to(tl.float32)
    turns = (head < HQ + HK)[:, None]
    if NORM:
        scale = tl.rsqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / D + eps)[:, None]
        is_query = (head < HQ)[:, None]
        kind = qkv.dtype.element_ty
        for_first = tl.where(is_query, tl.load(q_norm + half), tl.load(k_norm + half)).to(tl.float32)
        for_second = tl.where(is_query, tl.load(q_norm + D // 2 + half), tl.load(k_norm + D // 2 + half)).to(tl.float32)
        first = tl.where(turns, (first * scale).to(kind).to(tl.float32) * for_first, first)
        second = tl.where(turns, (second * scale).to(kind).to(tl.float32) * for_second, second)
    angles = cos_sin + tl.load(positions + token).to(tl.int64) * D + half
    cos, sin = tl.load(angles), tl.load(angles + D // 2)
    turned = first * cos - second * sin
    second = tl.where(turns, second * cos + first * sin, second)
    first = tl.where(turns, turned, first)
    tl.store(source, first, mask=turns)
    tl.store(source + D // 2, second, mask=turns)
    slot = tl.load(slots + token).to(tl.int64)
    is_value = head >= HQ + HK
    kv_head = tl.where(is_value, head - HQ - HK, head - HQ)
    target = (
        tl.where(is_value, cache_half, 0) + ((slot // BLOCK_SIZE * HK + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE) * D
    )
    stored = exists & (head >= HQ)[:, None]
    tl.store(cache + target[:, None] + half, first, mask=stored)
    tl.store(cache + target[:, None] + D // 2 + half, second, mask=stored)


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
    """Rotate queries and keys of `qkv` [T, (Hq + 2 Hk) * D] in place, and write keys and values to their slots.

    `cos_sin` [positions, D] holds the cosines of the D/2 frequencies, then the sines, in float32.  `norms`: weights and
    epsilon of a per-head RMS norm of queries and keys before the rotation.
    """
    _, _, kv_heads, block_size, head_dim = cache.shape
    q_norm, k_norm, eps = norms or (qkv, qkv, 0.0)
    _rotate_and_store[(qkv.shape[0], triton.cdiv(num_heads + 2 * kv_heads, _HEADS))](
        qkv, positions, slots, cos_sin, q_norm, k_norm, cache, eps, cache.stride(0),
        HQ=num_heads, HK=kv_heads, D=head_dim, BLOCK_SIZE=block_size, NORM=norms is not None, HEADS=_HEADS, num_warps=4,
    )  # fmt: skip


@triton.jit
def _decode(
    qkv, cache, pages, page_starts, contexts, out, partial, lse, scale, softcap, cache_half, row_stride,
    WINDOW: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One sequence, one key-value head with the query heads that share it, one of SPLITS parts of the context."""
    row, kv_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = HQ // HK
    heads = tl.arange(0, ROWS)
    at = tl.arange(0, D)
    q_mask = (heads < GROUP)[:, None]
    query_at = row * row_stride + (kv_head * GROUP + heads)[:, None] * D + at[None, :]
    query = tl.load(qkv + query_at, mask=q_mask, other=0.0)

    context = tl.load(contexts + row)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(context - WINDOW, 0)
    first_tile = begin // TILE
    num_tiles = tl.cdiv(context, TILE) - first_tile
    per_part = tl.cdiv(num_tiles, SPLITS)
    start = (first_tile + part * per_part) * TILE
    stop = tl.minimum((first_tile + (part + 1) * per_part) * TILE, context)

    table = pages + tl.load(page_starts + row)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)
    in_tile = tl.arange(0, TILE)
    for tile in range(start, stop, TILE):
        key_at = tile + in_tile
        seen = key_at < stop
        if WINDOW > 0:
            seen = seen & (key_at >= begin)
        page = tl.load(table + key_at // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        base = cache + ((page * HK + kv_head) * BLOCK_SIZE + key_at % BLOCK_SIZE) * D
        keys = tl.load(base[:, None] + at[None, :], mask=seen[:, None], other=0.0)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
        if SOFTCAP:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        top = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.exp(scores - top[:, None])
        fade = tl.exp(best - top)
        values = tl.load(base[:, None] + cache_half + at[None, :], mask=seen[:, None], other=0.0)
        acc = acc * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        total = total * fade + tl.sum(weights, axis=1)
        best = top

    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    head = kv_head * GROUP + heads
    if SPLITS == 1:
        tl.store(out + (row * HQ + head)[:, None] * D + at[None, :], result, mask=q_mask)
    else:
        place = (row * HQ + head) * SPLITS + part
        tl.store(partial + place[:, None] * D + at[None, :], result, mask=q_mask)
        tl.store(lse + place, tl.where(total > 0, best + tl.log(total), float("-inf")), mask=heads < GROUP)


@triton.jit
def _combine(partial, lse, out, D: tl.constexpr, SPLITS: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)  # row and head
    parts, at = tl.arange(0, SPLITS), tl.arange(0, D)
    logs = tl.load(lse + place * SPLITS + parts)
    top = tl.max(logs, axis=0)
    weights = tl.exp(logs - tl.where(top > float("-inf"), top, 0.0))
    total = tl.sum(weights, axis=0)
    values = tl.load(partial + (place * SPLITS + parts)[:, None] * D + at[None, :])
    tl.store(out + place * D + at, tl.sum(values * weights[:, None], axis=0) / tl.where(total > 0, total, 1.0))


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
    """Attention of one query token per row over its paged context: [T, Hq * D].

    Queries are the first Hq heads of `qkv`'s rows.  Row i reads the first contexts[i] tokens of the blocks
    pages[page_starts[i]:], or with a `window` the last ones of these; with contexts[i] == 0 it gives zeros.
    `splits` (a power of two) spreads one row over several programs: few rows would not fill the device.
    Flash-decoding (Dao et al., 2023).
    """
    rows = contexts.shape[0]
    _, _, kv_heads, block_size, head_dim = cache.shape
    out = qkv.new_empty((rows, num_heads * head_dim))
    partial = lse = out
    if splits > 1:
        partial = torch.empty((rows, num_heads, splits, head_dim), dtype=torch.float32, device=qkv.device)
        lse = torch.empty((rows, num_heads, splits), dtype=torch.float32, device=qkv.device)
    _decode[(rows, kv_heads, splits)](
        qkv, cache, pages, page_starts, contexts, out, partial, lse, scale, softcap, cache.stride(0), qkv.stride(0),
        WINDOW=window, HQ=num_heads, HK=kv_heads, D=head_dim, BLOCK_SIZE=block_size,
        ROWS=max(_MIN_ROWS, triton.next_power_of_2(num_heads // kv_heads)), TILE=_TILE, SPLITS=splits,
        SOFTCAP=softcap > 0, PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32", num_warps=4, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        _combine[(rows * num_heads,)](partial, lse, out, D=head_dim, SPLITS=splits, num_warps=1)
    return out


def prefill(
    qkv: torch.Tensor, cache: torch.Tensor, chunks: Chunks, *, num_heads: int, scale: float, window: int = 0
) -> torch.Tensor:
    """Causal attention of chunks of several tokens, each to its own past and itself: [T, Hq * D].

    torch's FlashAttention (Dao, 2023) over sequences of different lengths, queries aligned with the last keys.
    """
    if qkv.dtype == torch.float32:  # which that has no kernels for
        return reference.prefill(qkv, cache, chunks, num_heads=num_heads, scale=scale, window=window)
    queries, keys, values = reference.split_heads(qkv, cache, chunks, num_heads=num_heads)
    out: torch.Tensor = torch.ops.aten._flash_attention_forward(
        queries, keys, values, chunks.query_ends, chunks.key_ends, chunks.max_queries, chunks.max_keys,
        0.0, True, False,  # no dropout, causal, no debug mask
        scale=scale, window_size_left=window - 1 if window else None, window_size_right=0 if window else None,
    )[0]  # fmt: skip
    return out.flatten(1)


@triton.jit
def _best_part(logits, best, where, width, part_width, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    top_at = tl.zeros((BLOCK,), tl.int32)
    broken = tl.zeros((BLOCK,), tl.int32)
    stop = tl.minimum((part + 1) * part_width, width)
    for start in range(part * part_width, stop, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < stop
        value = tl.load(logits + row * width + at, mask=mask, other=0.0).to(tl.float32)
        broken |= (mask & ~(tl.abs(value) < float("inf"))).to(tl.int32)
        better = mask & (value > top)
        top = tl.where(better, value, top)
        top_at = tl.where(better, at, top_at)
    highest = tl.max(top, axis=0)
    first = tl.min(tl.where(top == highest, top_at, width), axis=0)
    bad = tl.max(broken, axis=0)
    tl.store(best + row * PARTS + part, tl.where(bad > 0, float("nan"), highest))
    tl.store(where + row * PARTS + part, first)


@triton.jit
def _best_of_parts(best, where, out, width, PARTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, PARTS)
    values = tl.load(best + row * PARTS + parts)
    bad = tl.max((values != values).to(tl.int32), axis=0)
    highest = tl.max(values, axis=0)
    at = tl.load(where + row * PARTS + parts)
    first = tl.min(tl.where(values == highest, at, width), axis=0)
    tl.store(out + row, tl.where(bad > 0, -1, first).to(tl.int64))


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The first likeliest token of each row [rows], -1 where a row has a NaN or an infinity, in one pass."""
    rows, width = logits.shape
    parts = 16 if rows < 64 else 4
    best = torch.empty((rows, parts), dtype=torch.float32, device=logits.device)
    where = torch.empty((rows, parts), dtype=torch.int32, device=logits.device)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _best_part[(rows, parts)](
        logits, best, where, width, triton.cdiv(width, parts), PARTS=parts, BLOCK=1024, num_warps=4
    )
    _best_of_parts[(rows,)](best, where, out, width, PARTS=parts, num_warps=1)
    return out

"""Attention over the paged cache, called by transformers' own model classes.

`AttentionInterface.register` makes `paged_attention` a named implementation; the `paged` keyword given to the model's
forward reaches it in every layer.  Decode rows are one gathered SDPA per group of similar context; each prompt chunk is
one SDPA.  Layers with a soft-cap compute their scores themselves, which SDPA cannot cap.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from hortator.producer.errors import ConfigError

from .kvcache import PagedCache
from .scheduler import Row

IMPLEMENTATION = "hortator_paged"

# Rows whose contexts differ by more than this factor are gathered apart: padding costs as much as context.
_SPREAD = 2.0
_SMALL_BLOCKS = 8  # below this many blocks padding is cheaper than another call
_CAPPED_TOKENS = 256  # of a chunk at a time where scores are computed here


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows `first` to `last` of the batch, one query token each."""

    first: int
    last: int
    blocks: torch.Tensor  # [rows * width], padded with the null block
    num_keys: int  # of each row's gathered ones, from the first
    mask: torch.Tensor | None  # [rows, 1, 1, num_keys]; 0 or -inf


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Tokens `first` to `last` of the batch, all of one sequence."""

    first: int
    last: int
    blocks: torch.Tensor | None  # None: the chunk attends to itself alone, causally
    mask: torch.Tensor | None  # [tokens, keys]; 0 or -inf


@dataclass(frozen=True, slots=True)
class View:
    """The batch as the layers of one sliding window see it."""

    decodes: tuple[DecodeGroup, ...]
    chunks: tuple[PrefillChunk, ...]


@dataclass(slots=True)
class Pulse:
    """Counts steps and attention layers, as a sign of life: a thread that sees it move knows that the rank computes."""

    count: int = 0


@dataclass(slots=True)
class Paged:
    """What travels with one forward: the cache, where its tokens go, and what each row attends to.

    `decodes` come first in the batch, shortest context first; `chunks` follow.
    """

    cache: PagedCache
    decodes: tuple[Row, ...]
    chunks: tuple[Row, ...]
    slots: torch.Tensor  # [tokens]
    dtype: torch.dtype
    pulse: Pulse
    _views: dict[int | None, View] = field(default_factory=dict)

    def view(self, window: int | None) -> View:
        """Built by the first layer that asks, used by all others with that window."""
        if window not in self._views:
            self._views[window] = self._build(window)
        return self._views[window]

    def _build(self, window: int | None) -> View:
        groups = tuple(self._group(first, last, window) for first, last in _spans(self.decodes, self._size))
        chunks, first = [], len(self.decodes)
        for row in self.chunks:
            chunks.append(self._chunk(row, first, window))
            first += row.count
        return View(groups, tuple(chunks))

    @property
    def _size(self) -> int:
        return self.cache.block_size

    def _group(self, first: int, last: int, window: int | None) -> DecodeGroup:
        rows = self.decodes[first:last]
        size = self._size
        begins = [_first_block(row.context - 1, window, size) for row in rows]
        width = max(-(-row.context // size) - begin for row, begin in zip(rows, begins, strict=True))
        table = np.full((len(rows), width), self.cache.null_block, dtype=np.int64)
        for line, row, begin in zip(table, rows, begins, strict=True):
            owned = np.frombuffer(row.sequence.blocks, dtype=np.int32)[begin : begin + width]
            line[: len(owned)] = owned
        num_keys = max(row.context - begin * size for row, begin in zip(rows, begins, strict=True))
        mask = None
        if window is not None or rows[0].context < rows[-1].context:
            keys = np.array(begins)[:, None] * size + np.arange(num_keys)
            seen = _visible(np.array([row.context - 1 for row in rows])[:, None], keys, window)
            mask = None if seen.all() else self._additive(seen)[:, None, None, :]
        return DecodeGroup(first, last, self._to_device(table.reshape(-1)), num_keys, mask)

    def _chunk(self, row: Row, first: int, window: int | None) -> PrefillChunk:
        last = first + row.count
        if row.start == 0 and (window is None or row.count <= window):
            return PrefillChunk(first, last, None, None)
        begin = _first_block(row.start, window, self._size)
        blocks = np.frombuffer(row.sequence.blocks, dtype=np.int32)[begin : -(-row.context // self._size)]
        queries = np.arange(row.start, row.context)[:, None]
        keys = begin * self._size + np.arange(len(blocks) * self._size)
        mask = self._additive(_visible(queries, keys, window))
        return PrefillChunk(first, last, self._to_device(blocks.astype(np.int64)), mask)

    def _additive(self, seen: np.ndarray) -> torch.Tensor:
        mask = torch.zeros(seen.shape, dtype=self.dtype)
        return mask.masked_fill_(torch.from_numpy(~seen), float("-inf")).to(self.slots.device)

    def _to_device(self, indices: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(indices).to(self.slots.device)


def _first_block(query: int, window: int | None, block_size: int) -> int:
    """The first block with a key that the query at this position sees."""
    return 0 if window is None else max(0, query - window + 1) // block_size


def _visible(queries: np.ndarray, keys: np.ndarray, window: int | None) -> np.ndarray:
    """Causal, and within the window, which counts the query's own position (as transformers' masks do)."""
    seen: np.ndarray = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


def _spans(rows: tuple[Row, ...], block_size: int) -> list[tuple[int, int]]:
    """Cut rows, shortest context first, where padding to the longest would cost more than another call."""
    spans, last = [], len(rows)
    while last:
        longest = rows[last - 1].context
        floor = longest / _SPREAD if longest > _SMALL_BLOCKS * block_size else 0
        first = last
        while first and rows[first - 1].context >= floor:
            first -= 1
        spans.append((first, last))
        last = first
    return spans[::-1]


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged: Paged,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Store this step's keys and values, then attend.

    Takes [1, heads, tokens, head_dim] and gives [1, tokens, heads, head_dim].  The cache is written first, so that
    every row reads all of its context from it.  Attention sinks (`s_aux`) are a ConfigError.
    """
    if s_aux is not None:
        raise ConfigError("attention sinks are not supported: use a model without them")
    layer = _Layer(paged.cache, int(module.layer_idx), query, key, value, scaling, softcap)  # type: ignore[arg-type]
    paged.cache.write(layer.index, paged.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
    paged.pulse.count += 1
    view = paged.view(sliding_window)
    parts = [_decode(layer, group) for group in view.decodes] + [_prefill(layer, chunk) for chunk in view.chunks]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0), None


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's attention over the whole batch."""

    cache: PagedCache
    index: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float | None
    softcap: float | None


def _decode(layer: _Layer, group: DecodeGroup) -> torch.Tensor:
    """[rows, heads, head_dim].  The query heads that share a KV head become the query's length: no copy of K and V."""
    num_rows = group.last - group.first
    gathered = layer.cache.gather(layer.index, group.blocks, num_rows=num_rows)
    keys, values = (part[:, :, : group.num_keys] for part in gathered)
    rows = layer.query[0, :, group.first : group.last].transpose(0, 1)
    num_heads, head_dim = rows.shape[1:]
    folded = rows.reshape(num_rows, keys.shape[1], num_heads // keys.shape[1], head_dim)
    if layer.softcap is None:
        out = scaled_dot_product_attention(folded, keys, values, attn_mask=group.mask, scale=layer.scaling)
    else:
        out = _capped_attention(layer, folded, keys, values, group.mask)
    return out.reshape(num_rows, num_heads, head_dim)


def _prefill(layer: _Layer, chunk: PrefillChunk) -> torch.Tensor:
    """[tokens, heads, head_dim]."""
    span = slice(chunk.first, chunk.last)
    if chunk.blocks is None:
        keys, values = layer.key[:, :, span], layer.value[:, :, span]
    else:
        keys, values = layer.cache.gather(layer.index, chunk.blocks, num_rows=1)
    if layer.softcap is not None:
        return _capped_chunk(layer, layer.query[0, :, span], keys, values, chunk.mask)
    out = scaled_dot_product_attention(
        layer.query[:, :, span],
        keys,
        values,
        attn_mask=chunk.mask,
        is_causal=chunk.mask is None,
        scale=layer.scaling,
        enable_gqa=layer.query.shape[1] != keys.shape[1],
    )
    return out[0].transpose(0, 1)


def _capped_chunk(
    layer: _Layer, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """`query` [heads, tokens, head_dim] to [tokens, heads, head_dim], some tokens at a time: scores are whole matrices.

    Without a mask the chunk attends to itself, causally.
    """
    num_heads, num_tokens, head_dim = query.shape
    kv_heads = keys.shape[1]
    outs = []
    for first in range(0, num_tokens, _CAPPED_TOKENS):
        part = query[:, first : first + _CAPPED_TOKENS]
        count = part.shape[1]
        end = keys.shape[2] if mask is not None else first + count
        seen = _causal(first, count, query) if mask is None else mask[first : first + count]
        # The query heads of one KV head and their tokens are its queries, token by token.
        folded = part.reshape(1, kv_heads, -1, head_dim)
        rows = seen.repeat(num_heads // kv_heads, 1)
        out = _capped_attention(layer, folded, keys[:, :, :end], values[:, :, :end], rows)
        outs.append(out.view(num_heads, count, head_dim).transpose(0, 1))
    return torch.cat(outs)


def _causal(first: int, count: int, like: torch.Tensor) -> torch.Tensor:
    """Additive mask [count, first + count] of tokens `first` and up."""
    mask = torch.full((count, first + count), float("-inf"), dtype=like.dtype, device=like.device)
    return mask.triu_(first + 1)


def _capped_attention(
    layer: _Layer, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """SDPA with scores of at most `softcap`: softcap * tanh(score / softcap), before the mask and the softmax."""
    assert layer.softcap is not None
    scale = query.shape[-1] ** -0.5 if layer.scaling is None else layer.scaling
    scores = (query @ keys.transpose(-1, -2)).mul_(scale / layer.softcap).tanh_().mul_(layer.softcap)
    if mask is not None:
        scores += mask
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ values


def register() -> None:
    """Make the implementation known to transformers; its models then build no mask of their own."""
    AttentionInterface.register(IMPLEMENTATION, paged_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *_, **__: None)

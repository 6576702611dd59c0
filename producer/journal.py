"""How chunks are written in a job's journal: compact JSON, `[index, [token ids], text, [logprobs] or null]`."""

import json
from collections.abc import Iterable

from hortator.producer.schema import Chunk


def encode_chunk(chunk: Chunk) -> bytes:
    parts = [chunk.index, chunk.token_ids, chunk.text, chunk.logprobs]
    return json.dumps(parts, separators=(",", ":"), ensure_ascii=False).encode()


def decode_chunk(raw: bytes) -> Chunk:
    index, token_ids, text, logprobs = json.loads(raw)
    return Chunk.model_construct(
        index=index,
        token_ids=tuple(token_ids),
        text=text,
        logprobs=None if logprobs is None else tuple(logprobs),
    )


def from_token(chunks: Iterable[Chunk], after: int) -> list[Chunk]:
    """The chunks beyond token `after`.  One that straddles it loses its first tokens and keeps its whole text, which
    cannot be cut at tokens; readers that resume where a chunk ended never see that."""
    return [_cut(chunk, after) for chunk in chunks if chunk.index + len(chunk.token_ids) > after]


def _cut(chunk: Chunk, after: int) -> Chunk:
    skip = after - chunk.index
    if skip <= 0:
        return chunk
    logprobs = None if chunk.logprobs is None else chunk.logprobs[skip:]
    return Chunk(index=after, token_ids=chunk.token_ids[skip:], text=chunk.text, logprobs=logprobs)

"""How chunks are written in a job's journal: compact JSON, `[index, [token ids], text, [logprobs] or null]`.

Behind that, if the job asked for them: the likeliest tokens of each place, `[[[token id, logprob], ...], ...]` or null;
the number of the answer to which the tokens belong.
"""

import json
from collections.abc import Iterable
from typing import Any

from .schema import Chunk, TopLogprobs


def encode_chunk(chunk: Chunk) -> bytes:
    parts: list[object] = [chunk.index, chunk.token_ids, chunk.text, chunk.logprobs]
    if chunk.top_logprobs is not None or chunk.choice is not None:
        parts.append(chunk.top_logprobs)
    if chunk.choice is not None:
        parts.append(chunk.choice)
    return json.dumps(parts, separators=(",", ":"), ensure_ascii=False).encode()


def decode_chunk(raw: bytes) -> Chunk:
    index, token_ids, text, logprobs, *more = json.loads(raw)
    return Chunk.model_construct(
        index=index,
        token_ids=tuple(token_ids),
        text=text,
        logprobs=None if logprobs is None else tuple(logprobs),
        top_logprobs=_tops(more[0]) if more and more[0] is not None else None,
        choice=more[1] if len(more) > 1 else None,
    )


def readable(entries: Iterable[bytes], after: int) -> list[Chunk]:
    """The chunks beyond token `after`, up to where the journal is damaged: an entry that is none of ours, or a gap."""
    chunks: list[Chunk] = []
    so_far = after
    for raw in entries:
        try:
            chunk = decode_chunk(raw)
            if chunk.index > so_far:
                break
            so_far = chunk.index + len(chunk.token_ids)
        except (ValueError, TypeError):
            break
        chunks.append(chunk)
    return from_token(chunks, after)


def _tops(places: list[list[list[Any]]]) -> TopLogprobs:
    return tuple(tuple((token_id, logprob) for token_id, logprob in place) for place in places)


def from_token(chunks: Iterable[Chunk], after: int) -> list[Chunk]:
    """The chunks beyond token `after`.  One that straddles it loses its first tokens and keeps its whole text, which
    cannot be cut at tokens; readers that resume where a chunk ended never see that."""
    return [_cut(chunk, after) for chunk in chunks if chunk.index + len(chunk.token_ids) > after]


def _cut(chunk: Chunk, after: int) -> Chunk:
    skip = after - chunk.index
    if skip <= 0:
        return chunk
    logprobs = None if chunk.logprobs is None else chunk.logprobs[skip:]
    tops = None if chunk.top_logprobs is None else chunk.top_logprobs[skip:]
    return Chunk(
        index=after,
        token_ids=chunk.token_ids[skip:],
        text=chunk.text,
        logprobs=logprobs,
        top_logprobs=tops,
        choice=chunk.choice,
    )

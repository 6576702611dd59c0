"""How chunks are written in a job's journal: compact JSON, `[index, [token ids], text, [logprobs] or null]`.

Behind that, if the job asked for them: the likeliest tokens of each place, `[[[token id, logprob], ...], ...]` or null;
the number of the answer to which the tokens belong.
"""

import json
from collections.abc import Iterable
from typing import Annotated, NamedTuple

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from .schema import MAX_N, Chunk

MAX_CHUNK_BYTES = 64 * 2**20  # beyond what sixteen answers with all their log-probabilities gain in an outage
MAX_TOKEN_ID = 2**31 - 1

_Index = Annotated[int, Field(ge=0, lt=2**53)]
_TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]


class _Entry(NamedTuple):
    first: _Index
    token_ids: tuple[_TokenId, ...]
    text: str
    logprobs: tuple[float, ...] | None
    top_logprobs: tuple[tuple[tuple[_TokenId, float], ...], ...] | None = None
    choice: Annotated[int, Field(ge=0, lt=MAX_N)] | None = None


_entry = TypeAdapter(_Entry, config=ConfigDict(strict=True))


class DamagedJournal(ValueError):
    """What stands in a journal was not written by a leader, or is not all there."""


def encode_chunk(chunk: Chunk) -> bytes:
    parts: list[object] = [chunk.index, chunk.token_ids, chunk.text, chunk.logprobs]
    if chunk.top_logprobs is not None or chunk.choice is not None:
        parts.append(chunk.top_logprobs)
    if chunk.choice is not None:
        parts.append(chunk.choice)
    return json.dumps(parts, separators=(",", ":"), ensure_ascii=False).encode()


def read_chunk(raw: bytes) -> Chunk:
    """The chunk; DamagedJournal for what `encode_chunk` cannot have written."""
    if len(raw) > MAX_CHUNK_BYTES:
        raise DamagedJournal(f"an entry of {len(raw)} bytes")
    try:
        entry = _entry.validate_json(raw)
    except ValidationError as error:
        raise DamagedJournal("an entry that is no chunk of tokens") from error
    lengths = {len(beside) for beside in (entry.logprobs, entry.top_logprobs) if beside is not None}
    if lengths - {len(entry.token_ids)}:
        raise DamagedJournal("an entry with more or fewer log-probabilities than tokens")
    return Chunk.model_construct(
        index=entry.first,
        token_ids=entry.token_ids,
        text=entry.text,
        logprobs=entry.logprobs,
        top_logprobs=entry.top_logprobs,
        choice=entry.choice,
    )


def read_chunks(raws: Iterable[bytes], after: int = 0) -> list[Chunk]:
    """Chunks that follow one another, the first of which holds token `after`."""
    chunks: list[Chunk] = []
    reached = after
    for raw in raws:
        chunk = read_chunk(raw)
        if chunk.index > reached or (chunks and chunk.index < reached):
            raise DamagedJournal(f"no entry goes on from token {reached}")
        reached = chunk.index + len(chunk.token_ids)
        chunks.append(chunk)
    return chunks


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

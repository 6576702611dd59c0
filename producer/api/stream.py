"""A job's tokens as server-sent events.

The journal in Redis is the source, so a stream can be taken up again at any token, after a disconnect of the client as
after a crash of the group that computes them: the event id is the number of tokens so far, and `Last-Event-ID` resumes.
"""

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from hortator.producer.errors import JobFailed, StoreUnavailable, UnknownJob
from hortator.producer.job import Follower
from hortator.producer.schema import Chunk, Status

from .failures import Malformed
from .seam import AsyncStore
from .watch import Watch, Watcher

DONE_ID = "done"  # a browser that comes back with it has read everything
RETRY_MS = 1000  # what browsers wait before they come back
STORE_RETRY_S = 0.25
_DIGITS = re.compile(r"[0-9]{1,9}", re.ASCII)


def position(last_event_id: str | None, after: int) -> int | None:
    """The token to go on from; None if everything was read.  The header wins: a browser repeats the first URL."""
    if last_event_id is None:
        return after
    if last_event_id == DONE_ID:
        return None
    if not _DIGITS.fullmatch(last_event_id):
        raise Malformed("Last-Event-ID is not an id of this stream: a number of tokens")
    return int(last_event_id)


async def token_events(
    store: AsyncStore, watcher: Watcher, watch: Watch, *, after: int, keep_alive_s: float, outage_s: float
) -> AsyncGenerator[bytes, None]:
    """Chunks from token `after` on, then the final status.  What must end before that says so, to be resumed."""
    yield f"retry: {RETRY_MS}\n\n".encode()
    reader = Follower(watch.status.id, after)
    while not watcher.draining:
        status = watch.status  # before the chunks are read: what is terminal now has its whole journal already
        try:
            chunks = await store.chunks(reader.job_id, after=reader.after) if reader.behind(status) else []
        except StoreUnavailable:
            if watcher.away_s > outage_s:
                break
            await asyncio.sleep(STORE_RETRY_S)
            yield comment("the store is away")
            continue
        except JobFailed:  # the journal is damaged
            chunks = []
        for chunk in chunks:
            reader.take([chunk])
            yield chunk_event(chunk)
        if status.state.terminal:
            for chunk in unread(reader, status):
                yield chunk_event(chunk)
            yield done(status)
            return
        if reader.behind(status):
            yield interrupted("damaged", f"the journal of job {status.id} is damaged, its end will have all tokens")
            return
        try:
            if not await watch.changed(keep_alive_s):
                if watcher.away_s > outage_s:
                    break
                yield comment("still here")
        except UnknownJob as gone:  # the record expired under the reader
            yield error_event("error", gone.code, gone.message)
            return
    yield stopping() if watcher.draining else away(outage_s)


def stopping() -> bytes:
    return interrupted("server_stopping", "this server stops")


def away(outage_s: float) -> bytes:
    return interrupted(StoreUnavailable.code, f"Redis has been away for more than {outage_s:g} s")


def interrupted(code: str, why: str) -> bytes:
    """The job goes on, this stream does not.  Without an id, so that the client's last one stands."""
    return error_event("interrupted", code, f"{why}; come back with the last id as Last-Event-ID")


def error_event(kind: str, code: str, message: str) -> bytes:
    return event(json.dumps({"error": {"code": code, "message": message}}), kind=kind)


def unread(reader: Follower, status: Status) -> list[Chunk]:
    """What the journal, which expires first, holds no more; nothing for a reader in the middle: `done` has the text."""
    try:
        return reader.rest(status.result) if status.result is not None else []
    except UnknownJob:
        return []


def chunk_event(chunk: Chunk) -> bytes:
    tokens_so_far = chunk.index + len(chunk.token_ids)
    return event(chunk.model_dump_json(exclude_none=True), event_id=str(tokens_so_far))


def event(data: str, *, event_id: str | None = None, kind: str | None = None) -> bytes:
    """One event; JSON holds no line break, so one data line is enough."""
    fields = (("id", event_id), ("event", kind), ("data", data))
    return "".join(f"{name}: {value}\n" for name, value in fields if value is not None).encode() + b"\n"


def comment(text: str) -> bytes:
    return f": {text}\n\n".encode()


def done(status: Status) -> bytes:
    return event(status.model_dump_json(exclude_none=True), event_id=DONE_ID, kind="done")


class EventStream(StreamingResponse):
    """Sends events until they end, the client leaves, or it has stopped reading for too long."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], watch: Watch, *, send_timeout_s: float) -> None:
        super().__init__(events, headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        self._events, self._watch, self._send_timeout_s = events, watch, send_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._watch:
            await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        async def timed(message: Message) -> None:
            async with asyncio.timeout(self._send_timeout_s):
                await send(message)

        async with aclosing(self._events):
            await super().stream_response(timed)

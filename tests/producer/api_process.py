"""The API on a real socket and a real Redis, and a worker that the test plays itself."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import httpx
import redis
import uvicorn
from fastapi import FastAPI

from hortator.producer.api import ApiSettings, create_app
from hortator.producer.api.connection import Connection
from hortator.producer.api.server import Server, address_of, listen
from hortator.producer.embedded import EmbeddedRedis
from hortator.producer.redis_store import AsyncRedisStore, RedisStore
from hortator.producer.schema import Choice, Chunk, Failure, FinishReason, Result, State, Usage
from hortator.producer.store import Append, Claimed, GroupBeat, Outcome, Verdict

T = TypeVar("T")
MODEL = "demo"
JSON = {"content-type": "application/json"}


def job(prompt: str = "12+30=", **fields: Any) -> dict[str, Any]:
    """A job as a client writes it."""
    return {"model": MODEL, "prompt": prompt, **fields}


def wait_for(what: str, probe: Callable[[], T | None], timeout_s: float = 30.0) -> T:
    deadline = time.monotonic() + timeout_s
    while not (value := probe()):
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for: {what}"
        time.sleep(0.01)
    return value


def newest(servers: dict[str, EmbeddedRedis]) -> str:
    """URL of the newest Redis among the session's: the version plays no part over HTTP."""
    return list(servers.values())[-1].url


class Worker:
    """Claims, appends and commits as a leader would, one call at a time."""

    def __init__(self, store: RedisStore, name: str = "test-worker") -> None:
        self.store, self.name = store, name

    def beat(self) -> None:
        self.store.beat(GroupBeat(group=self.name, model=MODEL, running=0, capacity=8, epoch=1, state="ready"))

    def claim(self, limit: int = 8, *, lease_s: float = 30.0) -> tuple[Claimed, ...]:
        return self.store.claim(MODEL, owner=self.name, limit=limit, lease_s=lease_s, idle=True).jobs

    def say(self, claimed: Claimed, index: int, words: list[str]) -> None:
        """One token a word."""
        for offset, word in enumerate(words):
            chunk = Chunk(index=index + offset, token_ids=(index + offset,), text=word)
            signals = self.store.append([Append(claimed.lease, chunk)])
            assert not signals.lost, "the append was fenced"

    def succeed(self, claimed: Claimed, words: list[str]) -> None:
        result = Result(
            text="".join(words),
            token_ids=tuple(range(len(words))),
            finish_reason=FinishReason.STOP,
            usage=Usage(prompt_tokens=6, completion_tokens=len(words)),
        )
        self._commit(Outcome(claimed.lease, State.SUCCEEDED, result=result))

    def succeed_with(self, claimed: Claimed, texts: list[str]) -> None:
        """Several answers of one token each."""
        journal = [
            Append(claimed.lease, Chunk(index=n, token_ids=(n,), text=text, choice=n)) for n, text in enumerate(texts)
        ]
        self.store.append(journal)
        choices = tuple(
            Choice(index=n, text=text, token_ids=(n,), finish_reason=FinishReason.STOP) for n, text in enumerate(texts)
        )
        usage = Usage(prompt_tokens=6, completion_tokens=len(texts))
        result = Result(**choices[0].model_dump(exclude={"index"}), usage=usage, choices=choices)
        self._commit(Outcome(claimed.lease, State.SUCCEEDED, result=result))

    def fail(self, claimed: Claimed, code: str, message: str) -> None:
        self._commit(Outcome(claimed.lease, State.FAILED, failure=Failure(code=code, message=message)))

    def _commit(self, outcome: Outcome) -> None:
        assert self.store.commit([outcome]) == [Verdict.COMMITTED]

    def run_one(self, words: list[str] | None = None) -> str:
        """A whole job; its id."""
        words = words or ["4", "2"]
        [claimed] = wait_for("a job to claim", lambda: self.claim(1))
        self.say(claimed, 0, words)
        self.succeed(claimed, words)
        return claimed.lease.job_id


class Api:
    """A running API: `http` is a client of it, `worker` its fake worker."""

    def __init__(self, url: str, redis_url: str, server: Server, app: FastAPI) -> None:
        self.url, self.server, self.app = url, server, app
        self.http = httpx.Client(base_url=url, timeout=20.0, limits=httpx.Limits(max_connections=500))
        self.store = RedisStore(redis_url, timeout_s=5.0)
        self.redis = redis.Redis.from_url(redis_url)
        self.worker = Worker(self.store)

    def fresh(self) -> Self:
        """As if just started, on an empty Redis that knows the model."""
        self.redis.flushall()
        self.worker = Worker(self.store)
        self.worker.beat()
        return self

    def submit(self, prompt: str = "12+30=", *, key: str | None = None, **fields: Any) -> str:
        answer = self.http.post("/v1/jobs", json=job(prompt, **fields), headers=bearer(key))
        assert answer.status_code == 202, answer.text
        job_id: str = answer.json()["id"]
        return job_id


@contextmanager
def served(redis_url: str, **settings: Any) -> Iterator[Api]:
    """The API in a thread of its own, on any free port."""
    chosen = ApiSettings(**({"port": 0} | settings))
    sock = listen(chosen.host, chosen.port)
    ready = threading.Event()
    running: list[tuple[Server, FastAPI, asyncio.AbstractEventLoop]] = []

    async def serve() -> None:
        store = AsyncRedisStore(redis_url, timeout_s=2.0, connect_timeout_s=2.0)  # as `hortator serve` has it
        app = create_app(store, api_settings=chosen)
        server = Server(uvicorn.Config(app, http=Connection, ws="none", lifespan="on", log_level="warning"))
        running.append((server, app, asyncio.get_running_loop()))
        ready.set()
        try:
            await server.serve(sockets=[sock])
        finally:
            await store.aclose()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(10)
    server, app, _ = running[0]
    wait_for("the API to start", lambda: server.started)
    api = Api(address_of(sock), redis_url, server, app)
    try:
        yield api.fresh()
    finally:
        api.http.close()
        api.redis.close()
        server.should_exit = True
        thread.join(15)
        api.store.close()
        assert not thread.is_alive()


def bearer(key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


@dataclass(frozen=True)
class Event:
    """One server-sent event as a browser would see it."""

    kind: str
    data: str
    id: str | None

    @property
    def json(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(self.data)
        return parsed


def events(lines: Iterator[str], *, comments: list[str] | None = None) -> Iterator[Event]:
    """The event stream format, read as the standard says."""
    fields: dict[str, str] = {}
    for line in lines:
        if not line:
            if "data" in fields:
                yield Event(fields.get("event", "message"), fields["data"], fields.get("id"))
            fields = {}
        elif line.startswith(":"):
            if comments is not None:
                comments.append(line)
        else:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")

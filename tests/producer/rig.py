"""A store under test with the few things that its seam does not have: foreign pushes, other rules, passing time."""

import base64
import json
import time
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import redis

from hortator.producer.memory import MemoryStore
from hortator.producer.names import Names
from hortator.producer.redis_store import RedisStore
from hortator.producer.rules import Rules
from hortator.producer.schema import Chunk, FinishReason, Job, Result, State, Status, Usage
from hortator.producer.store import Append, Claim, DeadLetter, GroupBeat, Lease, Outcome, Store

MODEL = "tiny"
NAMESPACE = "test:"
LEASE_S = 60.0


class Rig(ABC):
    """One store and its surroundings."""

    store: Store

    @abstractmethod
    def push(self, raw: bytes, *, step: int = 0, model: str = MODEL) -> None:
        """What a foreign client's LPUSH does."""

    @abstractmethod
    def wait(self, seconds: float) -> None:
        """Let time pass on the store's clock."""

    @abstractmethod
    def rule(self, **changes: Any) -> None:
        """Other rules from now on."""

    def beat(self, model: str = MODEL) -> None:
        self.store.beat(GroupBeat("group", model, 0, 8, 1, "ready"))

    def enqueue(self, *prompts: str, **fields: Any) -> list[str]:
        """Ids of accepted jobs, one for each prompt."""
        return [receipt.job_id for receipt in self.store.enqueue([job(prompt, **fields) for prompt in prompts])]

    def claim(
        self,
        limit: int = 100,
        *,
        owner: str = "a",
        idle: bool = True,
        lease_s: float = LEASE_S,
        model: str = MODEL,
        surplus: int = 0,
    ) -> Claim:
        return self.store.claim(model, owner=owner, limit=limit, lease_s=lease_s, idle=idle, surplus=surplus)

    def claim_one(self, **how: Any) -> Lease:
        claim = self.claim(1, **how)
        assert len(claim.jobs) == 1
        return claim.jobs[0].lease

    def status(self, job_id: str) -> Status:
        status = self.store.statuses([job_id])[0]
        assert status is not None
        return status

    def state(self, job_id: str) -> State:
        return self.status(job_id).state

    def depth(self, model: str = MODEL) -> int:
        return next((queue.depth for queue in self.store.queues() if queue.model == model), 0)

    def letters(self) -> list[DeadLetter]:
        """Every dead letter with all that was kept of its message, newest first."""
        found = [self.store.dead_letter(letter.letter_id) for letter in self.store.dead_letters()]
        return [letter for letter in found if letter is not None]

    def reasons(self) -> list[str]:
        """Why each dead letter is one, oldest first."""
        return [letter.reason for letter in reversed(self.store.dead_letters())]


class MemoryRig(Rig):
    def __init__(self) -> None:
        self._skipped = 0.0
        self.memory = MemoryStore(clock=lambda: time.time() + self._skipped)
        self.store = self.memory
        self.beat()

    def push(self, raw: bytes, *, step: int = 0, model: str = MODEL) -> None:
        self.memory.push(model, raw, step=step)

    def wait(self, seconds: float) -> None:
        self._skipped += seconds

    def rule(self, **changes: Any) -> None:
        self.memory.rules = replace(self.memory.rules, **changes)


class RedisRig(Rig):
    def __init__(self, url: str) -> None:
        self.url = url
        self.names = Names(NAMESPACE)
        self.redis: Any = redis.Redis.from_url(url)
        self._rules = Rules()
        self._stores: list[RedisStore] = []
        self.rule()
        self.beat()

    def push(self, raw: bytes, *, step: int = 0, model: str = MODEL) -> None:
        self.redis.lpush(self.names.queue(model, step), raw)

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def rule(self, **changes: Any) -> None:
        self._rules = replace(self._rules, **changes)
        self.store = self.another()

    def another(self) -> RedisStore:
        """One more store with connections of its own, as another process has."""
        store = RedisStore(self.url, namespace=NAMESPACE, rules=self._rules, timeout_s=10, connect_timeout_s=5)
        self._stores.append(store)
        return store

    def all_keys(self, pattern: str = "*") -> list[str]:
        return [raw.decode() for raw in self.redis.keys(pattern)]

    def close(self) -> None:
        for store in self._stores:
            store.close()
        self.redis.close()


def job(prompt: str = "x", *, model: str = MODEL, **fields: Any) -> Job:
    return Job.model_validate({"prompt": prompt, "model": model} | fields)


def result(text: str = "done", tokens: tuple[int, ...] = (1, 2)) -> Result:
    usage = Usage(prompt_tokens=1, completion_tokens=len(tokens))
    return Result(text=text, token_ids=tokens, finish_reason=FinishReason.STOP, usage=usage)


def done(lease: Lease, text: str = "done") -> Outcome:
    return Outcome(lease, State.SUCCEEDED, result(text))


def tokens(lease: Lease, index: int, *token_ids: int, text: str | None = None) -> Append:
    return Append(lease, Chunk(index=index, token_ids=token_ids, text=text or "".join(f"<{t}>" for t in token_ids)))


def prompt_of(message: bytes) -> str:
    """The prompt inside a queued message."""
    args, kwargs, _ = json.loads(base64.b64decode(json.loads(message)["body"]))
    prompt = kwargs["prompt"] if "prompt" in kwargs else args[0]
    assert isinstance(prompt, str)
    return prompt


def prompts_of(claim: Claim) -> list[str]:
    return [prompt_of(one.message) for one in claim.jobs]


def foreign(job_id: str = "foreign-1", prompt: str = "hello", **changes: Any) -> bytes:
    """A message as a plain Celery client makes it; `changes` replace parts of its envelope."""
    body = base64.b64encode(json.dumps([[], {"prompt": prompt}, {"callbacks": None}]).encode()).decode()
    envelope = {
        "body": body,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": "llm.generate", "id": job_id, "argsrepr": "()"},
        "properties": {"correlation_id": job_id, "body_encoding": "base64", "delivery_tag": "t", "priority": 0},
    }
    return json.dumps(envelope | changes).encode()

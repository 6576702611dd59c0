"""Drives a Group as the Celery hub does: waits for its descriptor, polls, and keeps what came."""

import select
import time
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

import psutil

from hortator.topology.launch import Launcher
from hortator.workers.engine.step import Request, SamplingParams
from hortator.workers.group import Down, Event, Group, Ready, Stepped
from hortator.workers.settings import WorkerSettings

T = TypeVar("T", bound=Event)


def settings(**chosen: Any) -> WorkerSettings:
    """Two ranks that step an echo engine."""
    defaults: dict[str, Any] = {
        "model": "test",
        "engine": "tests.workers.rank_engines:magic",
        "device": "cpu",
        "tensor_parallel_size": 2,
        "restart_backoff_s": 0.1,
        "heartbeat_s": 0.3,
        "heartbeat_timeout_s": 1.5,
        "stall_timeout_s": 1.5,
    }
    return WorkerSettings(**defaults | chosen)


def alive(pid: int) -> bool:
    """Runs or is stopped; zombies are dead."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_for(what: str, probe: Callable[[], bool], timeout_s: float = 30.0) -> float:
    """Until the probe holds; how long it took."""
    started = time.monotonic()
    while not probe():
        assert time.monotonic() - started < timeout_s, f"waited {timeout_s:g} s for: {what}"
        time.sleep(0.01)
    return time.monotonic() - started


class Driver:
    """One group, closed at the end."""

    def __init__(self, *, launcher: Launcher | None = None, **chosen: Any) -> None:
        self.settings = settings(**chosen)
        self.group = Group(self.settings, launcher=launcher)
        self.events: list[Event] = []
        self._next_handle = 1
        self.group.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.group.close()

    def turn(self, timeout_s: float = 0.1) -> list[Event]:
        """One round of the hub."""
        select.select([self.group], [], [], timeout_s)
        events = self.group.poll()
        self.events += events
        return events

    def until(self, kind: type[T], probe: Callable[[T], object] = lambda _: True, timeout_s: float = 20) -> T:
        """The next event of that kind for which the probe holds."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for event in self.turn():
                if isinstance(event, kind) and probe(event):
                    return event
        raise AssertionError(f"no {kind.__name__} within {timeout_s:g} s; last: {self.events[-3:]}")

    def ready(self) -> Ready:
        return self.until(Ready)

    def down(self, timeout_s: float = 20) -> Down:
        return self.until(Down, timeout_s=timeout_s)

    def submit(self, prompt: bytes = b"hello", max_tokens: int = 5) -> int:
        """Admit one request; its handle."""
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        self.group.submit(admit=[Request(handle, tuple(prompt), SamplingParams(max_tokens=max_tokens))])
        return handle

    def tokens(self, handle: int) -> tuple[int, ...]:
        steps = [event for event in self.events if isinstance(event, Stepped)]
        return tuple(
            token_id
            for event in steps
            for gain in event.report.gains
            if gain.handle == handle
            for token_id in gain.token_ids
        )

    def said(self, handle: int) -> bytes:
        """Of a model whose tokens are bytes."""
        return bytes(self.tokens(handle))

    def answer(self, prompt: bytes = b"hello", max_tokens: int = 5, timeout_s: float = 20) -> bytes:
        """Admit one request and wait for its end."""
        return bytes(self.answer_tokens(prompt, max_tokens, timeout_s))

    def answer_tokens(self, prompt: bytes, max_tokens: int, timeout_s: float = 20) -> tuple[int, ...]:
        """The same for any model."""
        handle = self.submit(prompt, max_tokens)
        self.finished([handle], timeout_s)
        return self.tokens(handle)

    def finished(self, handles: Sequence[int], timeout_s: float = 20) -> None:
        left = set(handles)

        def probe(event: Stepped) -> bool:
            left.difference_update(handle for handle, _ in event.report.finished)
            return not left

        self.until(Stepped, probe, timeout_s)

    def busy(self) -> int:
        """Have the group at work for longer than any test; the handle."""
        handle = self.submit(b"work", 1_000_000)
        self.until(Stepped, lambda event: event.report.gains)
        return handle

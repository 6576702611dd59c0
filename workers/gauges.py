"""What a group says of itself, for people: in its beat and in `inspect stats`."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from .engine.step import EngineStats
from .group import Group


class Gauges:
    """Counts steps and tokens between two beats."""

    def __init__(self, group: Group, clock: Callable[[], float]) -> None:
        self._group = group
        self._clock = clock
        self._since = clock()
        self._last_step = self._num_steps = self._num_tokens = 0
        self._steps_per_s = self._tokens_per_s = 0.0

    def count(self, step: int, num_tokens: int) -> None:
        """Take a report: of this step, and of those since the last report."""
        self._num_steps += step - self._last_step if step > self._last_step else 1  # a new life begins with step 1
        self._last_step = step
        self._num_tokens += num_tokens

    def turn_over(self) -> None:
        """Rates are those since the last call."""
        now = self._clock()
        seconds = max(now - self._since, 1e-3)
        self._steps_per_s, self._tokens_per_s = self._num_steps / seconds, self._num_tokens / seconds
        self._num_steps = self._num_tokens = 0
        self._since = now

    def read(self, stats: EngineStats | None) -> dict[str, Any]:
        failure, outage = self._group.last_failure, self._group.outage
        found = stats.cached_tokens / stats.prompt_tokens if stats and stats.prompt_tokens else 0.0
        kv_use = 1 - stats.free_blocks / stats.total_blocks if stats and stats.total_blocks else 0.0
        return {
            "steps_per_s": round(self._steps_per_s, 1),
            "tokens_per_s": round(self._tokens_per_s, 1),
            "kv_use": round(kv_use, 3),
            "prefix_found": round(found, 3),  # share of the prompts' tokens that was cached, since the group's start
            "waiting": stats.waiting if stats else 0,
            "preemptions": stats.preemptions if stats else 0,
            "shortages": stats.shortages if stats else 0,  # steps computed in parts, for lack of memory
            "pids": list(self._group.pids.values()),
            "ranks": len(self._group.members),
            "last_failure": str(failure) if failure else None,
            "outage": asdict(outage) if outage else None,
            "given_up": self._group.given_up,
        }

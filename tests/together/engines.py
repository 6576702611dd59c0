"""Engines that misbehave on purpose; tests plug them in as `engine = "module:factory"`."""

import os
import time

from hortator.workers.engine.echo import EchoEngine
from hortator.workers.engine.step import StepOutput, StepPlan

STEP_S = 0.02
POISON = tuple(b"!poison!")
HANG = tuple(b"!hang!")


class SlowEcho(EchoEngine):
    """One token per job and step, a step takes 20 ms; a prompt that holds POISON aborts the last rank, HANG loops."""

    last_rank = False

    def apply(self, plan: StepPlan) -> int:
        self._poison = [request.handle for request in plan.admit if contains(request.prompt, POISON)]
        self._hang = [request.handle for request in plan.admit if contains(request.prompt, HANG)]
        return super().apply(plan)

    def execute(self) -> StepOutput:
        time.sleep(STEP_S)
        if self._poison and self.last_rank:
            os.abort()
        while self._hang and self.last_rank:
            time.sleep(0.1)
        return super().execute()


def contains(tokens: tuple[int, ...], needle: tuple[int, ...]) -> bool:
    return any(tokens[i : i + len(needle)] == needle for i in range(len(tokens)))

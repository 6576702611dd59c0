"""Engines that misbehave on purpose; tests plug them in as `engine = "tests.together.engines:slow_echo"`."""

import os
import time
from typing import Any

from hortator.workers.engine.echo import EchoEngine
from hortator.workers.engine.step import StepOutput, StepPlan
from hortator.workers.rank import RankConfig

STEP_S = 0.02
POISON = tuple(b"!poison!")
HANG = tuple(b"!hang!")


class SlowEcho(EchoEngine):
    """One token per job and step, 20 ms a step.  On the last rank a prompt with POISON aborts, one with HANG loops."""

    def __init__(self, *, misbehaves: bool, **options: Any) -> None:
        super().__init__(tokens_per_step=1, **options)
        self._misbehaves = misbehaves

    def apply(self, plan: StepPlan) -> int:
        digest = super().apply(plan)
        for request in plan.admit if self._misbehaves else ():
            if contains(request.prompt, POISON):
                os.abort()
            while contains(request.prompt, HANG):
                time.sleep(0.1)
        return digest

    def execute(self) -> StepOutput:
        time.sleep(STEP_S)
        return super().execute()


def slow_echo(config: RankConfig, _mesh: object) -> SlowEcho:
    """The factory that `engine` names."""
    assert config.max_model_len is not None
    return SlowEcho(misbehaves=config.last_rank, max_num_seqs=config.max_num_seqs, max_model_len=config.max_model_len)


def contains(tokens: tuple[int, ...], needle: tuple[int, ...]) -> bool:
    return any(tokens[i : i + len(needle)] == needle for i in range(len(tokens)))

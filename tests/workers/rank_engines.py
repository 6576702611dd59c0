"""Engines for tests of the group, plugged in as `engine = "tests.workers.rank_engines:NAME"`.

Prompts do magic: their first byte says what happens, their second one on which rank.
"""

import os
import time

from hortator.producer.errors import ConfigError
from hortator.workers.engine.echo import EchoEngine
from hortator.workers.engine.step import StepOutput, StepPlan
from hortator.workers.rank import RankConfig

ABORT, HANG, DIVERGE, RAISE = b"AHDR"


class Magic(EchoEngine):
    """One token per job and step, 5 ms a step."""

    def __init__(self, rank: int) -> None:
        super().__init__(tokens_per_step=1)
        self._rank = rank
        self._spell = 0

    def apply(self, plan: StepPlan) -> int:
        spells = [request.prompt[0] for request in plan.admit if request.prompt[1:2] == (ord(str(self._rank)),)]
        self._spell = next(iter(spells), 0)
        return super().apply(plan) ^ (self._spell == DIVERGE)

    def execute(self) -> StepOutput:
        time.sleep(0.005)
        if self._spell == ABORT:
            os.abort()
        if self._spell == RAISE:
            raise ZeroDivisionError("the test asked for it")
        while self._spell == HANG:
            time.sleep(0.01)
        return super().execute()


def magic(config: RankConfig, _mesh: object) -> Magic:
    return Magic(config.rank)


def crashes_at_load(config: RankConfig, _mesh: object) -> Magic:
    if config.rank == 1:
        raise OSError("the test's disk is broken")
    return Magic(config.rank)


def cannot_work(config: RankConfig, _mesh: object) -> Magic:
    if config.rank == 1:
        raise ConfigError("max_num_seqs=64 needs more memory than this device has: lower it")
    return Magic(config.rank)


def never_ready(config: RankConfig, _mesh: object) -> Magic:
    time.sleep(3600)
    return Magic(config.rank)

"""Engines for tests of the group, plugged in as `engine = "tests.workers.rank_engines:NAME"`.

Prompts do magic: their first byte says what happens, their second one on which rank.
"""

import time
from array import array

from hortator.producer.errors import ConfigError
from hortator.workers.engine.echo import EchoEngine
from hortator.workers.engine.step import StepOutput, StepPlan
from hortator.workers.lockstep import DistributedChannel
from hortator.workers.rank import RankConfig

HANG, DIVERGE, RAISE, SLOW, GARBLE = b"HDRSG"


class Magic(EchoEngine):
    """One token per job and step, 5 ms a step."""

    def __init__(self, rank: int) -> None:
        super().__init__(tokens_per_step=1)
        self._rank = rank
        self._spell = 0
        self._slow_steps = 0

    def apply(self, plan: StepPlan) -> int:
        spells = [request.prompt[0] for request in plan.admit if request.prompt[1:2] == (ord(str(self._rank)),)]
        self._spell = next(iter(spells), 0)
        return super().apply(plan) ^ (self._spell == DIVERGE)

    def execute(self) -> StepOutput:
        time.sleep(0.005)
        if self._spell == RAISE:
            raise ZeroDivisionError("the test asked for it")
        while self._spell == HANG:
            time.sleep(0.01)
        if self._spell == SLOW:
            self._slow_steps = 5
        if self._slow_steps:
            self._slow_steps -= 1
            time.sleep(0.5)
        return super().execute()


def magic(config: RankConfig, _mesh: object) -> Magic:
    if config.rank:
        garble_plans(bytes((GARBLE, *str(config.rank).encode())))
    return Magic(config.rank)


def garble_plans(spell: bytes) -> None:
    """This process gets plans with this prompt with one bit flipped, where the echo engine does not look."""
    wait, tokens = DistributedChannel.wait, array("i", list(spell)).tobytes()

    def garbled(self: DistributedChannel) -> bytes:
        frame = bytearray(wait(self))
        if tokens in frame:
            frame[frame.index(b"0.0")] ^= 2  # the temperature
        return bytes(frame)

    DistributedChannel.wait = garbled  # type: ignore[method-assign]


def crashes_at_load(config: RankConfig, _mesh: object) -> Magic:
    raise OSError(f"the disk of rank {config.rank} is broken")


def cannot_work(config: RankConfig, _mesh: object) -> Magic:
    raise ConfigError(f"max_num_seqs={config.max_num_seqs} needs more memory than this device has: lower it")

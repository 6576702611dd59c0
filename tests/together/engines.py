"""Engines that misbehave on purpose; tests plug them in as `engine = "tests.together.engines:slow_echo"`."""

import os
import signal
import time
from typing import Any

from hortator.workers.engine.echo import EchoEngine
from hortator.workers.engine.step import EngineInfo, EngineStats, StepOutput, StepPlan
from hortator.workers.rank import RankConfig, load_engine

STEP_S = 0.02
POISON = tuple(b"!poison!")
HANG = tuple(b"!hang!")
LEADER = tuple(b"!leader!")


class SlowEcho(EchoEngine):
    """One token per job and step, 20 ms a step.  On the last rank a prompt with POISON aborts, one with HANG loops, and
    one with LEADER takes the process away that started the rank, as a lack of memory does."""

    def __init__(self, *, misbehaves: bool, **options: Any) -> None:
        super().__init__(tokens_per_step=1, **options)
        self._misbehaves = misbehaves

    def apply(self, plan: StepPlan) -> int:
        digest = super().apply(plan)
        for request in plan.admit if self._misbehaves else ():
            if contains(request.prompt, POISON):
                os.abort()
            if contains(request.prompt, LEADER):
                os.kill(os.getppid(), signal.SIGKILL)
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


class LatePoison(EchoEngine):
    """One token per job and step, 1 ms a step.  A prompt "!late030!" aborts once one of its answers has 30 tokens."""

    def execute(self) -> StepOutput:
        time.sleep(0.001)
        for row in self._speaking.values():
            said = bytes(row.request.prompt)
            if said.startswith(b"!late") and row.position >= int(said[5:8]):
                os.abort()
        return super().execute()


def late_poison(config: RankConfig, _mesh: object) -> LatePoison:
    """The factory that `engine` names."""
    assert config.max_model_len is not None
    return LatePoison(max_num_seqs=config.max_num_seqs, max_model_len=config.max_model_len, tokens_per_step=1)


METER = "ENGINE_METER_FILE"


class Metered:
    """The paged engine; rank 0 writes the number of tokens that each step computes, also if nobody ever sees them."""

    def __init__(self, engine: Any, path: str | None) -> None:
        self._engine = engine
        self._meter = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600) if path else None

    @property
    def info(self) -> EngineInfo:
        return self._engine.info  # type: ignore[no-any-return]

    @property
    def idle(self) -> bool:
        return bool(self._engine.idle)

    @property
    def progress(self) -> int:
        return int(self._engine.progress)

    def stats(self) -> EngineStats:
        return self._engine.stats()  # type: ignore[no-any-return]

    def apply(self, plan: StepPlan) -> int:
        return int(self._engine.apply(plan))

    def execute(self) -> StepOutput:
        num_tokens = self._engine._batch.num_tokens
        output: StepOutput = self._engine.execute()
        if self._meter is not None:
            os.write(self._meter, b"%d\n" % num_tokens)
        return output


def metered(config: RankConfig, mesh: Any) -> Metered:
    """A factory that `engine` names; the file is named by the variable METER of the front's environment."""
    engine = load_engine(config.model_copy(update={"engine": "paged"}), mesh)
    return Metered(engine, os.environ.get(METER) if config.rank == 0 else None)


def contains(tokens: tuple[int, ...], needle: tuple[int, ...]) -> bool:
    return any(tokens[i : i + len(needle)] == needle for i in range(len(tokens)))

"""An echo engine that takes its time: one token per job and step, a step takes 10 ms."""

import time
from typing import Any

from hortator.workers.engine.echo import EchoEngine
from hortator.workers.engine.step import StepOutput

STEP_S = 0.01


class SlowEcho(EchoEngine):
    def execute(self) -> StepOutput:
        time.sleep(STEP_S)
        return super().execute()


def make(config: Any, mesh: Any) -> SlowEcho:
    return SlowEcho(max_num_seqs=config.max_num_seqs, max_model_len=config.max_model_len or 4096, tokens_per_step=1)

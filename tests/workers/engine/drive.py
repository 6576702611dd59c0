"""Drives an engine through its seam, as the lock-step leader does."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hortator.workers.engine.build import build_engine
from hortator.workers.engine.engine import PagedEngine
from hortator.workers.engine.parallel import Ranks, SingleRank
from hortator.workers.engine.step import Engine, Fault, Finish, Request, StepPlan

# Small enough that long prompts take several chunks, and that some requests must be preempted: 40 blocks, where the
# longest of mixed_requests needs 24.  A token of every test checkpoint takes 512 bytes.
TIGHT: dict[str, Any] = {"max_num_batched_tokens": 40, "block_size": 4, "kv_cache_bytes": 40 * 4 * 512}


def build(path: Path, mesh: Ranks | None = None, **changes: Any) -> PagedEngine:
    """A float32 engine with room to spare."""
    return build_engine(
        model_path=path,
        mesh=mesh or SingleRank(),
        **{"dtype": "float32", "kv_cache_bytes": 8_000_000, **changes},
    )


@dataclass
class Outcome:
    """Everything that an engine said, by handle."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[float | None]] = field(default_factory=dict)
    finished: dict[int, Finish] = field(default_factory=dict)
    faults: dict[int, Fault] = field(default_factory=dict)
    digests: list[int] = field(default_factory=list)


def step(engine: Engine, outcome: Outcome, *, admit: Sequence[Request] = (), cancel: Sequence[int] = ()) -> None:
    outcome.digests.append(engine.apply(StepPlan(len(outcome.digests), tuple(admit), tuple(cancel))))
    output = engine.execute()
    for token in output.tokens:
        outcome.tokens.setdefault(token.handle, []).append(token.token_id)
        outcome.logprobs.setdefault(token.handle, []).append(token.logprob)
    outcome.finished.update(output.finished)
    outcome.faults.update({fault.handle: fault for fault in output.faults})


def run(engine: Engine, requests: Sequence[Request], *, stagger: int | None = None) -> Outcome:
    """Admit all at once, or up to three a step (`stagger` seeds how many); run until idle."""
    outcome, todo, rng = Outcome(), list(requests), random.Random(stagger)
    while todo or not engine.idle:
        count = len(todo) if stagger is None else rng.choice((0, 1, 2, 3))
        admit, todo = todo[:count], todo[count:]
        step(engine, outcome, admit=admit)
        assert len(outcome.digests) < 20_000, "the engine makes no progress"
    return outcome

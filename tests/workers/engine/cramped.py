"""Engines whose process may take only so much more memory than it has:  python cramped.py CHECKPOINT COLOSSUS

Prints what each engine says in each of SCENES, and what is said of engines that cannot start for lack of memory.
COLOSSUS is a config.json alone, of a model with weights of 200 MB.
"""

import ctypes
import gc
import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hortator.workers.collector import spare_what_is_loaded
from hortator.workers.engine.cuda import reference
from hortator.workers.engine.cuda.runner import CudaRunner
from hortator.workers.engine.engine import Limits, PagedEngine
from hortator.workers.engine.model import load_model, read_config
from hortator.workers.engine.parallel import SingleRank
from hortator.workers.engine.shortage import OutOfMemory
from hortator.workers.engine.step import Request, SamplingParams
from tests.workers.engine.drive import Outcome, build, run, step
from tests.workers.engine.footprint import resident

MIB = 1 << 20
# A token's activations take about 100 KB, and all that is kept for it 1 KB.
WIDE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 8192,
    "num_hidden_layers": 2,  # what one that ran out of memory in the first has written is not all that others read
    "head_dim": 16,
    "max_position_embeddings": 4096,
}
COLOSSAL: dict[str, Any] = {**WIDE, "intermediate_size": 1 << 19}
SIZES: dict[str, Any] = {"max_num_seqs": 32, "max_model_len": 4096, "max_num_batched_tokens": 2048}
NUM_TOKENS = 6000  # of the KV pool
ROOM_MIB = 48
GIANT = 99
# What is freed goes back at once, and no thread has address space in reserve.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
SAMPLING = SamplingParams(max_tokens=4, ignore_eos=True)


def prompt(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple((7 * n + 31 * seed + n * n % 11) % 250 + 1 for n in range(count))


def several(*lengths: int) -> tuple[Request, ...]:
    return tuple(Request(handle, prompt(count, handle), SAMPLING) for handle, count in enumerate(lengths))


def readers(count: int) -> tuple[Request, ...]:
    """Their prompts begin as the giant's."""
    return tuple(Request(10 + n, prompt(300, GIANT) + prompt(9, n), SAMPLING) for n in range(count))


GIANT_REQUEST = Request(GIANT, prompt(1200, GIANT), SAMPLING)


@dataclass(frozen=True)
class Scene:
    """Who arrives at first, and who when those have got a token or two."""

    early: tuple[Request, ...]
    late: tuple[Request, ...] = ()

    @property
    def requests(self) -> list[Request]:
        return [*self.early, *self.late]


SCENES = {
    "a giant among others": Scene(several(10, 20, 30, 5, 6, 9), (GIANT_REQUEST, Request(7, prompt(8), SAMPLING))),
    "a crowd": Scene(several(*[130] * 9)),
    "readers of a giant's prompt": Scene(several(40), (GIANT_REQUEST, *readers(3))),
}


def plain(path: Path) -> PagedEngine:
    """As on a CPU."""
    return build(path, kv_cache_bytes=NUM_TOKENS * 1024, **SIZES)


def fused(path: Path) -> PagedEngine:
    """As on a GPU: a step is in flight while the next one is launched."""
    ranks, config = SingleRank(), read_config(path, dtype="float32")
    limits = Limits(num_blocks=NUM_TOKENS // 16, block_size=16, **SIZES)
    runner = CudaRunner(load_model(config, ranks), ranks, limits, operations=reference)
    return PagedEngine(config, runner, ranks=ranks, limits=limits)


ENGINES = {"plain": plain, "fused": fused}


def play(engine: PagedEngine, scene: Scene) -> Outcome:
    outcome = Outcome()
    step(engine, outcome, admit=scene.early)
    step(engine, outcome)
    step(engine, outcome, admit=scene.late)
    while not engine.idle:
        step(engine, outcome)
    return outcome


@contextmanager
def room(mib: int) -> Iterator[None]:
    """No more than so much address space beside what this process has."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (resident("VmSize") + mib * MIB, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def refusal(path: Path, **changes: Any) -> str:
    """What is said of an engine that there is no room for."""
    try:
        with room(ROOM_MIB):
            build(path, **{**SIZES, **changes})
    except OutOfMemory as error:
        return error.message
    return "it started"


def main(path: Path, colossus: Path) -> None:
    torch.set_num_threads(1)
    said: dict[str, Any] = {}
    for kind, make in ENGINES.items():
        engine = make(path)
        spare_what_is_loaded()  # as a rank does
        run(engine, [Request(0, prompt(9), SAMPLING)])  # what is made once and kept
        for name, scene in SCENES.items():
            before = engine.stats().shortages
            with room(ROOM_MIB):
                outcome = play(engine, scene)
            said[f"{kind}: {name}"] = asdict(outcome) | {"shortages": engine.stats().shortages - before}
        said[f"{kind}: with more room"] = asdict(run(engine, [GIANT_REQUEST]))
    said["pool"] = refusal(path, kv_cache_bytes=256 * MIB, max_num_seqs=100)
    said["weights"] = refusal(colossus, load_format="dummy")
    print(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""An engine whose process may take only so much more memory than it has:  python cramped.py CHECKPOINT

Prints, for each of SCENES, what the engine said and how often it lacked memory.
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

from hortator.workers.engine.step import Request, SamplingParams
from tests.workers.engine.drive import build, run
from tests.workers.engine.footprint import resident

MIB = 1 << 20
WIDE: dict[str, Any] = {"intermediate_size": 8192, "max_position_embeddings": 4096}  # a token takes 100 KB of a step
LIMITS: dict[str, Any] = {"max_num_batched_tokens": 2048, "kv_cache_bytes": 4096 * 512, "max_num_seqs": 32}
GIANT = 99
SAMPLING = SamplingParams(max_tokens=6, ignore_eos=True)


def prompt(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple((7 * n + 31 * seed + n * n % 11) % 250 + 1 for n in range(count))


def requests(*lengths: int) -> list[Request]:
    return [Request(handle, prompt(count, handle), SAMPLING) for handle, count in enumerate(lengths)]


def giant(count: int = 1900) -> Request:
    return Request(GIANT, prompt(count, GIANT), SAMPLING)


@dataclass(frozen=True)
class Scene:
    """Requests that arrive at once, and how much memory there is for them."""

    requests: list[Request]
    room_mib: int


SCENES = {
    "a giant among others": Scene([*requests(10, 20, 30)[:2], giant(), *requests(5, 6, 7, 8, 9)[2:]], 80),
    "too many at once": Scene(requests(*[200] * 9), 80),
    "those who read what a giant was to write": Scene(
        [giant(), *(Request(h, prompt(300, GIANT) + prompt(9, h), SAMPLING) for h in range(3)), *requests(8)[3:]], 80
    ),
}


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


def main(path: Path) -> None:
    torch.set_num_threads(1)
    engine = build(path, **LIMITS)
    run(engine, [Request(0, prompt(9), SAMPLING)])  # what is made once and kept
    said = {}
    for name, scene in SCENES.items():
        before = engine.stats().shortages
        with room(scene.room_mib):
            outcome = run(engine, scene.requests)
        said[name] = asdict(outcome) | {"shortages": engine.stats().shortages - before}
    print(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""How many threads a step uses on a CPU: as few as take no longer.

Threads shorten matrix products and nothing else.  In a step of single tokens through a small model little time goes
there; more threads then gain nothing, spin while they wait for each other, and keep cores from the front, Redis and
other ranks.  What counts as small depends on the machine as much as on the model, so it is found by trial when an
engine is built.
"""

import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from .parallel import Ranks, agree_on_minimum
from .scheduler import Batch, Row, Sequence
from .step import Request, SamplingParams

SLACK = 1.1
"""Half as many threads may take so much longer."""
LONG_S = 0.1
"""A step that takes longer than this with all threads is made of matrix products: nothing is tried then."""
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Threads:
    """How many threads for which steps."""

    few: int
    most: int
    small: int  # tokens in a step, up to which `few` do

    def use(self, num_tokens: int) -> None:
        """Those of a step with so many tokens, from now on, in the calling thread."""
        torch.set_num_threads(self.few if num_tokens <= self.small else self.most)

    def __str__(self) -> str:
        return f"{self.few}" + (f" ({self.most} beyond {self.small} tokens a step)" if self.few < self.most else "")


def threads_by_trial(
    step: Callable[[], object], ranks: Ranks, *, num_rows: int, clock: Callable[[], float] = time.perf_counter
) -> Threads:
    """The fewest threads that make `step`, one of `num_rows` single tokens, no longer; they do for steps of up to twice
    as many tokens (a short prompt beside the others).  Collective: all ranks of the group try together and agree.
    """
    most = few = torch.get_num_threads()
    halvings = (-agree_on_minimum(-most, ranks)).bit_length() - 1
    if halvings and _is_short(step, most, ranks, clock):
        for _ in range(halvings):
            half = max(1, few // 2)
            if not agree_on_minimum(int(_enough(step, half, few, clock)), ranks):
                break
            few = half
        torch.set_num_threads(most)
    return Threads(few, most, small=2 * num_rows)


def _is_short(step: Callable[[], object], threads: int, ranks: Ranks, clock: Callable[[], float]) -> bool:
    """On every rank; the first step is left out."""
    step()
    return agree_on_minimum(int(_time(step, threads, clock) <= LONG_S), ranks) == 1


def _enough(step: Callable[[], object], half: int, whole: int, clock: Callable[[], float]) -> bool:
    """Half the threads take no longer, by the medians of interleaved steps."""
    pairs = [(_time(step, half, clock), _time(step, whole, clock)) for _ in range(_ROUNDS)]
    return median(by_half for by_half, _ in pairs) <= SLACK * median(by_whole for _, by_whole in pairs)


def _time(step: Callable[[], object], threads: int, clock: Callable[[], float]) -> float:
    torch.set_num_threads(threads)
    begun = clock()
    step()
    return clock() - begun


def trial_batch(num_rows: int, context: int) -> Batch:
    """One token of each of so many sequences, the last one of `context` in its only block."""
    request = Request(0, (0,) * context, SamplingParams(max_tokens=1))
    rows = [
        Row(
            Sequence(request, context + 1, frozenset(), array("i", request.prompt), blocks=array("i", (block,))),
            start=context - 1,
            count=1,
            samples=True,
        )
        for block in range(num_rows)
    ]
    return Batch(tuple(rows), fresh_blocks=tuple(range(num_rows)))

"""Which layers of a model each pipeline stage holds.  Pure."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from math import isfinite

from .errors import TooManyStages

_TOLERANCE = 1e-9  # sums of floats in another order differ by less


def stage_layers(
    num_layers: int,
    num_stages: int,
    *,
    costs: Sequence[float] | None = None,
    first_extra: float = 0.0,
    last_extra: float = 0.0,
) -> tuple[range, ...]:
    """Contiguous layers for each stage, so that the most expensive stage is as cheap as possible: the slowest one sets
    the pace of all.  Among those, the stages are as equal as possible.

    `costs` are those of the layers (default: 1 each), `first_extra` and `last_extra` what the first and the last stage
    do besides (embedding, head), in the same unit.  Every stage has a layer.  Equal arguments give equal stages on
    every rank.  Raises TooManyStages, and ValueError for numbers that are no costs.
    """
    if not 1 <= num_stages <= num_layers:
        raise TooManyStages(f"{num_layers} layers cannot be cut into {num_stages} stages: use 1 to {num_layers}")
    weights = _weights(num_layers, costs, first_extra, last_extra)
    sums = [0.0, *accumulate(weights)]

    def largest(before: float, cost: float) -> float:
        return max(before, cost)

    limit, _ = _best_cuts(sums, num_stages, largest)

    def squares(before: float, cost: float) -> float:
        return before + cost**2 if cost <= limit * (1 + _TOLERANCE) else float("inf")

    _, cuts = _best_cuts(sums, num_stages, squares)
    return tuple(range(begin, end) for begin, end in pairwise(cuts))


def _weights(num_layers: int, costs: Sequence[float] | None, first: float, last: float) -> list[float]:
    """What each layer adds to its stage; an end's extra always goes with the layer at that end."""
    weights = [1.0] * num_layers if costs is None else [float(cost) for cost in costs]
    if len(weights) != num_layers:
        raise ValueError(f"{len(weights)} costs were given for {num_layers} layers")
    if bad := [cost for cost in (*weights, first, last) if not (isfinite(cost) and cost >= 0)]:
        raise ValueError(f"a cost must be a finite number of at least 0, got {bad[0]}")
    weights[0] += first
    weights[-1] += last
    return weights


def _best_cuts(
    sums: list[float], num_stages: int, merge: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]]:
    """The smallest score and its cuts: dynamic programming over (stages so far, layers so far).

    `sums[i]` is the cost of the first i layers; `merge(score so far, cost of a stage)` is the score with that stage.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for stage in range(num_stages):
        best = {
            end: min(
                (merge(score, sums[end] - sums[begin]), (*cuts, end))
                for begin, (score, cuts) in best.items()
                if begin < end
            )
            for end in range(stage + 1, len(sums))
        }
    return best[len(sums) - 1]

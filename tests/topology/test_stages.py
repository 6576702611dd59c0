"""Which layers each pipeline stage holds."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hortator.topology.errors import TooManyStages
from hortator.topology.stages import stage_layers

costs_ = st.lists(st.integers(0, 9), min_size=1, max_size=9)


def stage_costs(stages: tuple[range, ...], costs: list[int], first: int, last: int) -> list[float]:
    loads = [float(sum(costs[i] for i in stage)) for stage in stages]
    loads[0] += first
    loads[-1] += last
    return loads


@settings(max_examples=200)
@given(costs=costs_, num_stages=st.integers(1, 9), first=st.integers(0, 20), last=st.integers(0, 20))
def test_no_other_cut_has_a_cheaper_largest_stage(costs: list[int], num_stages: int, first: int, last: int) -> None:
    num_stages = min(num_stages, len(costs))
    stages = stage_layers(len(costs), num_stages, costs=costs, first_extra=first, last_extra=last)
    others = [
        tuple(range(a, b) for a, b in pairwise((0, *cuts, len(costs))))
        for cuts in combinations(range(1, len(costs)), num_stages - 1)
    ]
    rank = [(max(loads), sum(x * x for x in loads)) for s in others for loads in [stage_costs(s, costs, first, last)]]
    ours = stage_costs(stages, costs, first, last)
    assert (max(ours), sum(x * x for x in ours)) == min(rank)


@settings(max_examples=100)
@given(num_layers=st.integers(1, 80), num_stages=st.integers(1, 12), last=st.floats(0, 10))
def test_every_layer_is_in_one_stage_and_no_stage_is_empty(num_layers: int, num_stages: int, last: float) -> None:
    num_stages = min(num_stages, num_layers)
    stages = stage_layers(num_layers, num_stages, last_extra=last)
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    assert len(stages) == num_stages
    assert all(stages)


def test_equal_layers_differ_by_one_at_most() -> None:
    assert sorted(len(stage) for stage in stage_layers(11, 4)) == [2, 3, 3, 3]


def test_a_large_head_leaves_the_last_stage_fewer_layers() -> None:
    assert [len(stage) for stage in stage_layers(32, 2, last_extra=2.4)] == [17, 15]
    assert [len(stage) for stage in stage_layers(4, 4, last_extra=100)] == [1, 1, 1, 1]


def test_an_expensive_embedding_leaves_the_first_stage_fewer_layers() -> None:
    assert [len(stage) for stage in stage_layers(32, 2, first_extra=4, last_extra=2)] == [15, 17]


@pytest.mark.parametrize(("num_layers", "num_stages"), [(3, 4), (3, 0), (3, -1), (0, 1)])
def test_stages_that_no_layer_is_left_for_are_refused(num_layers: int, num_stages: int) -> None:
    with pytest.raises(TooManyStages, match=f"{num_layers} layers cannot be cut into {num_stages} stages"):
        stage_layers(num_layers, num_stages)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_numbers_that_are_no_costs_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite number"):
        stage_layers(3, 2, costs=[1.0, bad, 1.0])
    with pytest.raises(ValueError, match="2 costs were given for 3 layers"):
        stage_layers(3, 2, costs=[1.0, 1.0])

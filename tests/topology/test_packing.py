"""Groups onto free slots."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hortator.topology.packing import Demand, Part, pack

ANY = frozenset({0})
DEMANDS = st.lists(
    st.builds(Demand, st.integers(1, 5), st.integers(1, 5), st.frozensets(st.integers(0, 1), min_size=1)), max_size=8
)
HOSTS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 1)), min_size=1, max_size=8)


def packed(demands: list[Demand], free: list[int]) -> list[list[tuple[int, int]] | None]:
    """(host, units) of each group."""
    placed = pack(demands, free, [0] * len(free))
    return [None if parts is None else [(part.host, part.units) for part in parts] for parts in placed]


@settings(max_examples=100)
@given(demands=DEMANDS, hosts=HOSTS)
def test_nothing_is_used_twice_and_every_group_is_whole_and_where_it_may_be(
    demands: list[Demand], hosts: list[tuple[int, int]]
) -> None:
    free, kinds = [slots for slots, _ in hosts], [kind for _, kind in hosts]
    placed = pack(demands, free, kinds)
    used = [0] * len(free)
    for demand, parts in zip(demands, placed, strict=True):
        for part in parts or ():
            used[part.host] += part.units * demand.width
            assert kinds[part.host] in demand.kinds
        assert parts is None or sum(part.units for part in parts) == demand.count
        assert [part.host for part in parts or ()] == sorted({part.host for part in parts or ()})
    assert all(count <= slots for count, slots in zip(used, free, strict=True))
    assert placed == pack(demands, free, kinds)


@settings(max_examples=100)
@given(demands=DEMANDS, hosts=HOSTS)
def test_a_group_is_only_left_out_if_there_is_really_no_room_for_it(
    demands: list[Demand], hosts: list[tuple[int, int]]
) -> None:
    left, kinds = [slots for slots, _ in hosts], [kind for _, kind in hosts]
    placed = pack(demands, left, kinds)
    for demand, parts in zip(demands, placed, strict=True):
        for part in parts or ():
            left[part.host] -= part.units * demand.width
    for demand, parts in zip(demands, placed, strict=True):
        room = sum(n // demand.width for n, kind in zip(left, kinds, strict=True) if kind in demand.kinds)
        assert parts is not None or room < demand.count


@settings(max_examples=100)
@given(
    exponents=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12),
    num_hosts=st.integers(1, 6),
)
def test_powers_of_two_leave_no_gap(exponents: list[tuple[int, int]], num_hosts: int) -> None:
    """As long as there are slots enough in all, everything fits."""
    demands, room = [], 8 * num_hosts
    for width, count in exponents:
        demand = Demand(2**width, 2**count, ANY)
        if demand.slots <= room:
            demands.append(demand)
            room -= demand.slots
    assert None not in packed(demands, [8] * num_hosts)


def test_a_group_that_fits_a_host_stays_on_the_fullest_one_with_room() -> None:
    assert packed([Demand(1, 2, ANY)], [8, 3, 2, 2]) == [[(2, 2)]]


def test_a_group_that_fits_no_host_takes_the_emptiest_ones_in_the_hostfiles_order() -> None:
    assert packed([Demand(2, 6, ANY)], [4, 2, 8]) == [[(0, 2), (2, 4)]]


def test_the_last_part_of_a_large_group_goes_where_it_leaves_least() -> None:
    assert packed([Demand(4, 3, ANY)], [8, 8, 4]) == [[(0, 2), (2, 1)]]


@pytest.mark.parametrize(
    ("sizes", "free"),
    [
        ([(1, 3), (2, 1)], [1, 4]),  # only with the widest first
        ([(2, 1), (2, 2), (3, 1)], [5, 4]),  # only with the largest first
        ([(2, 2), (3, 2)], [4, 3, 3]),  # only in the given order
    ],
)
def test_each_order_places_what_the_others_do_not(sizes: list[tuple[int, int]], free: list[int]) -> None:
    assert None not in packed([Demand(width, count, ANY) for width, count in sizes], free)


def test_a_group_without_room_takes_nothing() -> None:
    assert packed([Demand(2, 3, ANY), Demand(1, 3, ANY)], [3, 3]) == [None, [(0, 3)]]
    assert pack([Demand(1, 1, frozenset({1}))], [8], [0]) == [None]
    assert pack([Demand(1, 1, frozenset({1}))], [8, 1], [0, 1]) == [(Part(1, 1),)]

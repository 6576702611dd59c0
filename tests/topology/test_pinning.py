"""Running groups stay where they are, and what is new gets what is left."""

from pathlib import Path

from hortator.topology.fleet import Fleet, ModelSpec
from hortator.topology.hostfilter import HostSlots
from hortator.topology.pinning import overlaps, plan_around
from hortator.topology.plan import PlannedGroup, Seats

HOSTS = [HostSlots("a", (0, 1)), HostSlots("b", (0, 1, 2, 3))]


def fleet(**sizes: int) -> Fleet:
    """Models of one replica each, with that many ranks."""
    models = (ModelSpec(name=name, path=Path("/m"), tensor_parallel_size=size) for name, size in sizes.items())
    return Fleet(models=tuple(models))


def seats(group: PlannedGroup) -> list[tuple[str, tuple[int, ...]]]:
    return [(seat.host, seat.devices) for seat in group.hosts]


def test_a_new_model_does_not_move_a_running_group() -> None:
    before = plan_around(fleet(small=2), HOSTS, {}, {})
    assert seats(before.groups[0]) == [("a", (0, 1))]
    empty = plan_around(fleet(small=1, large=2), HOSTS, {}, {})
    running = {"small-0": (Seats(host="b", devices=(3,)),)}
    made = plan_around(fleet(small=1, large=2), HOSTS, {}, running)
    assert {group.name: seats(group) for group in made.groups} == {
        "small-0": [("b", (3,))],
        "large-0": [("a", (0, 1))],
    }
    assert made.groups[0].ranks[0].host == "b"
    assert (made.num_free, empty.num_free) == (3, 3)


def test_the_slots_of_a_group_that_the_fleet_lacks_are_not_given_away() -> None:
    running = {"gone-0": (Seats(host="a", devices=(0, 1)),)}
    [group] = plan_around(fleet(m=2), HOSTS, {}, running).groups
    assert seats(group) == [("b", (0, 1))]


def test_replicas_that_are_missing_get_their_own_names() -> None:
    three = Fleet(models=(ModelSpec(name="m", path=Path("/m"), tensor_parallel_size=2, replicas=3),))
    running = {"m-1": (Seats(host="b", devices=(2, 3)),)}
    made = plan_around(three, HOSTS, {}, running)
    assert [group.name for group in made.groups] == ["m-0", "m-1", "m-2"]
    taken = [seat for group in made.groups for seat in seats(group)]
    assert sorted(taken) == [("a", (0, 1)), ("b", (0, 1)), ("b", (2, 3))]


def test_what_finds_no_room_beside_running_groups_is_planned_for_empty_hosts_and_overlaps_them() -> None:
    running = {"m-0": (Seats(host="b", devices=(0,)),)}
    made = plan_around(fleet(m=1, large=4), HOSTS, {}, running)
    [large] = [group for group in made.groups if group.name == "large-0"]
    assert seats(large) == [("b", (0, 1, 2, 3))]
    assert overlaps(large, running) == ["m-0"]


def test_a_group_whose_size_has_changed_gets_new_seats_beside_its_old_ones() -> None:
    running = {"m-0": (Seats(host="a", devices=(0,)),)}
    [group] = plan_around(fleet(m=2), HOSTS, {}, running).groups
    assert seats(group) == [("b", (0, 1))]

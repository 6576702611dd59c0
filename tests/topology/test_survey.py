"""Which link is slow, from figures that are made up; real links are measured in tests/together/nodes."""

from collections.abc import Callable

import pytest

from hortator.topology.findings import Finding, Grade
from hortator.topology.links import Flow, Measured, schedule
from hortator.topology.survey import Team, judge, waves

GB = 1e9
NAMES = ("a", "b", "c", "d")
Speed = Callable[[int, int], float]


def judged(speed: Speed, *, ranks: int = 4, latency: Speed = lambda a, b: 1e-4) -> list[Finding]:
    """What is not fine in a team whose links have these figures."""
    flows = [Flow(source=a, target=b, latency_s=latency(a, b), bytes_per_s=speed(a, b)) for a, b in schedule(ranks)]
    measured = [
        Measured(rank=r, flows=tuple(f for f in flows if f.source == r), broadcast_s=1e-3, all_reduce_s=1e-2)
        for r in range(ranks)
    ]
    team = Team("g", tuple((name, 0) for name in NAMES[:ranks]))
    return [finding for finding in judge(team, measured) if finding.grade is not Grade.OK]


def test_even_links_are_fine_though_they_vary() -> None:
    assert judged(lambda a, b: GB * (1 + (a - b) / 10)) == []


def test_one_slow_direction_of_one_link_is_named() -> None:
    [slow] = judged(lambda a, b: 0.1 * GB if (a, b) == (2, 1) else GB)
    assert (slow.grade, slow.hosts) == (Grade.FAIL, ("c", "b"))
    assert slow.text == "c -> b carries 100.0 MB/s, 10% of the usual 1.00 GB/s"


def test_of_two_hosts_the_slow_direction_is_named() -> None:
    [slow] = judged(lambda a, b: 0.1 * GB if a else GB, ranks=2)
    assert slow.text.startswith("b -> a carries")


def test_a_host_all_of_whose_links_are_slow_does_not_pass_for_usual() -> None:
    found = judged(lambda a, b: 0.01 * GB if 2 in (a, b) else GB, ranks=3)
    assert {finding.hosts for finding in found} == {("a", "c"), ("c", "a"), ("b", "c"), ("c", "b")}


def test_somewhat_slower_is_a_warning() -> None:
    assert [f.grade for f in judged(lambda a, b: 0.4 * GB if (a, b) == (0, 1) else GB)] == [Grade.WARN]


def test_a_link_that_takes_long_is_named() -> None:
    [late] = judged(lambda a, b: GB, latency=lambda a, b: 0.02 if (a, b) == (0, 3) else 1e-4)
    assert late.text == "a -> d takes 20.0 ms, usual are 0.10 ms"


@pytest.mark.parametrize(("ranks", "links"), [(2, 2), (4, 12), (8, 56), (9, 18), (64, 128)])
def test_large_teams_are_measured_along_a_ring(ranks: int, links: int) -> None:
    pairs = list(schedule(ranks))
    assert len(pairs) == len(set(pairs)) == links
    assert {rank for pair in pairs for rank in pair} == set(range(ranks))


def test_teams_that_share_a_host_take_turns() -> None:
    def team(name: str, *hosts: str) -> Team:
        return Team(name, tuple((host, 0) for host in hosts))

    turns = waves([team("one", "a", "b"), team("two", "b", "c"), team("three", "c", "d")])
    assert [[one.name for one in turn] for turn in turns] == [["one", "three"], ["two"]]


def test_on_cpus_one_rank_a_host_is_measured_on_gpus_all() -> None:
    seats = (("a", 0), ("a", 1), ("b", 0), ("b", 1))
    assert Team("g", seats).measured_seats == (("a", 0), ("b", 0))
    assert Team("g", seats, "cuda").measured_seats == seats

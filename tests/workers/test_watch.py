"""When a front may believe in its ranks."""

import pytest

from hortator.workers.watch import Watch

BEAT_S, TIMEOUT_S = 1.0, 3.0


def watched(*, until: float = 10.0) -> Watch:
    watch = Watch(BEAT_S, TIMEOUT_S)
    for tenth in range(int(until * 10) + 1):
        watch.look(tenth / 10, heard=tenth // 10, cpu_s=tenth / 100)
    return watch


def test_ranks_that_beat_are_believed_in() -> None:
    assert watched().steady(10.05)
    assert not watched().paused(10.05)


def test_nothing_is_believed_before_the_first_look() -> None:
    assert not Watch(BEAT_S, TIMEOUT_S).steady(0.0)


def test_a_gap_is_noticed_before_the_watcher_looks_again() -> None:
    assert not watched().steady(14.0)


def test_after_a_pause_ranks_that_gave_up_are_given_time_to_be_seen_gone() -> None:
    watch = watched()
    watch.look(14.0, heard=14.0, cpu_s=0.1)
    assert not watch.steady(14.9)
    assert watch.paused(14.9)
    for tenth in range(141, 152):
        watch.look(tenth / 10, heard=15.0, cpu_s=0.2)
    assert watch.steady(15.1)
    assert not watch.paused(15.1)


def test_a_front_that_was_busy_was_not_paused() -> None:
    watch = watched()
    watch.look(14.0, heard=14.0, cpu_s=0.1 + 3.9)
    assert not watch.paused(14.1)
    assert not watch.steady(14.1)


@pytest.mark.parametrize(("quiet_s", "steady"), [(1.9, True), (2.1, False)])
def test_a_silent_rank_is_doubted_before_it_is_given_up(quiet_s: float, steady: bool) -> None:
    watch = watched()
    for tenth in range(101, 131):
        watch.look(tenth / 10, heard=13.0 - quiet_s, cpu_s=0.1)
    assert watch.steady(13.0) is steady

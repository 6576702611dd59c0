"""Who is to blame when a group stands still."""

from hortator.topology.vitals import STARTUP_FACTOR, Cause, Vitals, silent, stalled


def rank(number: int, *, step: int = 5, progress: int = 50, still_s: float = 0.0, busy: bool = True) -> Vitals:
    return Vitals(number, 100 + number, "h", 0.0, ready=True, busy=busy, step=step, progress=progress, still_s=still_s)


def culprits(*ranks: Vitals) -> list[int]:
    return [number for trouble in stalled(ranks, timeout_s=5.0) for number in trouble.ranks]


def test_a_group_that_moves_is_left_alone() -> None:
    assert culprits(rank(0), rank(1, still_s=4.9)) == []


def test_the_rank_with_the_lowest_step_is_to_blame_not_those_that_wait_for_it() -> None:
    assert culprits(rank(0, step=6, still_s=5.5), rank(1, step=5, still_s=5.4), rank(2, step=6, still_s=5.5)) == [1]


def test_within_a_step_the_lowest_progress_is_to_blame() -> None:
    assert culprits(rank(0, progress=49, still_s=5.1), rank(1, progress=60, still_s=5.0)) == [0]


def test_ranks_that_stopped_at_the_same_place_are_named_together() -> None:
    assert culprits(rank(0, still_s=5.1), rank(1, still_s=4.9)) == [0, 1]


def test_waiting_for_a_slow_rank_that_moves_is_no_stall() -> None:
    assert culprits(rank(0, step=6, still_s=9.0), rank(1, step=5, still_s=0.2)) == []


def test_an_idle_rank_may_stand_still() -> None:
    assert culprits(rank(0, busy=False, still_s=99.0), rank(1, busy=False, still_s=99.0)) == []


def test_a_busy_rank_is_not_excused_by_idle_ones() -> None:
    assert culprits(rank(0, step=9, busy=False), rank(1, step=5, still_s=5.0)) == [1]


def test_a_rank_that_still_loads_is_not_judged_by_its_progress() -> None:
    loading = rank(1, still_s=99.0)
    loading.ready = False
    assert culprits(loading) == []


def test_a_silent_rank_is_named_with_pid_host_and_duration() -> None:
    (trouble,) = silent([rank(0), rank(1)][1:], now=3.5, timeout_s=3.0)
    assert (trouble.ranks, trouble.cause) == ((1,), Cause.SILENT)
    assert "rank 1 (pid 101 on h) has been silent for 3.5 s" in trouble.message


def test_a_loading_rank_may_be_silent_for_longer_but_not_for_ever() -> None:
    loading = rank(1)
    loading.ready = False
    assert silent([loading], now=3.5, timeout_s=3.0) == []
    assert silent([loading], now=3.0 * STARTUP_FACTOR + 0.1, timeout_s=3.0)

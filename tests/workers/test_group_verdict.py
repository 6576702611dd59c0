"""Which of several dead ranks was the cause, and when the next try comes."""

import time

import pytest

from hortator.topology.vitals import Cause, Trouble
from hortator.workers.rank import Exit
from hortator.workers.supervisor import HEALTHY_S, MAX_BACKOFF_S, Failure, Supervisor, verdict
from tests.topology.fake_launcher import FakeLauncher
from tests.workers.group_driver import settings

NAMES = {rank: f"rank {rank} (pid {rank} on h)" for rank in range(4)}


def gone(rank: int) -> Trouble:
    return Trouble((rank,), Cause.GONE, f"rank {rank} lost its connection")


def failed(rank: int, code: str, message: str = "why") -> Trouble:
    return Trouble((rank,), Cause.FAILED, message, code)


def test_a_killed_rank_is_the_cause_and_those_that_lost_it_are_not() -> None:
    troubles = [failed(0, "collective"), gone(0), gone(2)]
    assert verdict(troubles, {0: Exit.COLLECTIVE, 2: -9}, NAMES) == Failure("rank 2 (pid 2 on h) was killed by SIGKILL")


def test_what_a_rank_says_of_itself_counts_more_than_its_exit() -> None:
    troubles = [gone(1), failed(1, "lockstep", "digest")]
    assert verdict(troubles, {1: Exit.LOCKSTEP, 0: Exit.COLLECTIVE}, NAMES) == Failure("rank 1 (pid 1 on h): digest")


@pytest.mark.parametrize(
    "trouble", [failed(1, "config_error", "no model"), Trouble((1,), Cause.REFUSED, "rank 1 (pid 1 on h): no model")]
)
def test_a_configuration_error_is_final_whatever_else_happened(trouble: Trouble) -> None:
    failure = verdict([failed(0, "crash"), trouble], {0: Exit.CRASH}, NAMES)
    assert failure == Failure("rank 1 (pid 1 on h): no model", permanent=True)


def test_a_configuration_error_that_only_the_exit_code_tells_is_final_too() -> None:
    assert verdict([], {1: Exit.CONFIG}, NAMES).permanent


def test_a_silent_rank_is_named_even_if_others_noticed_by_themselves() -> None:
    silent = Trouble((3,), Cause.SILENT, "rank 3 is silent")
    assert verdict([failed(0, "collective"), gone(0), silent], {0: Exit.COLLECTIVE}, NAMES).reason == "rank 3 is silent"


def test_a_lost_remote_rank_is_named_before_the_local_ones_that_it_took_along() -> None:
    assert verdict([gone(0), gone(3)], {0: Exit.COLLECTIVE}, NAMES).reason == "rank 3 lost its connection"


def test_if_there_are_only_consequences_one_of_them_is_told() -> None:
    assert verdict([failed(2, "collective", "closed")], {}, NAMES).reason == "rank 2 (pid 2 on h): closed"
    assert verdict([], {1: Exit.COLLECTIVE}, NAMES).reason == "rank 1 exited with 75"


def test_an_exit_with_0_that_nobody_asked_for_is_a_failure() -> None:
    assert verdict([], {1: 0}, NAMES).reason == "rank 1 (pid 1 on h) exited with 0"


def supervisor() -> Supervisor:
    return Supervisor(settings(restart_backoff_s=0.5), FakeLauncher(), lambda _: None, environment={})


def test_pauses_double_up_to_a_limit_while_the_group_does_not_get_ready() -> None:
    boss = supervisor()
    assert [boss._backoff_s() for _ in range(5)] == [0.5, 1.0, 2.0, 4.0, 8.0]
    assert {boss._backoff_s() for _ in range(100)} == {16.0, MAX_BACKOFF_S}


def test_a_healthy_life_starts_from_the_shortest_pause_again() -> None:
    boss = supervisor()
    for _ in range(4):
        boss._backoff_s()
    boss._ready_since = time.monotonic() - HEALTHY_S - 1
    assert boss._backoff_s() == 0.5
    boss._ready_since = None
    assert boss._backoff_s() == 0.5

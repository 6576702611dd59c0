"""What ranks print, as it comes to the front's log."""

import pytest

from hortator.workers.ranklog import BURST_BYTES, BYTES_PER_S, RankLog

LINE = "x" * 100


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ranks(clock: Clock, caplog: pytest.LogCaptureFixture) -> RankLog:
    caplog.set_level("INFO", "hortator.rank")
    return RankLog(clock=clock)


def size(caplog: pytest.LogCaptureFixture) -> int:
    return sum(len(message) for message in caplog.messages)


def test_a_rank_that_prints_without_end_fills_no_disk_and_silences_no_other_rank(
    ranks: RankLog, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(40_000):
        clock.now += 0.0025
        ranks(0, LINE)
    assert BURST_BYTES < size(caplog) < 1.3 * (BURST_BYTES + 100 * BYTES_PER_S)
    ranks(1, "a word")
    assert caplog.messages[-1] == "[rank 1] a word"


def test_what_was_dropped_is_counted_and_told_when_there_is_room_again(
    ranks: RankLog, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    fits = BURST_BYTES // len(LINE)
    for _ in range(fits + 7):
        ranks(0, LINE)
    assert len(caplog.messages) == fits
    clock.now += 10.0
    ranks(0, "later")
    assert caplog.messages[-2:] == ["[rank 0] (hortator: 7 lines came too fast and were dropped)", "[rank 0] later"]


def test_what_was_dropped_is_told_at_the_latest_when_the_group_goes_down(
    ranks: RankLog, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(BURST_BYTES // len(LINE) + 3):
        ranks(0, LINE)
    ranks.flush()
    ranks.flush()
    assert [m for m in caplog.messages if "dropped" in m] == [
        "[rank 0] (hortator: 3 lines came too fast and were dropped)"
    ]

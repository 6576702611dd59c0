"""How long those who wait leave Redis alone."""

from types import SimpleNamespace

import pytest

from hortator.producer import job
from hortator.producer.job import MAX_POLL_S, MIN_POLL_S, Pace


def delays(*news: int, jobs: int = 1) -> list[float]:
    """The wait after each question."""
    pace, found = Pace(), []
    for some in news:
        pace.asking()
        delay = pace.delay(news=some, jobs=jobs)
        assert delay is not None
        found.append(delay)
    return found


def test_one_job_without_news_is_asked_about_less_and_less() -> None:
    found = delays(*[0] * 20)
    assert found == sorted(found)
    assert found[0] < 2 * MIN_POLL_S
    assert found[-1] == pytest.approx(MAX_POLL_S, rel=0.1)
    assert delays(*[0] * 20, 1)[-1] < 2 * MIN_POLL_S


def test_many_jobs_of_which_few_end_are_asked_about_at_most_so_much_less() -> None:
    much, few = delays(*[20] * 12, jobs=250), delays(*[2] * 12, jobs=250)
    assert max(much) < 0.07
    assert few[-1] == pytest.approx(2.5 * much[-1], rel=0.05)
    assert delays(*[2] * 12, 20, jobs=250)[-1] < 0.07


def test_ever_more_jobs_are_not_asked_about_ever_less() -> None:
    assert delays(*[1] * 12, jobs=100_000)[-1] == pytest.approx(MAX_POLL_S, rel=0.1)


def delay_after(asking_s: float, monkeypatch: pytest.MonkeyPatch, *, jobs: int = 1) -> float:
    """The wait after a question that took so long."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(job, "time", SimpleNamespace(monotonic=lambda: clock.now))
    pace = Pace()
    pace.asking()
    clock.now += asking_s
    delay = pace.delay(news=0, jobs=jobs)
    assert delay is not None
    return delay


def test_asking_takes_a_twentieth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert delay_after(0.04, monkeypatch) == pytest.approx(19 * 0.04)
    assert delay_after(1.0, monkeypatch, jobs=100_000) == pytest.approx(19)


def test_a_question_that_was_held_up_is_soon_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert delay_after(8.0, monkeypatch) < 1.1

"""An enqueue of many that is refused half-way: what is in, and how to go on."""

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from hortator.producer import AsyncClient, BadRequest, Client, HortatorError, IterableFailed, Job, QueueFull
from tests.producer.rig import Rig, job
from tests.producer.test_clients import asynchronously


class RowProblem(Exception):
    pass


def failing_at(number: int) -> Iterator[Job]:
    yield from (job(str(i)) for i in range(number))
    raise RowProblem


def wrong_at(number: int, wrong: Any) -> Iterator[Any]:
    return ({number: wrong}.get(i) or job(str(i)) for i in range(number + 10))


def refused(rig: Rig, jobs: Iterable[Job], *, how: str) -> HortatorError:
    """What either client raises for these jobs."""
    if how == "blocking":
        with pytest.raises(HortatorError) as caught:
            Client(rig.store).enqueue_many(jobs)
        return caught.value
    found: list[HortatorError] = []

    async def scenario(client: AsyncClient) -> None:
        with pytest.raises(HortatorError) as caught:
            await client.enqueue_many(jobs)
        found.append(caught.value)

    asynchronously(rig, scenario)
    return found[0]


both = pytest.mark.parametrize("how", ["blocking", "asyncio"])


@both
@pytest.mark.parametrize("number", [0, 700, 1000, 1500])
def test_of_an_iterable_that_raises_the_jobs_before_are_in(rig: Rig, number: int, how: str) -> None:
    error = refused(rig, failing_at(number), how=how)
    assert isinstance(error, IterableFailed)
    assert isinstance(error.__cause__, RowProblem)
    advice = f"the {number} before it are in (`accepted`): go on from there"
    assert str(error) == f"the iterable raised RowProblem for jobs[{number}]; {advice}"
    assert (len(error.accepted), error.index, rig.depth()) == (number, number, number)
    assert all(rig.store.statuses([handle.id for handle in error.accepted]))


@both
@pytest.mark.parametrize("wrong", [{"model": "m"}, "prompt", 7])
def test_what_is_no_job_is_refused_by_its_place_and_type(rig: Rig, wrong: Any, how: str) -> None:
    error = refused(rig, wrong_at(700, wrong), how=how)
    assert isinstance(error, BadRequest)
    assert str(error).startswith(f"wanted is a Job, got {type(wrong).__name__} as jobs[700]; the 700 before it are in")
    assert (len(error.accepted), error.index, rig.depth()) == (700, 700, 700)


@both
@pytest.mark.parametrize("jobs", [7, None, job()])
def test_what_cannot_be_iterated_for_jobs_is_refused(rig: Rig, jobs: Any, how: str) -> None:
    error = refused(rig, jobs, how=how)
    assert isinstance(error, BadRequest)
    assert str(error) == f"jobs: wanted is a list or another iterable of Job, got {type(jobs).__name__}"


@both
def test_of_jobs_that_the_store_refuses_half_way_the_handles_of_the_first_are_told(rig: Rig, how: str) -> None:
    rig.rule(max_queued_per_model=2500)
    error = refused(rig, (job(idempotency_key=str(i)) for i in range(4000)), how=how)
    assert isinstance(error, QueueFull)
    assert (2000 <= len(error.accepted) <= 2500, error.index) == (True, 2500)
    assert len(error.accepted) == rig.depth()
    assert error.__notes__ == [f"enqueue_many: the first {rig.depth()} jobs are in, see `accepted`"]


@both
def test_a_job_that_is_too_large_is_named_by_its_place_in_the_whole(rig: Rig, how: str) -> None:
    rig.rule(max_message_bytes=10_000)
    error = refused(rig, wrong_at(1700, job("x" * 10_000)), how=how)
    assert (type(error), error.index, len(error.accepted)) == (BadRequest, 1700, rig.depth())
    assert 1000 <= rig.depth() < 1700


def test_one_goes_on_after_what_is_in(rig: Rig) -> None:
    jobs = [job(str(i)) for i in range(900)]
    client = Client(rig.store)
    error = refused(rig, [*jobs[:700], None, *jobs[700:]], how="blocking")  # type: ignore[list-item]
    handles = [*error.accepted, *client.enqueue_many(jobs[len(error.accepted) :])]
    assert len({handle.id for handle in handles}) == rig.depth() == 900
    assert error.accepted[0].status().id == handles[0].id

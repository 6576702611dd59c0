"""A leader dies with its host: what it ran goes on elsewhere within five seconds, also where everybody is busy."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hortator.producer.redis_store import RedisStore
from hortator.producer.rules import Rules
from hortator.workers.settings import WorkerSettings
from tests.together.fleet import Fleet, Worker, assert_all_right, wait_for

WITHIN_S = 5.0
DEFAULT_LEASE_S = WorkerSettings.model_fields["lease_s"].default
TOKENS = 300  # at 20 ms each: nothing ends by itself in time


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One for all tests of this file, in which the last one kills a group."""
    with Fleet(Path(tmp_path_factory.mktemp("takeover"))) as running:
        yield running


@pytest.fixture(scope="module")
def groups(fleet: Fleet) -> list[Worker]:
    """Two groups of one rank each, with the leases that everybody has."""
    several = [
        fleet.worker(name, tensor_parallel_size=1, max_num_seqs=4, lease_s=DEFAULT_LEASE_S) for name in ("one", "two")
    ]
    return [group.ready(timeout_s=90) for group in several]


def ask(fleet: Fleet, number: int, max_tokens: int) -> dict[str, str]:
    prompts = [f"job {i} of many;" for i in range(number)]
    return dict(zip(fleet.enqueue(prompts, max_tokens=max_tokens), prompts, strict=True))


def holders(fleet: Fleet, asked: dict[str, str]) -> dict[str, str]:
    """Which group's leader has each job now."""
    redis: Any = fleet.store._redis
    names = fleet.store.names
    owners = {job_id: redis.hget(names.job(job_id), "owner") for job_id in asked}
    return {job_id: owner.decode().partition("#")[0] for job_id, owner in owners.items() if owner}


def test_a_job_that_kills_its_leader_is_convicted_by_the_second_that_dies(fleet: Fleet) -> None:
    short: dict[str, Any] = {"tensor_parallel_size": 1, "lease_s": 1.0}
    first = fleet.worker("first", **short).ready(timeout_s=90)
    [poison, innocent] = fleet.enqueue(["!leader!", "innocent;"], max_tokens=100)
    first.wait(30)
    assert fleet.worker("second", **short).wait(60) == -signal.SIGKILL
    time.sleep(1.5)
    with RedisStore(fleet.redis.url, rules=Rules(conviction_grace_s=0)) as store:
        assert store.sweep().poisoned == (poison,)
    assert fleet.status(innocent).state == "queued"
    assert [letter.job_id for letter in fleet.store.dead_letters()] == [poison]
    fleet.store.cancel([innocent])


def test_a_leader_that_was_stopped_for_four_seconds_and_wakes_answers_nothing_twice(
    fleet: Fleet, groups: list[Worker]
) -> None:
    asked = ask(fleet, 6, 150)
    wait_for("both groups at work", lambda: all(group.running() for group in groups))
    groups[0].signal(signal.SIGSTOP)
    time.sleep(4.0)  # longer than a lease; ranks bear 3.5 to 4.5 s, by when the last beat was
    groups[0].signal(signal.SIGCONT)
    done = fleet.finished(list(asked))
    assert_all_right(done, asked, 150)
    assert {status.attempt for status in done.values()} <= {1, 2}
    groups[0].ready(timeout_s=60)


def test_redis_stopped_for_longer_than_a_lease_takes_nothing_over(fleet: Fleet, groups: list[Worker]) -> None:
    asked = ask(fleet, 6, 100)
    wait_for("both groups at work", lambda: all(group.running() for group in groups))
    fleet.redis.pause()
    time.sleep(DEFAULT_LEASE_S + 1.0)
    fleet.redis.resume()
    done = fleet.finished(list(asked))
    assert_all_right(done, asked, 100)
    assert {status.attempt for status in done.values()} == {1}


def test_jobs_of_a_killed_leader_run_within_five_seconds_on_a_group_without_room(
    fleet: Fleet, groups: list[Worker]
) -> None:
    asked = ask(fleet, 10, TOKENS)  # five each: four rows, and one that waits in the engine
    wait_for("both groups full", lambda: all(group.running() == 5 for group in groups))
    held = [job_id for job_id, owner in holders(fleet, asked).items() if owner == "one"]
    spared = [job_id for job_id in asked if job_id not in held]
    groups[0].signal(signal.SIGKILL)
    killed = time.monotonic()
    wait_for(
        "all of its jobs run again", lambda: all(fleet.status(job_id).attempt == 2 for job_id in held), WITHIN_S + 5
    )
    taken_over_s = time.monotonic() - killed
    assert {fleet.status(job_id).attempt for job_id in spared} <= {0, 1}, "making room is not charged"
    fleet.store.cancel([*spared, *held[3:]])
    assert_all_right(fleet.finished(held[:3]), asked, TOKENS)
    assert taken_over_s < WITHIN_S

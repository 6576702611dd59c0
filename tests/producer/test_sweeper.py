"""A sweeper must not take an outage of Redis for dead leaders."""

import pytest

from hortator.producer.errors import StoreUnavailable
from hortator.producer.memory import MemoryStore
from hortator.producer.store import GroupBeat, Store, SweepReport
from hortator.producer.sweeper import Sweeper
from tests.producer.rig import MODEL, job

LEASE_S = 9.0


class Clock:
    """Turned by hand; the store and the sweepers share it."""

    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Flaky(MemoryStore):
    """Goes away, or takes long, on demand."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock=clock)
        self.turned = clock
        self.away = False
        self.slow_s = 0.0

    def sweep(self, *, limit: int = 1000, expired_before_ms: int | None = None) -> SweepReport:
        if self.away:
            raise StoreUnavailable("away")
        self.turned.now += self.slow_s
        self.slow_s = 0.0
        return super().sweep(limit=limit, expired_before_ms=expired_before_ms)


@pytest.fixture
def store() -> Flaky:
    store = Flaky(Clock())
    store.beat(GroupBeat("g", MODEL, 0, 1, 1, "ready"))
    store.enqueue([job()], job_ids=["j"])
    return store


def claim(store: Store) -> None:
    store.claim(MODEL, owner="a", limit=1, lease_s=LEASE_S, idle=True)


def ticks(sweeper: Sweeper, clock: Clock, seconds: int) -> list[str]:
    """What a tick each second requeued."""
    requeued: list[str] = []
    for _ in range(seconds):
        clock.now += 1
        requeued += sweeper.tick().requeued
    return requeued


def test_a_dead_leaders_jobs_are_requeued_after_its_lease(store: Flaky) -> None:
    sweeper = Sweeper(store, LEASE_S, clock=store.turned)
    ticks(sweeper, store.turned, 20)
    claim(store)
    assert ticks(sweeper, store.turned, 9) == []
    assert ticks(sweeper, store.turned, 3) == ["j"]


def test_a_new_sweeper_waits_a_lease_before_it_calls_anybody_dead(store: Flaky) -> None:
    claim(store)
    store.turned.now += 100
    sweeper = Sweeper(store, LEASE_S, clock=store.turned)
    assert ticks(sweeper, store.turned, 9) == []
    assert ticks(sweeper, store.turned, 3) == ["j"]


def test_after_an_outage_leaders_get_a_lease_of_time_to_renew(store: Flaky) -> None:
    sweeper = Sweeper(store, LEASE_S, clock=store.turned)
    ticks(sweeper, store.turned, 20)
    claim(store)
    store.away = True
    assert ticks(sweeper, store.turned, 30) == []
    store.away = False
    assert ticks(sweeper, store.turned, 9) == []
    assert ticks(sweeper, store.turned, 3) == ["j"]


def test_a_short_outage_counts_when_leases_are_short_too(store: Flaky) -> None:
    sweeper = Sweeper(store, 2.0, clock=store.turned)
    ticks(sweeper, store.turned, 20)
    store.claim(MODEL, owner="a", limit=1, lease_s=2.0, idle=True)
    ticks(sweeper, store.turned, 1)
    store.away = True
    ticks(sweeper, store.turned, 1)
    store.away = False
    assert ticks(sweeper, store.turned, 2) == []
    assert ticks(sweeper, store.turned, 3) == ["j"]


def test_a_stall_in_the_middle_of_a_sweep_is_an_outage_too(store: Flaky) -> None:
    sweeper = Sweeper(store, LEASE_S, clock=store.turned)
    ticks(sweeper, store.turned, 20)
    claim(store)
    ticks(sweeper, store.turned, 3)
    store.slow_s = 30.0  # Redis is stopped; when it goes on, this sweep may come before the leaders' renewals
    assert ticks(sweeper, store.turned, 1) == []
    assert ticks(sweeper, store.turned, 8) == []
    assert ticks(sweeper, store.turned, 4) == ["j"]


def test_a_sweeper_that_slept_itself_starts_anew(store: Flaky) -> None:
    sweeper = Sweeper(store, LEASE_S, clock=store.turned)
    ticks(sweeper, store.turned, 20)
    claim(store)
    store.turned.now += 60
    assert ticks(sweeper, store.turned, 8) == []


def test_deadlines_are_swept_from_the_first_tick(store: Flaky) -> None:
    store.enqueue([job(deadline_s=1)], job_ids=["late"])
    sweeper = Sweeper(store, LEASE_S, clock=store.turned)
    store.turned.now += 2
    assert sweeper.tick().expired == ("late",)

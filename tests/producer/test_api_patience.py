"""Patience with the store, without a server."""

import asyncio
import time

import pytest

from hortator.producer.api.patience import SLOTS, PatientStore, bounded
from hortator.producer.errors import StoreUnavailable
from hortator.producer.memory import MemoryStore
from hortator.producer.schema import Status


class Slow:
    """A store whose calls take a while, or for ever; counts those under way."""

    def __init__(self, delay_s: float | None) -> None:
        self.delay_s = delay_s
        self.under_way = self.most = self.calls = 0

    async def statuses(self, job_ids: list[str], *, tenant: str | None = None) -> list[Status | None]:
        self.calls += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await (asyncio.Event().wait() if self.delay_s is None else asyncio.sleep(self.delay_s))
        finally:
            self.under_way -= 1
        return MemoryStore().statuses(job_ids, tenant=tenant)


def patient(store: Slow, timeout_s: float) -> PatientStore:
    return PatientStore(store, timeout_s=timeout_s)  # type: ignore[arg-type]  # the one call that is made is there


def crowd(store: Slow, size: int, timeout_s: float) -> list[object]:
    async def all_at_once() -> list[object]:
        shared = patient(store, timeout_s)
        return list(await asyncio.gather(*(shared.statuses(["x"]) for _ in range(size)), return_exceptions=True))

    return asyncio.run(all_at_once())


def test_a_store_that_does_not_answer_is_given_up_in_time() -> None:
    began = time.monotonic()
    [error] = crowd(Slow(None), 1, 0.2)
    assert isinstance(error, StoreUnavailable)
    assert 0.15 < time.monotonic() - began < 5


def test_a_crowd_waits_its_turn_while_the_store_answers() -> None:
    store = Slow(0.05)
    assert crowd(store, 10 * SLOTS, 0.2) == [[None]] * (10 * SLOTS)
    assert store.most == SLOTS


def test_a_crowd_is_refused_at_once_when_the_store_does_not_answer() -> None:
    store = Slow(None)
    began = time.monotonic()
    errors = crowd(store, 10 * SLOTS, 0.2)
    assert all(isinstance(error, StoreUnavailable) for error in errors)
    assert time.monotonic() - began < 1.0, "in turns it would be two seconds"
    assert store.calls == SLOTS, "those who waited did not even ask"


def test_a_stall_of_this_process_is_no_outage_of_the_store() -> None:
    async def stalled() -> None:
        async with bounded(0.2):
            answer = asyncio.create_task(asyncio.sleep(0.1))
            await asyncio.sleep(0)
            time.sleep(0.5)  # the answer has long been there when the loop runs again
            await answer

    asyncio.run(stalled())


def test_a_waiter_that_is_cancelled_as_its_turn_comes_leaves_the_slot_to_the_others() -> None:
    async def scenario() -> list[object]:
        store = Slow(None)
        shared = patient(store, 5.0)
        holders = [asyncio.create_task(shared.statuses(["x"])) for _ in range(SLOTS)]
        await asyncio.sleep(0.01)
        unlucky = asyncio.create_task(shared.statuses(["x"]))
        await asyncio.sleep(0.01)
        shared._leave()  # hands it the slot, and before it can run:
        unlucky.cancel()
        await asyncio.gather(unlucky, return_exceptions=True)
        store.delay_s = 0.0
        answer = await asyncio.wait_for(shared.statuses(["x"]), 1)
        for holder in holders:
            holder.cancel()
        return list(answer)

    assert asyncio.run(scenario()) == [None]


def test_other_errors_pass_as_they_are() -> None:
    async def scenario() -> None:
        async with bounded(0.1):
            raise KeyError

    with pytest.raises(KeyError):
        asyncio.run(scenario())


def test_each_piece_of_many_statuses_has_its_own_time() -> None:
    """Reading the results of each takes a while."""

    class Large(Slow):
        async def statuses(self, job_ids: list[str], *, tenant: str | None = None) -> list[Status | None]:
            self.delay_s = 0.02 * len(job_ids)
            return await super().statuses(job_ids, tenant=tenant)

    found = asyncio.run(patient(Large(0.0), 1.0).statuses(["x"] * 100))
    assert found == [None] * 100

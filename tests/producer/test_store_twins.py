"""The memory twin and Redis do the same under the same calls, whatever their order."""

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hortator.producer.embedded import EmbeddedRedis
from hortator.producer.errors import HortatorError
from hortator.producer.schema import Failure, State, Status
from hortator.producer.store import Claim, Lease, Outcome, ReleaseReason
from tests.conftest import flushed
from tests.producer.rig import MemoryRig, RedisRig, Rig, done, foreign, job, tokens

LATER_S = 1000  # no time passes here: deadlines and leases have tests of their own
PRIORITIES = ("interactive", "standard", "batch")


class Twins(RuleBasedStateMachine):
    """Every rule does the same to both and compares what came back."""

    url = ""

    @initialize()
    def begin(self) -> None:
        self.redis_rig = RedisRig(self.url)
        self.redis_rig.redis.flushall()
        self.redis_rig.beat()
        self.rigs: tuple[Rig, Rig] = (MemoryRig(), self.redis_rig)
        for rig in self.rigs:
            rig.rule(max_queued_per_model=12, max_queued_per_tenant=8, max_attempts=4, max_letters=5)
        self.ids: list[str] = []
        self.leases: list[Lease] = []
        self.sent: list[bytes] = []

    def both(self, call: Any) -> Any:
        outcomes = []
        for rig in self.rigs:
            try:
                outcomes.append(call(rig))
            except HortatorError as error:
                outcomes.append((error.code, error.job_id))
        assert outcomes[0] == outcomes[1]
        return outcomes[0]

    @rule(
        count=st.integers(1, 4),
        priority=st.sampled_from(PRIORITIES),
        tenant=st.sampled_from(["t1", "t2"]),
        key=st.sampled_from([None, None, "k1", "k2"]),
        prompt=st.sampled_from(["p", "q"]),
        n=st.sampled_from([1, 1, 3]),
    )
    def enqueue(self, count: int, priority: str, tenant: str, key: str | None, prompt: str, n: int) -> None:
        ids = [f"job-{len(self.ids) + i}" for i in range(count)]
        sampling = {"temperature": 1.0, "n": n}
        jobs = [job(prompt, priority=priority, tenant=tenant, idempotency_key=key, sampling=sampling) for _ in ids]
        self.both(lambda rig: rig.store.enqueue(jobs, job_ids=ids))
        self.ids += ids

    @rule(step=st.sampled_from([0, 3, 6, 9]), which=st.integers(0, 3))
    def push_foreign(self, step: int, which: int) -> None:
        self.sent.append(foreign(f"foreign-{which}"))
        self.both(lambda rig: rig.push(self.sent[-1], step=step))
        self.ids.append(f"foreign-{which}")

    @rule(raw=st.sampled_from([b"", b"junk", foreign("bad", body=None), foreign("v2", headers={"id": "v2"})]))
    def push_odd(self, raw: bytes) -> None:
        self.both(lambda rig: rig.push(raw))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def push_again(self, data: st.DataObject) -> None:
        raw = data.draw(st.sampled_from(self.sent))
        self.both(lambda rig: rig.push(raw))

    @rule(limit=st.integers(0, 5), owner=st.sampled_from(["a", "b"]), idle=st.booleans())
    def claim(self, limit: int, owner: str, idle: bool) -> None:
        def shown(claim: Claim) -> Any:
            jobs = [(one.lease, one.message, one.tenant, one.deadline_ms is None, one.journal) for one in claim.jobs]
            return claim.mode, claim.full_run_alone, jobs

        _, _, jobs = self.both(lambda rig: shown(rig.claim(limit, owner=owner, idle=idle, lease_s=LATER_S)))
        self.leases += [one[0] for one in jobs]
        self.sent += [one[1] for one in jobs]

    def some(self, data: st.DataObject) -> list[Lease]:
        return data.draw(st.lists(st.sampled_from(self.leases), max_size=3, unique=True))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), index=st.integers(0, 3), count=st.integers(0, 2))
    def append(self, data: st.DataObject, index: int, count: int) -> None:
        appends = [tokens(lease, index, *range(count)) for lease in self.some(data)]
        self.both(lambda rig: rig.store.append(appends))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        leases = self.some(data)
        self.both(lambda rig: rig.store.renew(leases, owner="a", lease_s=LATER_S))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), state=st.sampled_from([State.SUCCEEDED, State.FAILED, State.CANCELLED]))
    def commit(self, data: st.DataObject, state: State) -> None:
        failure = Failure(code="c", message="m")
        outcomes = [
            done(lease) if state is State.SUCCEEDED else Outcome(lease, state, failure=failure)
            for lease in self.some(data)
        ]
        self.both(lambda rig: rig.store.commit(outcomes))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), reason=st.sampled_from(ReleaseReason))
    def release(self, data: st.DataObject, reason: ReleaseReason) -> None:
        leases = self.some(data)
        self.both(lambda rig: rig.store.release(leases, reason=reason))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def clear(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        self.both(lambda rig: rig.store.clear(lease))

    @precondition(lambda self: self.ids)
    @rule(data=st.data(), tenant=st.sampled_from([None, "t1"]))
    def cancel(self, data: st.DataObject, tenant: str | None) -> None:
        ids = data.draw(st.lists(st.sampled_from(self.ids), max_size=3))
        self.both(lambda rig: rig.store.cancel(ids, tenant=tenant))

    @rule()
    def replay_newest(self) -> None:
        def replay(rig: Rig) -> list[str]:
            return rig.store.replay([letter.letter_id for letter in rig.store.dead_letters(limit=1)])

        self.both(replay)

    @invariant()
    def they_look_the_same(self) -> None:
        if not hasattr(self, "ids"):
            return
        ids = [*dict.fromkeys(self.ids), "bad", "v2"]

        def shown(status: Status | None) -> Any:
            return status and status.model_dump(exclude={"timings"}), status and [
                value is None for _, value in status.timings
            ]

        self.both(lambda rig: [shown(status) for status in rig.store.statuses(ids)])
        self.both(lambda rig: rig.store.ended(ids))
        self.both(lambda rig: [rig.store.chunks(job_id) for job_id in ids])
        self.both(lambda rig: [(q.model, q.depth, q.running, q.suspects) for q in rig.store.queues()])
        self.both(lambda rig: [(one.model, one.job_id, one.reason, one.message) for one in rig.store.dead_letters()])

    def teardown(self) -> None:
        if hasattr(self, "redis_rig"):
            assert self.both(lambda rig: rig.depth()) >= 0
            self.redis_rig.close()


@pytest.fixture
def machine(redis_server: EmbeddedRedis) -> type[Twins]:
    return type("Machine", (Twins,), {"url": flushed(redis_server)})


def test_the_twins_agree(machine: type[Twins]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=int(os.environ.get("HORTATOR_TEST_EXAMPLES", "12")),  # hundreds by hand
            stateful_step_count=40,
            derandomize="HORTATOR_TEST_EXAMPLES" not in os.environ,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )

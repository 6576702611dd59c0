"""Somebody damaged single keys: each costs the job or the model that it belongs to, and nobody else."""

import pytest

from hortator.producer.schema import State, Status
from hortator.producer.store import ClaimMode, ReleaseReason
from tests.producer.rig import MemoryRig, RedisRig, Rig, done, prompts_of, tokens


def drop_message(rig: Rig, job_id: str) -> None:
    if isinstance(rig, MemoryRig):
        rig.memory._records[job_id].message = None
    elif isinstance(rig, RedisRig):
        rig.redis.delete(rig.names.message(job_id))


def assert_damaged(status: Status, part: str) -> None:
    assert status.state is State.FAILED
    assert status.failure is not None
    assert status.failure.code == "damaged"
    assert part in status.failure.message


# ---- what a job needs


def test_a_suspect_without_its_message_fails_and_the_next_one_is_told(rig: Rig) -> None:
    ids = rig.enqueue("a", "b", "c")
    rig.store.release([one.lease for one in rig.claim().jobs], reason=ReleaseReason.CRASHED)
    drop_message(rig, ids[2])  # the first in line
    claim = rig.claim()
    assert (claim.mode, prompts_of(claim)) == (ClaimMode.ALONE, ["b"])
    assert_damaged(rig.status(ids[2]), "message")
    rig.store.commit([done(claim.jobs[0].lease)])
    assert prompts_of(rig.claim()) == ["a"]
    assert rig.depth() == 0


def test_a_job_that_is_handed_back_without_its_message_fails_and_the_others_go_back(rig: Rig) -> None:
    ids = rig.enqueue("a", "b", "c")
    leases = [one.lease for one in rig.claim().jobs]
    drop_message(rig, ids[1])
    rig.store.release(leases, reason=ReleaseReason.DRAINED)
    assert_damaged(rig.status(ids[1]), "message")
    assert prompts_of(rig.claim()) == ["a", "c"]


def test_a_lost_reply_is_told_again_without_the_job_whose_message_is_gone(redis_rig: RedisRig) -> None:
    ids = redis_rig.enqueue("a", "b")
    redis_rig.claim()
    redis_rig.store._calls._seen.clear()  # type: ignore[attr-defined]
    drop_message(redis_rig, ids[0])
    assert prompts_of(redis_rig.claim()) == ["b"]
    assert_damaged(redis_rig.status(ids[0]), "message")


@pytest.mark.parametrize("damage", ["gone", "of another type", "a strange entry", "a gap"])
def test_a_job_whose_journal_is_damaged_fails_when_it_is_claimed_again(redis_rig: RedisRig, damage: str) -> None:
    ids = redis_rig.enqueue("a", "b")
    leases = [one.lease for one in redis_rig.claim().jobs]
    redis_rig.store.append([tokens(lease, 0, 1, 2) for lease in leases])
    redis_rig.store.append([tokens(lease, 2, 3) for lease in leases])
    redis_rig.store.release(leases, reason=ReleaseReason.DRAINED)
    journal, raw = redis_rig.names.journal(ids[0]), redis_rig.redis
    if damage == "a gap":
        raw.xdel(journal, "2-0")
    elif damage == "a strange entry":
        raw.xadd(journal, {"c": "x"}, id="4-0")
    else:
        raw.delete(journal)
        if damage == "of another type":
            raw.set(journal, "x")
    claim = redis_rig.claim()
    assert prompts_of(claim) == ["b"]
    assert [chunk.token_ids for chunk in claim.jobs[0].journal] == [(1, 2), (3,)]
    assert_damaged(redis_rig.status(ids[0]), "journal")
    assert redis_rig.depth() == 0

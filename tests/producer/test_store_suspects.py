"""Jobs that were running when a group died run alone; one that dies alone too is poison."""

import pytest

from hortator.producer.schema import State
from hortator.producer.store import ClaimMode, Lease, ReleaseReason, Signals
from tests.producer.rig import Rig, done, prompts_of, tokens


def crash(rig: Rig, *leases: Lease) -> None:
    rig.store.release(leases, reason=ReleaseReason.CRASHED)


def suspects(rig: Rig, *prompts: str) -> list[str]:
    """Jobs that crashed together once."""
    ids = rig.enqueue(*prompts)
    crash(rig, *(one.lease for one in rig.claim(len(prompts)).jobs))
    return ids


def test_a_crash_makes_suspects_of_all_that_ran(rig: Rig) -> None:
    ids = suspects(rig, "a", "b")
    assert [rig.state(job_id) for job_id in ids] == [State.QUEUED, State.QUEUED]
    [queue] = rig.store.queues()
    assert (queue.suspects, queue.depth, queue.running) == (2, 2, 0)


def test_an_idle_group_gets_exactly_one_suspect_to_run_alone(rig: Rig) -> None:
    ids = suspects(rig, "a", "b")
    rig.enqueue("innocent")
    claim = rig.claim(10, idle=True)
    assert claim.mode is ClaimMode.ALONE
    assert not claim.full_run_alone
    assert len(claim.jobs) == 1
    assert claim.jobs[0].lease.job_id in ids
    assert claim.jobs[0].lease.attempt == 2


def test_a_busy_group_is_asked_to_drain_and_others_go_on(rig: Rig) -> None:
    suspects(rig, "a")
    rig.enqueue("b", "c")
    assert rig.claim(1, owner="busy", idle=False).mode is ClaimMode.DRAIN
    other = rig.claim(1, owner="other", idle=False)
    assert (other.mode, prompts_of(other)) == (ClaimMode.TOGETHER, ["b"])
    again = rig.claim(1, owner="busy", idle=False)
    assert (again.mode, again.jobs) == (ClaimMode.DRAIN, ())
    drained = rig.claim(1, owner="busy", idle=True)
    assert (drained.mode, prompts_of(drained)) == (ClaimMode.ALONE, ["a"])
    assert rig.claim(1, owner="other", idle=False).mode is ClaimMode.TOGETHER


def test_a_dead_reserver_does_not_block_the_suspect(rig: Rig) -> None:
    suspects(rig, "a")
    assert rig.claim(1, owner="dies", idle=False, lease_s=0.05).mode is ClaimMode.DRAIN
    assert rig.claim(1, owner="next", idle=False).mode is ClaimMode.TOGETHER
    rig.wait(0.1)
    assert rig.claim(1, owner="next", idle=False).mode is ClaimMode.DRAIN


def test_any_idle_group_may_take_a_reserved_suspect(rig: Rig) -> None:
    suspects(rig, "a")
    rig.claim(1, owner="busy", idle=False)
    assert rig.claim(1, owner="idle", idle=True).mode is ClaimMode.ALONE
    rig.enqueue("b")
    assert prompts_of(rig.claim(1, owner="busy", idle=False)) == ["b"]


def test_a_job_that_kills_its_group_twice_is_poison(rig: Rig) -> None:
    [job_id] = suspects(rig, "bad")
    crash(rig, rig.claim_one())
    status = rig.status(job_id)
    assert status.state is State.FAILED
    assert status.failure is not None
    assert status.failure.code == "poison"
    [letter] = rig.letters()
    assert (letter.job_id, letter.reason) == (job_id, "poison")
    assert b'"task": "llm.generate"' in letter.message
    assert rig.claim().jobs == ()
    assert rig.depth() == 0


def test_the_innocents_of_a_crashed_batch_all_succeed(rig: Rig) -> None:
    ids = suspects(rig, "a", "bad", "c")
    crashes = 1
    while (claim := rig.claim(10, idle=True)).jobs:
        [one] = claim.jobs
        if prompts_of(claim) == ["bad"]:
            crash(rig, one.lease)
            crashes += 1
        else:
            rig.store.commit([done(one.lease)])
    assert [rig.state(job_id) for job_id in ids] == [State.SUCCEEDED, State.FAILED, State.SUCCEEDED]
    assert crashes == 2


def test_a_cleared_suspect_that_crashes_again_is_a_suspect_again(rig: Rig) -> None:
    [job_id] = suspects(rig, "a")
    lease = rig.claim_one()
    rig.store.clear(lease)
    crash(rig, lease)
    assert rig.state(job_id) is State.QUEUED
    claim = rig.claim(idle=True)
    assert (claim.mode, claim.full_run_alone) == (ClaimMode.ALONE, True)
    crash(rig, claim.jobs[0].lease)
    assert rig.state(job_id) is State.FAILED


def test_the_last_few_suspects_are_left_to_the_group_that_tries_them(rig: Rig) -> None:
    suspects(rig, *map(str, range(12)))
    assert rig.claim(1, owner="busy", idle=False).mode is ClaimMode.DRAIN
    for _ in range(4):
        rig.store.commit([done(rig.claim_one(owner="tester", lease_s=0.2))])
    assert rig.claim(1, owner="busy", idle=False).mode is ClaimMode.TOGETHER
    assert rig.claim(1, owner="tester", idle=False).mode is ClaimMode.DRAIN, "it makes room for the next itself"
    rig.claim_one(owner="tester", lease_s=0.05)
    rig.wait(0.1)
    assert rig.claim(1, owner="busy", idle=False).mode is ClaimMode.DRAIN, "the tester is dead or slow"


def test_a_group_without_room_hears_that_a_suspect_waits(rig: Rig) -> None:
    suspects(rig, "a")
    claim = rig.claim(0, idle=False)
    assert (claim.mode, claim.jobs) == (ClaimMode.DRAIN, ())


def test_a_suspect_is_convicted_of_a_silence_only_when_its_leader_is_dead_beyond_doubt(rig: Rig) -> None:
    rig.rule(conviction_grace_s=0.3)
    [job_id] = suspects(rig, "a")
    lease = rig.claim_one(lease_s=0.02)
    rig.wait(0.05)
    assert rig.store.sweep().poisoned == ()
    assert rig.store.renew([lease], owner="a", lease_s=0.02) == Signals(), "it was only stopped for a while"
    rig.wait(0.4)
    assert rig.store.sweep().poisoned == (job_id,)


def test_a_cleared_suspect_of_a_silent_leader_goes_on_elsewhere_at_once(rig: Rig) -> None:
    [job_id] = suspects(rig, "a")
    rig.store.clear(rig.claim_one(lease_s=0.02))
    rig.wait(0.05)
    assert rig.store.sweep().requeued == (job_id,)


def test_a_swept_lease_counts_as_a_crash(rig: Rig) -> None:
    rig.rule(conviction_grace_s=0)
    [job_id] = rig.enqueue("a")
    rig.claim_one(lease_s=0.02)
    rig.wait(0.05)
    assert rig.store.sweep().requeued == (job_id,)
    claim = rig.claim(idle=True, lease_s=0.02)
    assert claim.mode is ClaimMode.ALONE
    rig.wait(0.05)
    assert rig.store.sweep().poisoned == (job_id,)
    assert rig.state(job_id) is State.FAILED


def test_a_drained_suspect_stays_a_suspect(rig: Rig) -> None:
    suspects(rig, "a")
    rig.store.release([rig.claim_one()], reason=ReleaseReason.DRAINED)
    assert rig.store.queues()[0].suspects == 1
    assert rig.claim(idle=True).mode is ClaimMode.ALONE


def test_a_cleared_and_drained_suspect_may_be_batched(rig: Rig) -> None:
    suspects(rig, "a", "b")
    lease = rig.claim_one()
    rig.store.append([tokens(lease, 0, 1)])
    rig.store.clear(lease)
    rig.store.release([lease], reason=ReleaseReason.DRAINED)
    second = rig.claim(idle=True)
    assert second.mode is ClaimMode.ALONE
    rig.store.commit([done(second.jobs[0].lease)])
    claim = rig.claim(idle=True)
    assert (claim.mode, claim.jobs[0].lease.job_id) == (ClaimMode.TOGETHER, lease.job_id)
    assert len(claim.jobs[0].journal) == 1


def test_a_copy_of_a_suspects_message_does_not_run_it_in_company(rig: Rig) -> None:
    rig.enqueue("a")
    [claimed] = rig.claim().jobs
    crash(rig, claimed.lease)
    rig.push(claimed.message)
    rig.claim(1, owner="reserver", idle=False)
    assert rig.claim(10, owner="other", idle=False).jobs == ()
    assert rig.claim(10, owner="other", idle=True).mode is ClaimMode.ALONE


def test_a_cancelled_suspect_leaves_the_line(rig: Rig) -> None:
    [a, b] = suspects(rig, "a", "b")
    assert rig.store.cancel([a]) == [State.CANCELLED]
    [queue] = rig.store.queues()
    assert (queue.suspects, queue.depth) == (1, 1)
    assert rig.claim_one().job_id == b


def test_a_suspect_past_its_deadline_is_not_given_out(rig: Rig) -> None:
    [job_id] = rig.enqueue("a", deadline_s=0.1)
    crash(rig, rig.claim_one())
    rig.wait(0.15)
    claim = rig.claim(idle=True)
    assert (claim.mode, claim.jobs) == (ClaimMode.TOGETHER, ())
    assert rig.state(job_id) is State.EXPIRED


def test_a_cancel_that_the_crash_overtook_still_ends_the_job(rig: Rig) -> None:
    [a, b] = rig.enqueue("a", "b")
    leases = [one.lease for one in rig.claim().jobs]
    rig.store.cancel([a, b])
    rig.store.release(leases[:1], reason=ReleaseReason.CRASHED)
    rig.store.release(leases[1:], reason=ReleaseReason.DRAINED)
    assert [rig.state(a), rig.state(b)] == [State.CANCELLED, State.CANCELLED]


def test_endless_attempts_are_capped(rig: Rig) -> None:
    rig.rule(max_attempts=3)
    [job_id] = rig.enqueue("a")
    for _ in range(3):
        lease = rig.claim_one()
        rig.store.clear(lease)
        crash(rig, lease)
    failure = rig.status(job_id).failure
    assert failure is not None
    assert failure.code == "too_many_attempts"
    assert rig.reasons() == ["too_many_attempts"]


def test_draining_is_never_charged(rig: Rig) -> None:
    rig.rule(max_attempts=2)
    [job_id] = rig.enqueue("a")
    for _ in range(5):
        rig.store.release([rig.claim_one()], reason=ReleaseReason.DRAINED)
    assert rig.state(job_id) is State.QUEUED
    assert rig.status(job_id).attempt == 0


@pytest.mark.parametrize("count", [20])
def test_suspects_are_served_in_the_order_of_their_crash(rig: Rig, count: int) -> None:
    suspects(rig, *map(str, range(count)))
    order = []
    while (claim := rig.claim(idle=True)).jobs:
        order += prompts_of(claim)
        rig.store.commit([done(claim.jobs[0].lease)])
    assert sorted(order, key=int) == list(map(str, range(count)))

"""Cancel, deadlines, status: every accepted job becomes terminal, once, and tenants see only their own."""

from dataclasses import replace

import pytest

from hortator.producer import calls
from hortator.producer.schema import State
from hortator.producer.store import ReleaseReason, Verdict
from tests.producer.rig import RedisRig, Rig, done, foreign, job, tokens


def test_the_last_tokens_are_journalled_with_the_outcome(rig: Rig) -> None:
    [job_id] = rig.enqueue("x")
    lease = rig.claim_one()
    rig.store.append([tokens(lease, 0, 1, 2)])
    outcome = replace(done(lease), rest=tokens(lease, 2, 3).chunk)
    assert rig.store.commit([outcome]) == [Verdict.COMMITTED]
    assert rig.store.commit([outcome]) == [Verdict.COMMITTED], "its reply was lost"
    assert [chunk.index for chunk in rig.store.chunks(job_id)] == [0, 2]
    assert rig.status(job_id).num_tokens == 3


def test_an_outcome_that_is_all_of_the_journal_says_when_the_first_token_came(rig: Rig) -> None:
    [job_id] = rig.enqueue("x")
    lease = rig.claim_one()
    rig.store.commit([replace(done(lease), rest=tokens(lease, 0, 1).chunk)])
    assert rig.status(job_id).timings.first_token_ms is not None


def test_last_tokens_that_the_journal_cannot_take_do_not_stop_the_end(rig: Rig) -> None:
    [job_id] = rig.enqueue("x")
    lease = rig.claim_one()
    assert rig.store.commit([replace(done(lease), rest=tokens(lease, 7, 3).chunk)]) == [Verdict.COMMITTED]
    assert rig.state(job_id) is State.SUCCEEDED
    assert rig.store.chunks(job_id) == []


def test_a_queued_job_is_cancelled_at_once(rig: Rig) -> None:
    [a, b] = rig.enqueue("a", "b")
    assert rig.store.cancel([a]) == [State.CANCELLED]
    status = rig.status(a)
    assert status.state is State.CANCELLED
    assert status.failure is not None
    assert status.failure.code == "cancelled"
    assert [one.lease.job_id for one in rig.claim().jobs] == [b]


def test_a_running_job_hears_of_its_cancellation_twice(rig: Rig) -> None:
    [job_id] = rig.enqueue("a")
    lease = rig.claim_one()
    assert rig.store.cancel([job_id]) == [State.RUNNING]
    assert rig.store.renew([lease], owner="a", lease_s=60).cancelled == {job_id}
    assert rig.store.append([tokens(lease, 0, 1)]).cancelled == {job_id}


def test_a_leader_may_still_finish_a_cancelled_job(rig: Rig) -> None:
    [job_id] = rig.enqueue("a")
    lease = rig.claim_one()
    rig.store.cancel([job_id])
    assert rig.store.commit([done(lease)]) == [Verdict.COMMITTED]
    assert rig.store.cancel([job_id]) == [State.SUCCEEDED]


def test_cancelling_again_or_too_late_changes_nothing(rig: Rig) -> None:
    [a, b] = rig.enqueue("a", "b")
    assert rig.store.cancel([a]) == rig.store.cancel([a]) == [State.CANCELLED]
    rig.store.commit([done(rig.claim_one())])
    assert rig.store.cancel([b, a, "never", "no id!"]) == [State.SUCCEEDED, State.CANCELLED, None, None]


def test_a_queued_job_past_its_deadline_reads_as_expired(rig: Rig) -> None:
    [job_id] = rig.enqueue("a", deadline_s=0.03)
    rig.wait(0.06)
    status = rig.status(job_id)
    assert status.state is State.EXPIRED
    assert status.failure is not None
    assert status.failure.code == "expired"
    assert rig.claim().jobs == ()
    assert rig.depth() == 0


def test_a_job_past_its_deadline_is_never_given_out(rig: Rig) -> None:
    [late] = rig.enqueue("late", deadline_s=0.03)
    [fine] = rig.enqueue("fine")
    rig.wait(0.06)
    assert [one.lease.job_id for one in rig.claim().jobs] == [fine]
    assert rig.state(late) is State.EXPIRED


def test_a_sweep_ends_queued_jobs_past_their_deadline(rig: Rig) -> None:
    ids = rig.enqueue("a", "b", deadline_s=0.03)
    rig.enqueue("c", deadline_s=1000)
    rig.wait(0.06)
    assert sorted(rig.store.sweep().expired) == sorted(ids)
    assert rig.store.sweep().expired == ()
    assert rig.depth() == 1


def test_a_sweep_does_no_more_than_its_limit(rig: Rig) -> None:
    rig.enqueue(*"abcde", deadline_s=0.03)
    rig.wait(0.06)
    assert len(rig.store.sweep(limit=2).expired) == 2
    assert len(rig.store.sweep(limit=10).expired) == 3


def test_a_running_job_has_a_grace_after_its_deadline(rig: Rig) -> None:
    rig.rule(deadline_grace_s=0.15)
    [job_id] = rig.enqueue("a", deadline_s=0.05)
    lease = rig.claim_one()
    rig.wait(0.08)
    assert rig.store.sweep().expired == ()
    assert rig.state(job_id) is State.RUNNING
    rig.wait(0.2)
    assert rig.store.sweep().expired == (job_id,)
    assert rig.state(job_id) is State.EXPIRED
    assert rig.store.commit([done(lease)]) == [Verdict.FENCED]
    assert rig.store.renew([lease], owner="a", lease_s=1).lost == {job_id}
    assert rig.store.queues()[0].running == 0


def test_an_abandoned_job_past_its_deadline_reads_as_expired(rig: Rig) -> None:
    rig.rule(deadline_grace_s=0.01)
    [job_id] = rig.enqueue("a", deadline_s=0.03)
    rig.claim_one()
    rig.wait(0.08)
    assert rig.state(job_id) is State.EXPIRED


def test_the_leader_may_end_a_job_at_its_deadline_itself(rig: Rig) -> None:
    from hortator.producer.schema import Failure
    from hortator.producer.store import Outcome

    [job_id] = rig.enqueue("a", deadline_s=0.03)
    claim = rig.claim()
    assert claim.jobs[0].deadline_ms is not None
    assert claim.jobs[0].deadline_ms == claim.jobs[0].enqueued_ms + 30
    rig.wait(0.06)
    failure = Failure(code="expired", message="its deadline passed")
    assert rig.store.commit([Outcome(claim.jobs[0].lease, State.EXPIRED, failure=failure)]) == [Verdict.COMMITTED]
    assert rig.store.sweep().expired == ()
    assert rig.status(job_id).failure == failure


def test_a_requeued_job_keeps_its_deadline(rig: Rig) -> None:
    [job_id] = rig.enqueue("a", deadline_s=0.1)
    rig.store.release([rig.claim_one()], reason=ReleaseReason.DRAINED)
    rig.wait(0.15)
    assert rig.store.sweep().expired == (job_id,)


def test_statuses_come_in_the_order_asked_and_unknown_ones_are_none(rig: Rig) -> None:
    ids = rig.enqueue(*map(str, range(1200)))
    asked = [*reversed(ids), "never", "", "no id", "x" * 500, "hortator:job:x"]
    statuses = rig.store.statuses(asked)
    assert [status.id for status in statuses[:1200] if status] == asked[:1200]
    assert statuses[1200:] == [None] * 5


def test_ended_names_what_need_not_be_waited_for(rig: Rig) -> None:
    queued, running, over = rig.enqueue("a"), rig.enqueue("b"), rig.enqueue("c")
    late = rig.enqueue("d", deadline_s=0.05)
    rig.store.cancel(over)
    rig.wait(0.1)
    asked = ["never", *queued, *late, *running, *over, "no id"]
    assert rig.store.ended(asked) == ["never", *late, *over, "no id"]
    assert rig.state(late[0]) is State.EXPIRED
    assert rig.store.ended([*queued, *running], tenant="other") == [*queued, *running]
    many = rig.enqueue(*map(str, range(1200)))
    rig.store.cancel(many[::7])
    assert rig.store.ended(many) == many[::7]
    assert rig.store.ended([]) == []


def test_another_tenants_job_answers_as_one_that_never_was(rig: Rig) -> None:
    [receipt] = rig.store.enqueue([job(tenant="acme")])
    job_id = receipt.job_id
    assert rig.store.statuses([job_id], tenant="other") == [None]
    assert rig.store.cancel([job_id], tenant="other") == [None]
    assert not rig.store.issued(job_id, tenant="other")
    assert rig.store.statuses([job_id], tenant="acme")[0] is not None
    assert rig.state(job_id) is State.QUEUED
    assert rig.store.cancel([job_id], tenant="acme") == [State.CANCELLED]


def test_an_expired_record_is_gone_and_not_unknown(rig: Rig) -> None:
    rig.rule(result_ttl_s=0.05, journal_ttl_s=0.05)
    [job_id] = rig.enqueue("a")
    lease = rig.claim_one()
    rig.store.append([tokens(lease, 0, 1)])
    rig.store.commit([done(lease)])
    assert rig.state(job_id) is State.SUCCEEDED
    rig.wait(0.1)
    assert rig.store.statuses([job_id]) == [None]
    assert rig.store.chunks(job_id) == []
    assert rig.store.issued(job_id, tenant="default")
    assert not rig.store.issued("be611dc6-ca76-891c-bab7-ef2c4eec368a", tenant="default")
    assert not rig.store.issued("anything", tenant="default")
    assert not rig.store.issued(job_id.upper(), tenant="default")


def test_records_of_unfinished_jobs_do_not_expire(rig: Rig) -> None:
    rig.rule(result_ttl_s=0.03)
    [running, queued] = rig.enqueue("a", "b")
    rig.claim(1)
    rig.wait(0.08)
    assert (rig.state(running), rig.state(queued)) == (State.RUNNING, State.QUEUED)


def test_the_journal_may_expire_before_the_result(rig: Rig) -> None:
    rig.rule(result_ttl_s=60, journal_ttl_s=0.03)
    [job_id] = rig.enqueue("a")
    lease = rig.claim_one()
    rig.store.append([tokens(lease, 0, 1)])
    rig.store.commit([done(lease)])
    assert len(rig.store.chunks(job_id)) == 1
    rig.wait(0.08)
    assert rig.store.chunks(job_id) == []
    assert rig.state(job_id) is State.SUCCEEDED


def test_chunks_of_nothing_are_nothing(rig: Rig) -> None:
    assert rig.store.chunks("never") == []
    assert rig.store.chunks("no id!") == []
    [job_id] = rig.enqueue("a")
    assert rig.store.chunks(job_id, after=-5) == []


def test_a_job_that_names_no_deadline_ends_at_the_default_one(rig: Rig) -> None:
    """Promise 2: terminal, whether or not a worker ever comes."""
    rig.rule(default_deadline_s=0.03)
    [unasked, unread] = rig.enqueue("a", "b")
    rig.wait(0.06)
    assert rig.state(unasked) is State.EXPIRED
    assert rig.store.sweep().expired == (unread,)
    assert rig.depth() == 0


def test_a_jobs_own_deadline_wins_over_the_default_one(rig: Rig) -> None:
    rig.rule(default_deadline_s=0.03)
    [job_id] = rig.enqueue("a", deadline_s=100)
    rig.wait(0.06)
    assert rig.store.sweep().expired == ()
    assert rig.state(job_id) is State.QUEUED


def test_a_foreign_job_has_the_default_deadline_from_its_claim(rig: Rig) -> None:
    rig.rule(default_deadline_s=0.05, deadline_grace_s=0.0)
    rig.push(foreign("theirs"))
    [claimed] = rig.claim().jobs
    assert claimed.deadline_ms == claimed.enqueued_ms + 50
    rig.wait(0.08)
    assert rig.store.sweep().expired == ("theirs",)
    assert rig.state("theirs") is State.EXPIRED


def test_a_replayed_job_has_a_fresh_default_deadline(rig: Rig) -> None:
    rig.rule(default_deadline_s=0.05)
    [job_id] = rig.enqueue("a", deadline_s=100)
    [claimed] = rig.claim().jobs
    letter_id = rig.store.bury("tiny", claimed.message, reason="test", job_id=job_id)
    rig.store.commit([done(claimed.lease)])
    assert rig.store.replay([letter_id]) == [job_id]
    assert rig.state(job_id) is State.QUEUED
    rig.wait(0.08)
    assert rig.store.sweep().expired == (job_id,)


def test_an_id_whose_record_has_expired_may_be_used_again(rig: Rig) -> None:
    """By a Celery client that sends its task again, or by whoever chooses ids."""
    rig.rule(result_ttl_s=0.05, journal_ttl_s=3600)
    for life in range(2):
        rig.push(foreign("again"))
        rig.store.enqueue([job()], job_ids=["chosen"])
        leases = [one.lease for one in rig.claim().jobs]
        assert [lease.attempt for lease in leases] == [1, 1]
        assert rig.store.chunks("again") == rig.store.chunks("chosen") == []
        assert rig.store.append([tokens(lease, 0, 1, 2) for lease in leases]).lost == frozenset()
        assert rig.store.commit([done(lease) for lease in leases]) == [Verdict.COMMITTED] * 2
        assert rig.status("again").num_tokens == 2, life
        rig.wait(0.1)


def test_a_journal_never_outlives_its_record(rig: Rig) -> None:
    rig.rule(result_ttl_s=60, journal_ttl_s=3600)
    assert rig.store.rules.journal_ttl_s == 60  # type: ignore[attr-defined]


def test_the_results_of_many_jobs_are_told_in_order_however_large_they_are(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "STATUSES_BYTES", 3000)
    ids = rig.enqueue(*"abcdefghij")
    leases = [one.lease for one in rig.claim().jobs]
    rig.store.commit([done(lease, text=lease.job_id * 100) for lease in leases[:8]])
    statuses = rig.store.statuses([*ids, "unknown", ids[0]])
    assert [status and status.id for status in statuses] == [*ids, None, ids[0]]
    assert [status.result.text for status in statuses if status and status.result] == [
        job_id * 100 for job_id in [*(lease.job_id for lease in leases[:8]), ids[0]]
    ]


def test_one_reply_holds_a_bounded_part_of_the_results(redis_rig: RedisRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "STATUSES_BYTES", 3000)
    ids = redis_rig.enqueue(*"abcdefgh")
    redis_rig.store.commit([done(one.lease, text="x" * 1000) for one in redis_rig.claim().jobs])
    store = redis_rig.another()
    told = [len(store._run(call)) for call in store._calls.statuses(ids, None)]
    assert (sum(told), max(told)) == (8, 3)

"""Claim, renew, append, commit: at least once executed, exactly one visible result."""

import pytest

from hortator.producer.schema import Failure, State
from hortator.producer.store import ClaimMode, Lease, Outcome, ReleaseReason, Signals, Verdict
from tests.producer.rig import MODEL, Rig, done, foreign, job, prompts_of, result, tokens


def test_a_claim_takes_no_more_than_its_limit(rig: Rig) -> None:
    rig.enqueue(*"abcde")
    assert prompts_of(rig.claim(2)) == ["a", "b"]
    assert prompts_of(rig.claim(2)) == ["c", "d"]
    assert prompts_of(rig.claim(2)) == ["e"]
    assert rig.claim(2).jobs == ()
    assert rig.claim(0).jobs == ()


def test_a_claimed_job_is_running_under_its_first_attempt(rig: Rig) -> None:
    [job_id] = rig.enqueue("x", tenant="acme")
    claim = rig.claim()
    assert claim.mode is ClaimMode.TOGETHER
    assert claim.jobs[0].lease == Lease(job_id, 1)
    assert claim.jobs[0].tenant == "acme"
    status = rig.status(job_id)
    assert (status.state, status.attempt) == (State.RUNNING, 1)
    assert status.timings.claimed_ms is not None
    assert abs(claim.now_ms - status.timings.claimed_ms) < 5000


def test_a_commit_ends_the_job_with_its_result(rig: Rig) -> None:
    [job_id] = rig.enqueue("x")
    lease = rig.claim_one()
    assert rig.store.commit([done(lease, "answer")]) == [Verdict.COMMITTED]
    status = rig.status(job_id)
    assert (status.state, status.result) == (State.SUCCEEDED, result("answer"))
    assert status.timings.finished_ms is not None
    assert rig.store.queues()[0].running == 0


@pytest.mark.parametrize("state", [State.FAILED, State.CANCELLED, State.EXPIRED])
def test_a_commit_without_a_result_says_why(rig: Rig, state: State) -> None:
    [job_id] = rig.enqueue("x")
    failure = Failure(code="engine_error", message='quotes " and ünïcode \n')
    rig.store.commit([Outcome(rig.claim_one(), state, failure=failure)])
    status = rig.status(job_id)
    assert (status.state, status.failure, status.result) == (state, failure, None)


def test_only_terminal_outcomes_can_be_committed(rig: Rig) -> None:
    rig.enqueue("x")
    lease = rig.claim_one()
    with pytest.raises(ValueError, match="terminal"):
        rig.store.commit([Outcome(lease, State.RUNNING)])
    with pytest.raises(ValueError, match="SUCCEEDED"):
        rig.store.commit([Outcome(lease, State.SUCCEEDED)])


def test_a_second_outcome_is_fenced_and_the_same_one_is_not(rig: Rig) -> None:
    [job_id] = rig.enqueue("x")
    lease = rig.claim_one()
    rig.store.commit([done(lease, "first")])
    assert rig.store.commit([done(lease, "second")]) == [Verdict.FENCED]
    assert rig.store.commit([Outcome(lease, State.FAILED)]) == [Verdict.FENCED]
    assert rig.store.commit([done(lease, "first")]) == [Verdict.COMMITTED]  # its reply was lost
    assert rig.status(job_id).result == result("first")


def test_a_late_attempt_can_change_nothing(rig: Rig) -> None:
    [job_id] = rig.enqueue("x")
    old = rig.claim_one()
    rig.store.release([old], reason=ReleaseReason.DRAINED)
    new = rig.claim_one(owner="b")
    assert new.attempt > old.attempt
    assert rig.store.commit([done(old, "late")]) == [Verdict.FENCED]
    assert rig.store.append([tokens(old, 0, 7)]).lost == {job_id}
    assert rig.store.renew([old], owner="a", lease_s=9).lost == {job_id}
    rig.store.clear(old)
    rig.store.release([old], reason=ReleaseReason.CRASHED)
    assert rig.state(job_id) is State.RUNNING
    assert rig.store.chunks(job_id) == []
    assert rig.store.commit([done(new, "good")]) == [Verdict.COMMITTED]


def test_leases_of_jobs_that_never_were_are_lost(rig: Rig) -> None:
    ghost = Lease("ghost", 1)
    assert rig.store.renew([ghost], owner="a", lease_s=1).lost == {"ghost"}
    assert rig.store.append([tokens(ghost, 0, 1)]).lost == {"ghost"}
    assert rig.store.commit([done(ghost)]) == [Verdict.FENCED]
    rig.store.release([ghost], reason=ReleaseReason.CRASHED)
    rig.store.clear(ghost)


def test_nothing_to_do_is_fine(rig: Rig) -> None:
    assert rig.store.renew([], owner="a", lease_s=1) == Signals()
    assert rig.store.append([]) == Signals()
    assert rig.store.commit([]) == []
    assert rig.store.replay([]) == []
    assert rig.store.cancel([]) == []
    assert rig.store.statuses([]) == []
    rig.store.release([], reason=ReleaseReason.DRAINED)


def test_drained_jobs_are_served_next_in_their_order_and_not_charged(rig: Rig) -> None:
    ids = rig.enqueue(*"abc")
    rig.enqueue("d")
    leases = [one.lease for one in rig.claim(3).jobs]
    rig.store.release(leases, reason=ReleaseReason.DRAINED)
    assert [rig.status(job_id).attempt for job_id in ids] == [0, 0, 0]
    claim = rig.claim()
    assert prompts_of(claim) == ["a", "b", "c", "d"]
    assert claim.jobs[0].lease.attempt == 2  # the fence never repeats
    assert rig.status(ids[0]).attempt == 1


def test_a_drained_job_goes_back_to_its_own_class(rig: Rig) -> None:
    rig.enqueue("b", priority="batch")
    lease = rig.claim_one()
    rig.store.release([lease], reason=ReleaseReason.DRAINED)
    rig.enqueue(*"iiiii", priority="interactive")
    assert prompts_of(rig.claim())[0] == "i"


def test_journal_tokens_come_back_in_order_and_from_any_token(rig: Rig) -> None:
    [job_id] = rig.enqueue("x")
    lease = rig.claim_one()
    for index, ids in ((0, (5,)), (1, (6, 7)), (3, (8,))):
        assert rig.store.append([tokens(lease, index, *ids)]) == Signals()
    assert [chunk.token_ids for chunk in rig.store.chunks(job_id)] == [(5,), (6, 7), (8,)]
    assert [chunk.index for chunk in rig.store.chunks(job_id, after=1)] == [1, 3]
    assert rig.store.chunks(job_id, after=4) == []
    assert rig.status(job_id).num_tokens == 4
    assert rig.status(job_id).timings.first_token_ms is not None


def test_a_chunk_that_straddles_is_cut_to_start_where_asked(rig: Rig) -> None:
    [job_id] = rig.enqueue("x")
    rig.store.append([tokens(rig.claim_one(), 0, 5, 6, 7, text="abc")])
    [chunk] = rig.store.chunks(job_id, after=2)
    assert (chunk.index, chunk.token_ids, chunk.text) == (2, (7,), "abc")


def test_logprobs_and_any_text_survive_the_journal(rig: Rig) -> None:
    [job_id] = rig.enqueue("x")
    lease = rig.claim_one()
    chunk = tokens(lease, 0, 1, 2, text='é"\n\x00').chunk.model_copy(update={"logprobs": (-0.25, -1.5)})
    from hortator.producer.store import Append

    rig.store.append([Append(lease, chunk)])
    assert rig.store.chunks(job_id) == [chunk]


def test_tokens_must_follow_those_already_there(rig: Rig) -> None:
    [job_id] = rig.enqueue("x")
    lease = rig.claim_one()
    assert rig.store.append([tokens(lease, 1, 9)]).lost == {job_id}
    rig.store.append([tokens(lease, 0, 1, 2)])
    assert rig.store.append([tokens(lease, 0, 9, 9)]).lost == {job_id}
    assert rig.store.append([tokens(lease, 1, 9)]).lost == {job_id}
    assert [chunk.token_ids for chunk in rig.store.chunks(job_id)] == [(1, 2)]


def test_an_append_whose_reply_was_lost_may_be_repeated(rig: Rig) -> None:
    [job_id] = rig.enqueue("x")
    lease = rig.claim_one()
    rig.store.append([tokens(lease, 0, 1, 2)])
    assert rig.store.append([tokens(lease, 0, 1, 2)]) == Signals()
    assert rig.status(job_id).num_tokens == 2


def test_one_append_serves_all_jobs_of_a_step(rig: Rig) -> None:
    ids = rig.enqueue(*map(str, range(50)))
    leases = [one.lease for one in rig.claim().jobs]
    rig.store.cancel([ids[3]])
    signals = rig.store.append([*(tokens(lease, 0, 7) for lease in leases), tokens(Lease("ghost", 1), 0, 7)])
    assert signals == Signals(frozenset([ids[3]]), frozenset(["ghost"]))
    assert all(rig.status(job_id).num_tokens == 1 for job_id in ids)


def test_the_next_attempt_gets_the_journal(rig: Rig) -> None:
    [job_id] = rig.enqueue("x")
    lease = rig.claim_one()
    rig.store.append([tokens(lease, 0, 5, 6)])
    rig.store.append([tokens(lease, 2, 7)])
    rig.store.release([lease], reason=ReleaseReason.DRAINED)
    [claimed] = rig.claim(owner="b").jobs
    assert [chunk.token_ids for chunk in claimed.journal] == [(5, 6), (7,)]
    assert rig.store.append([tokens(claimed.lease, 3, 8)]) == Signals()
    assert [chunk.index for chunk in rig.store.chunks(job_id)] == [0, 2, 3]


def test_the_first_tokens_time_is_that_of_the_first_attempt(rig: Rig) -> None:
    [job_id] = rig.enqueue("x")
    lease = rig.claim_one()
    rig.store.append([tokens(lease, 0, 5)])
    before = rig.status(job_id).timings
    rig.store.release([lease], reason=ReleaseReason.DRAINED)
    rig.wait(0.02)
    rig.store.append([tokens(rig.claim_one(), 1, 6)])
    after = rig.status(job_id).timings
    assert (before.first_token_ms, before.claimed_ms) == (after.first_token_ms, after.claimed_ms)


def test_renewed_leases_are_not_swept(rig: Rig) -> None:
    [job_id] = rig.enqueue("x")
    lease = rig.claim_one(lease_s=0.05)
    rig.wait(0.1)
    assert rig.store.renew([lease], owner="a", lease_s=60) == Signals()  # late, but nobody took it
    assert rig.store.sweep().requeued == ()
    assert rig.state(job_id) is State.RUNNING


def test_a_leader_does_not_keep_the_jobs_of_a_dead_one_of_the_same_name(rig: Rig) -> None:
    dead, living = rig.enqueue("a", "b")
    rig.claim_one(owner="g", lease_s=0.05)
    lease = rig.claim_one(owner="g", lease_s=0.05)
    rig.beat()
    rig.store.renew([lease], owner="g", lease_s=60)
    rig.wait(0.1)
    assert rig.store.sweep().requeued == (dead,)
    assert rig.state(living) is State.RUNNING


def test_an_expired_lease_is_requeued_with_its_journal(rig: Rig) -> None:
    [job_id] = rig.enqueue("x")
    lease = rig.claim_one(lease_s=0.03)
    rig.store.append([tokens(lease, 0, 5)])
    rig.wait(0.08)
    assert rig.store.sweep().requeued == (job_id,)
    assert rig.store.sweep().requeued == ()
    [claimed] = rig.claim(owner="b").jobs
    assert claimed.lease == Lease(job_id, 2)
    assert [chunk.token_ids for chunk in claimed.journal] == [(5,)]
    assert rig.store.commit([done(lease)]) == [Verdict.FENCED]


def test_a_sweep_takes_only_leases_that_ended_before_the_given_time(rig: Rig) -> None:
    [job_id] = rig.enqueue("x")
    rig.claim_one(lease_s=0.03)
    rig.wait(0.08)
    report = rig.store.sweep(expired_before_ms=0)
    assert report.requeued == ()
    assert rig.store.sweep(expired_before_ms=report.now_ms).requeued == (job_id,)


@pytest.mark.parametrize("copies", [1, 2, 3, 5])
def test_a_message_pushed_again_runs_once_and_has_one_result(rig: Rig, copies: int) -> None:
    for _ in range(copies):
        rig.push(foreign("dup"))
    claim = rig.claim()
    assert [one.lease for one in claim.jobs] == [Lease("dup", 1)]
    rig.push(foreign("dup"))
    assert rig.claim().jobs == ()
    rig.store.commit([done(claim.jobs[0].lease)])
    rig.push(foreign("dup"))
    assert rig.claim().jobs == ()
    assert rig.depth() == 0
    assert rig.reasons() == []


def test_a_copy_of_our_own_message_is_dropped_too(rig: Rig) -> None:
    rig.enqueue("x")
    [claimed] = rig.claim().jobs
    rig.push(claimed.message)
    assert rig.claim().jobs == ()
    rig.store.release([claimed.lease], reason=ReleaseReason.DRAINED)
    rig.push(claimed.message)
    assert len(rig.claim().jobs) == 1


def test_a_foreign_message_gets_a_record_when_it_is_claimed(rig: Rig) -> None:
    rig.push(foreign("celery-1"), step=3)
    assert rig.depth() == 1
    assert rig.store.statuses(["celery-1"]) == [None]
    claim = rig.claim()
    assert (claim.jobs[0].lease, claim.jobs[0].tenant) == (Lease("celery-1", 1), "default")
    assert abs(claim.jobs[0].enqueued_ms - claim.now_ms) < 1000
    assert claim.jobs[0].deadline_ms == claim.jobs[0].enqueued_ms + 7 * 86_400_000
    rig.store.commit([done(claim.jobs[0].lease)])
    assert rig.state("celery-1") is State.SUCCEEDED


def test_queues_count_what_waits_and_what_runs(rig: Rig) -> None:
    rig.enqueue(*"abc")
    rig.claim(1)
    rig.wait(0.02)
    [queue] = rig.store.queues()
    assert (queue.model, queue.depth, queue.running, queue.suspects) == (MODEL, 2, 1, 0)
    assert queue.oldest_age_s is not None
    assert 0 < queue.oldest_age_s < 30
    assert [beat.group for beat in queue.groups] == ["group"]


def test_silent_groups_and_those_that_said_down_are_not_alive(rig: Rig) -> None:
    from hortator.producer.store import GroupBeat

    rig.store.beat(GroupBeat("leaving", MODEL, 0, 8, 1, "draining", {"note": "x"}))
    assert [beat.group for beat in rig.store.queues()[0].groups] == ["group", "leaving"]
    rig.store.beat(GroupBeat("leaving", MODEL, 0, 8, 1, "gone"))
    assert [beat.group for beat in rig.store.queues()[0].groups] == ["group"]
    rig.rule(beat_ttl_s=0.02)
    rig.wait(0.05)
    assert rig.store.queues()[0].groups == ()


def test_an_idle_queue_says_so(rig: Rig) -> None:
    [queue] = rig.store.queues()
    assert (queue.depth, queue.oldest_age_s) == (0, None)


def test_jobs_of_another_model_are_not_touched(rig: Rig) -> None:
    rig.beat("other")
    rig.enqueue("x", model="other")
    assert rig.claim().jobs == ()
    assert len(rig.claim(model="other").jobs) == 1


def test_metadata_comes_back(rig: Rig) -> None:
    [receipt] = rig.store.enqueue([job(metadata={"k": "v " * 200})])
    assert rig.status(receipt.job_id).metadata == {"k": "v " * 200}

"""The front: every way that a job can go, with a clock and a group that the test moves."""

import dataclasses
from typing import Any

import pytest

from hortator.producer import memory_claims
from hortator.producer.errors import HortatorError, StoreForbidden, StoreUnavailable, StoreUnsuitable
from hortator.producer.schema import Chunk, FinishReason, Job, State
from hortator.producer.store import Claim, Holder, Lease, Outcome, ReleaseReason, Verdict
from hortator.workers.engine.step import EngineStats, Finish, StepOutput, Structure, StructureKind, Token
from hortator.workers.front import MIN_DEADLINES
from hortator.workers.group import Ready
from hortator.workers.intake import seed_of
from hortator.workers.outbox import COMMITS_PER_CALL, Delivery, Outbox
from hortator.workers.tenure import this_process
from tests.workers.leader import EOS, MODEL, Leader, stepped
from tests.workers.messages import message

# ---- from the queue to the result


def test_a_job_goes_through_the_engine_to_its_result() -> None:
    leader = Leader()
    leader.run("hello", max_tokens=8)
    request = leader.group.admitted[0]
    assert (bytes(request.prompt), request.generated, request.sampling.max_tokens) == (b"hello", (), 8)
    assert leader.status().state is State.RUNNING
    leader.step("wor")
    leader.step("ld", finish=Finish.LENGTH)
    status = leader.status()
    assert status.state is State.SUCCEEDED
    assert status.result is not None
    assert (status.result.text, status.result.finish_reason) == ("world", FinishReason.LENGTH)
    assert (status.result.usage.prompt_tokens, status.result.usage.completion_tokens) == (5, 5)
    assert leader.journal() == "world"
    assert [verdict for _, verdict in leader.ended_] == [Verdict.COMMITTED]
    assert not leader.front.busy


def test_a_plain_celery_message_runs_too() -> None:
    leader = Leader()
    leader.store.push(MODEL, message("plain-1", prompt="hi", max_tokens=3))
    leader.turn(after_s=0.1)
    leader.step("abc", finish=Finish.LENGTH)
    assert leader.status("plain-1").state is State.SUCCEEDED


def test_an_end_token_is_counted_and_has_no_text() -> None:
    leader = Leader()
    leader.run()
    leader.step("ab\0", finish=Finish.STOP)
    result = leader.status().result
    assert result is not None
    assert (result.text, result.token_ids[-1], result.finish_reason) == ("ab", EOS, FinishReason.STOP)


def test_logprobs_reach_the_result() -> None:
    leader = Leader()
    leader.run(logprobs=True)
    leader.step("ab", logprob=-0.25, finish=Finish.LENGTH)
    result = leader.status().result
    assert result is not None
    assert result.logprobs == (-0.25, -0.25)


def test_the_likeliest_tokens_reach_journal_and_result() -> None:
    leader = Leader()
    leader.run(logprobs=True, top_logprobs=2)
    top = ((97, -0.25), (98, -2.0))
    leader.step("ab", logprob=-0.25, top=top, finish=Finish.LENGTH)
    result = leader.status().result
    assert result is not None
    assert result.top_logprobs == (top, top)
    assert [chunk.top_logprobs for chunk in leader.store.chunks("id-1")] == [(top, top)]


def test_every_way_of_sampling_reaches_the_engine() -> None:
    leader = Leader()
    leader.run(
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={3: 1.5},
        min_tokens=4,
        structure={"type": "choice", "choices": ["ja", "nö"]},
    )
    sampling = leader.group.admitted[0].sampling
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.2, 0.5, -0.5)
    assert (sampling.logit_bias, sampling.min_tokens) == (((3, 1.5),), 4)
    assert sampling.structure == Structure(StructureKind.CHOICE, '["ja","nö"]')


def test_a_schema_reaches_the_engine_with_its_properties_in_their_order() -> None:
    leader = Leader()
    leader.run(structure={"type": "json_schema", "json_schema": {"properties": {"b": {}, "a": {}}}})
    structure = leader.group.admitted[0].sampling.structure
    assert structure == Structure(StructureKind.JSON_SCHEMA, '{"properties":{"b":{},"a":{}}}')


def test_a_bad_parameter_of_a_plain_celery_message_fails_its_job_with_the_reason() -> None:
    leader = Leader()
    leader.store.push(MODEL, message("plain-1", prompt="hi", top_logprobs=3))
    leader.turn(after_s=0.1)
    failure = leader.status("plain-1").failure
    assert failure is not None
    assert failure.code == "bad_request"
    assert "top_logprobs needs logprobs" in failure.message


def test_a_stop_string_counts_only_after_min_tokens() -> None:
    leader = Leader()
    leader.run(stop=["ab"], min_tokens=3)
    leader.step("abcabd")
    result = leader.status().result
    assert result is not None
    assert (result.text, len(result.token_ids)) == ("abc", 5)


def test_a_stop_string_ends_the_job_here_and_in_the_engine() -> None:
    leader = Leader()
    leader.run(stop=["END"])
    leader.step("abE")
    assert leader.journal() == "ab"
    leader.step("NDxyz")
    result = leader.status().result
    assert result is not None
    assert (result.text, len(result.token_ids), result.finish_reason) == ("ab", 5, FinishReason.STOP)
    assert leader.group.cancelled == [leader.group.admitted[0].handle]
    leader.step("more", finish=Finish.LENGTH)  # the engine had not yet heard
    assert leader.status().result == result


def test_the_seed_of_a_job_comes_from_its_id_unless_it_names_one() -> None:
    leader = Leader()
    leader.run(job_id="a")
    leader.run(job_id="b", seed=7)
    assert [request.sampling.seed for request in leader.group.admitted] == [seed_of("a"), 7]
    assert seed_of("a") == seed_of("a") != seed_of("b")
    assert 0 <= seed_of("a") < 2**63


def test_one_step_is_one_message_and_one_commit_for_all_its_jobs() -> None:
    leader = Leader()
    for number in range(4):
        leader.enqueue(job_id=f"id-{number}")
    leader.turn(after_s=0.1)
    assert leader.group.messages == 1
    leader.redis.calls.clear()
    handles = [request.handle for request in leader.group.admitted]
    output = [(handle, Finish.LENGTH) for handle in handles]
    step = StepOutput(tuple(Token(handle, 97) for handle in handles), tuple(output))
    leader.turn(stepped(1, step, EngineStats(0, 0, 1, 1, 0)))
    assert leader.redis.calls == ["commit"]
    assert all(leader.status(f"id-{number}").state is State.SUCCEEDED for number in range(4))
    assert all(leader.journal(f"id-{number}") == "a" for number in range(4))


def test_tokens_are_journalled_at_most_every_thirty_milliseconds() -> None:
    leader = Leader()
    leader.run()
    leader.redis.calls.clear()
    for _ in range(10):
        leader.step("a", after_s=0.01)
    assert 3 <= leader.redis.calls.count("append") <= 5
    leader.turn(after_s=0.05)
    assert leader.journal() == "a" * 10


def test_many_jobs_are_journalled_in_larger_pieces_so_that_redis_bears_a_full_group() -> None:
    leader = Leader(max_num_seqs=64)
    for number in range(64):
        leader.enqueue(job_id=f"id-{number}")
    leader.turn(after_s=0.1)
    handles = [request.handle for request in leader.group.admitted]
    leader.redis.calls.clear()
    for step in range(1, 31):
        output = StepOutput(tuple(Token(handle, 97) for handle in handles))
        leader.turn(stepped(step, output, EngineStats(64, 0, 1, 1, 0)), after_s=0.02)
    assert 3 <= leader.redis.calls.count("append") <= 4, "600 ms of generation"
    leader.turn(after_s=0.25)
    assert leader.journal("id-63") == "a" * 30


def test_the_first_tokens_of_a_job_are_journalled_soon_in_a_full_group_too() -> None:
    leader = Leader(max_num_seqs=64)
    for number in range(63):
        leader.enqueue(job_id=f"id-{number}")
    leader.turn(after_s=0.1)
    old = [request.handle for request in leader.group.admitted]
    for step in (1, 2):
        output = StepOutput(tuple(Token(handle, 97) for handle in old))
        leader.turn(stepped(step, output, EngineStats(63, 0, 1, 1, 0)), after_s=0.02)
    leader.run(job_id="new")
    new = leader.group.admitted[-1].handle
    output = StepOutput(tuple(Token(handle, 97) for handle in (*old, new)))
    leader.turn(stepped(3, output, EngineStats(64, 0, 1, 1, 0)), after_s=0.04)
    assert leader.journal("new") == "a"
    assert len(leader.journal("id-0")) < 3


def test_a_full_group_is_not_woken_between_steps() -> None:
    leader = Leader(max_num_seqs=4)
    for number in range(3):
        leader.run(job_id=f"id-{number}")
    leader.step("a")
    assert leader.front.wake_in() >= 0.02


def test_a_turn_that_a_report_brought_makes_one_between_reports_needless() -> None:
    leader = Leader(max_num_seqs=4)
    for number in range(3):
        leader.run(job_id=f"id-{number}")
    leader.step("a", after_s=0.04)
    leader.clock.now += 0.04
    assert leader.front.wake_in() > 0
    leader.clock.now += 0.02
    assert leader.front.wake_in() == 0


def test_a_full_group_with_slow_steps_asks_for_jobs_no_more_than_twice_a_step() -> None:
    leader = Leader(max_num_seqs=4)
    for number in range(3):
        leader.run(job_id=f"id-{number}")
    leader.redis.calls.clear()
    for step in range(1, 11):
        leader.turn(stepped(step, StepOutput(), EngineStats(3, 0, 1, 1, 0)), after_s=0.001)
        for _ in range(19):
            leader.turn(after_s=0.001)
    assert 15 <= leader.redis.calls.count("claim") <= 22


# ---- what cannot run


@pytest.mark.parametrize(
    ("prompt", "sampling", "code", "says"),
    [
        ("x" * 64, {}, "prompt_too_long", "64 tokens; the limit is 63"),
        (
            "x" * 100,
            {},
            "prompt_too_long",
            "100 characters, too many for any number of tokens up to the limit; the limit is 63",
        ),
        (
            "x" * 40,
            {"max_tokens": 20},
            "prompt_too_long",
            "need 60 tokens; the KV pool holds 50: lower max_tokens to 10",
        ),
    ],
)
def test_a_prompt_that_does_not_fit_is_told_the_real_limit(
    prompt: str, sampling: dict[str, int], code: str, says: str
) -> None:
    leader = Leader(kv_tokens=50)
    leader.run(prompt, **sampling)
    failure = leader.status().failure
    assert leader.status().state is State.FAILED
    assert failure is not None
    assert failure.code == code
    assert says in failure.message
    assert not leader.group.admitted


def test_max_tokens_ends_at_the_models_context() -> None:
    leader = Leader()
    leader.run("x" * 60, max_tokens=256)
    assert leader.group.admitted[0].sampling.max_tokens == 4


def test_a_token_id_beyond_the_vocabulary_is_refused() -> None:
    leader = Leader()
    leader.store.push(MODEL, message("plain-1", token_ids=[1, 256]))
    leader.turn(after_s=0.1)
    failure = leader.status("plain-1").failure
    assert failure is not None
    assert "token id 256 is not in the vocabulary of 256" in failure.message


@pytest.mark.parametrize("kwargs", [{}, {"prompt": 5}, {"prompt": "x", "max_tokens": -1}])
def test_a_wrong_job_fails_readably_and_is_kept_in_the_dead_letters(kwargs: dict[str, Any]) -> None:
    leader = Leader()
    leader.store.push(MODEL, message("plain-1", **kwargs))
    leader.turn(after_s=0.1)
    status = leader.status("plain-1")
    assert status.state is State.FAILED
    assert status.failure is not None
    assert status.failure.code == "bad_request"
    letter = leader.store.dead_letters()[0]
    assert (letter.job_id, letter.reason) == ("plain-1", status.failure.message)
    assert not leader.front.busy


def test_a_message_of_an_unknown_task_fails_and_is_kept_in_the_dead_letters() -> None:
    leader = Leader()
    leader.store.push(MODEL, message("plain-1", prompt="x", headers={"task": "os.system"}))
    leader.turn(after_s=0.1)
    assert leader.status("plain-1").state is State.FAILED
    assert "unknown task" in leader.store.dead_letters()[0].reason


def test_a_fault_of_one_request_fails_it_alone() -> None:
    leader = Leader()
    leader.run(job_id="a")
    leader.run(job_id="b")
    leader.fault("bad_request", "its logits are NaN")
    assert leader.status("b").state is State.FAILED
    assert leader.status("a").state is State.RUNNING


def test_a_fault_of_ours_in_one_job_does_not_touch_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    leader = Leader()
    leader.run(job_id="a")

    def explode(_: str) -> tuple[int, ...]:
        raise RuntimeError("bug")

    monkeypatch.setattr(leader.front._text, "encode", explode)
    leader.run(job_id="b")
    assert leader.status("b").state is State.FAILED
    assert leader.status("a").state is State.RUNNING


# ---- capacity


def test_no_more_is_claimed_than_the_engine_takes_and_a_little_beyond() -> None:
    leader = Leader(max_num_seqs=8)
    for number in range(20):
        leader.enqueue(job_id=f"id-{number}")
    leader.turn(after_s=0.1)
    assert leader.front.num_live == 10


def test_a_claim_that_could_not_hold_more_is_followed_by_the_next_one_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_claims, "CLAIM_JOBS", 3)
    leader = Leader(max_num_seqs=32)
    for number in range(9):
        leader.enqueue(job_id=f"id-{number}")
    leader.turn(after_s=0.1)
    for num_live in (6, 9):
        assert leader.front.wake_in() <= 0.001
        leader.turn()
        assert leader.front.num_live == num_live


def test_nothing_more_is_claimed_while_jobs_wait_in_the_engine_for_kv_blocks() -> None:
    leader = Leader(max_num_seqs=8)
    leader.run(job_id="a")
    leader.step("x", waiting=2)
    leader.run(job_id="b")
    assert leader.status("b").state is State.QUEUED
    leader.step("x", waiting=0)
    assert leader.status("b").state is State.RUNNING


def test_nothing_is_claimed_before_the_group_is_ready() -> None:
    leader = Leader(ready=False)
    leader.run()
    assert leader.status().state is State.QUEUED
    leader.ready()
    leader.turn(after_s=0.1)
    assert leader.status().state is State.RUNNING


def test_an_idle_front_asks_often_after_work_and_seldom_later() -> None:
    leader = Leader()
    leader.run()
    leader.step("a", finish=Finish.LENGTH)
    leader.turn(after_s=0.01)
    assert leader.front.wake_in() <= 0.005
    leader.turn(after_s=30)
    leader.turn(after_s=0.001)
    assert 0.005 < leader.front.wake_in() <= 0.020


# ---- cancel, deadline, time limit


def test_a_cancel_reaches_a_running_job_within_a_renewal() -> None:
    leader = Leader()
    leader.run()
    leader.store.cancel(["id-1"])
    leader.turn(after_s=1.1)
    assert leader.status().state is State.CANCELLED
    assert leader.group.cancelled == [leader.group.admitted[0].handle]


def test_a_cancel_comes_sooner_with_the_tokens() -> None:
    leader = Leader()
    leader.run()
    leader.store.cancel(["id-1"])
    leader.step("a", after_s=0.05)
    leader.turn()
    assert leader.status().state is State.CANCELLED


def test_a_deadline_ends_a_running_job() -> None:
    leader = Leader()
    leader.run(deadline_s=2.0)
    leader.step("abc")
    leader.turn(after_s=2.0)
    status = leader.status()
    assert status.state is State.EXPIRED
    assert leader.journal() == "abc"
    assert leader.group.cancelled


def test_the_deadline_of_a_plain_message_counts_too() -> None:
    leader = Leader()
    leader.store.push(MODEL, message("plain-1", prompt="hi", deadline_s=2.0))
    leader.turn(after_s=0.1)
    leader.turn(after_s=2.1)
    assert leader.status("plain-1").state is State.EXPIRED


def test_a_celery_time_limit_fails_the_job() -> None:
    leader = Leader()
    leader.store.push(MODEL, message("plain-1", prompt="hi", headers={"timelimit": [1.5, None]}))
    leader.turn(after_s=0.1)
    leader.turn(after_s=1.6)
    failure = leader.status("plain-1").failure
    assert failure is not None
    assert failure.code == "time_limit"


def test_the_time_limit_of_an_earlier_attempt_does_not_end_the_next() -> None:
    leader = Leader()
    leader.store.push(MODEL, message("plain-1", prompt="hi", headers={"timelimit": [3.0, None]}))
    leader.turn(after_s=0.1)
    leader.turn(after_s=2.0)
    leader.front.hand_back()
    leader.turn(after_s=0.1)
    leader.turn(after_s=0.1)
    assert leader.status("plain-1").state is State.RUNNING
    leader.turn(after_s=1.5)
    assert leader.status("plain-1").state is State.RUNNING
    leader.turn(after_s=2.0)
    assert leader.status("plain-1").state is State.FAILED


def test_a_deadline_of_an_earlier_attempt_does_not_end_a_finished_job() -> None:
    leader = Leader()
    leader.run(deadline_s=2.0)
    leader.step("a", finish=Finish.LENGTH)
    leader.turn(after_s=5)
    assert leader.status().state is State.SUCCEEDED


def test_a_job_that_is_cancelled_before_the_engine_heard_of_it_is_never_submitted() -> None:
    leader = Leader()
    leader.enqueue()
    leader.clock.now += 0.1
    (claimed,) = leader.front.take()
    envelope = leader.front.open(claimed)
    assert envelope is not None
    leader.front.admit(claimed, envelope)
    from hortator.producer.schema import Failure

    leader.front.end("id-1", State.CANCELLED, Failure(code="cancelled", message="x"))
    leader.front.flush()
    assert not leader.group.admitted
    assert not leader.group.cancelled


# ---- the group goes down


def test_jobs_of_a_dead_group_go_back_with_their_tokens_and_go_on_where_they_were() -> None:
    leader = Leader(probation_tokens=2)
    leader.run(max_tokens=8)
    leader.step("ab")
    leader.step("c", after_s=0.001)
    assert leader.journal() == "ab"  # the crash must not lose what is not journalled yet
    leader.down()
    assert leader.gone_ == [("id-1", "the group went down")]
    assert leader.journal() == "abc"
    assert leader.status().state is State.QUEUED
    leader.ready(epoch=2)
    leader.turn(after_s=0.1)
    assert leader.group.admitted[-1].generated == tuple(b"abc")
    leader.step("de", finish=Finish.LENGTH)
    status = leader.status()
    assert status.result is not None
    assert status.result.text == "abcde"
    assert status.attempt == 2
    assert leader.journal() == "abcde"


def test_nothing_is_claimed_and_nothing_submitted_while_the_group_is_down() -> None:
    leader = Leader()
    leader.down()
    messages = leader.group.messages
    leader.run()
    assert leader.status().state is State.QUEUED
    assert leader.group.messages == messages
    assert leader.front.beat().state == "starting" or leader.front.beat().state == "down"


def test_a_permanent_failure_of_the_group_is_fatal_and_left_to_the_pool_to_say(
    caplog: pytest.LogCaptureFixture,
) -> None:
    leader = Leader()
    leader.down("the checkpoint is truncated", permanent=True)
    assert leader.front.fatal == "the checkpoint is truncated"
    assert "truncated" not in caplog.text


def test_a_whole_output_in_the_journal_needs_no_engine() -> None:
    leader = Leader(probation_tokens=1)
    leader.run(max_tokens=3)
    leader.step("abc", after_s=0.05)
    leader.down()  # between the last token and the commit
    leader.ready(epoch=2)
    before = len(leader.group.admitted)
    leader.turn(after_s=0.1)
    leader.turn(after_s=0.1)
    status = leader.status()
    assert status.state is State.SUCCEEDED
    assert status.result is not None
    assert (status.result.text, status.result.finish_reason) == ("abc", FinishReason.LENGTH)
    assert len(leader.group.admitted) == before


def test_tokens_of_an_earlier_epoch_are_ignored() -> None:
    leader = Leader()
    leader.run()
    old = leader.group.admitted[0].handle
    leader.down()
    leader.ready(epoch=2)
    leader.turn(after_s=0.1)
    leader.step("stale", of=old, finish=Finish.STOP)
    assert leader.journal() == ""
    assert leader.status().state is State.RUNNING


def test_nothing_is_claimed_while_the_group_is_in_doubt() -> None:
    leader = Leader()
    leader.group.steady = False
    leader.run()
    assert leader.status().state is State.QUEUED
    leader.group.steady = True
    leader.turn(after_s=0.1)
    assert leader.status().state is State.RUNNING


def test_jobs_that_ranks_ran_when_they_gave_up_a_stopped_front_are_not_charged() -> None:
    leader = Leader()
    leader.run()
    leader.step("ab")
    leader.down(by_pause=True)
    assert leader.status().attempt == 0
    assert leader.store.queues()[0].suspects == 0
    leader.ready(epoch=2)
    leader.turn(after_s=0.1)
    assert leader.group.admitted[-1].generated == tuple(b"ab")


# ---- suspects


def test_a_job_that_the_dead_group_never_had_is_not_charged() -> None:
    leader = Leader()
    leader.group.rank_0_gone = True
    leader.run()
    assert leader.gone_ == [("id-1", "the group is going down")]
    leader.down()
    assert leader.status().attempt == 0
    assert leader.store.queues()[0].suspects == 0


def test_a_suspect_that_the_dead_group_never_had_is_not_convicted() -> None:
    leader = Leader()
    crashed_batch(leader, jobs=1)
    leader.front.hand_back()
    leader.turn()
    leader.group.rank_0_gone = True
    leader.turn(after_s=0.1)
    leader.down()
    assert leader.status("id-0").state is State.QUEUED
    assert leader.store.queues()[0].suspects == 1


def crashed_batch(leader: Leader, jobs: int = 2) -> None:
    for number in range(jobs):
        leader.enqueue(job_id=f"id-{number}")
    leader.turn(after_s=0.1)
    assert leader.front.num_live == jobs
    leader.down()
    leader.ready(epoch=leader.group.epoch + 1)
    leader.turn(after_s=0.1)


def test_a_suspect_runs_alone_until_it_is_past_the_point_of_the_crash() -> None:
    leader = Leader(probation_tokens=3)
    crashed_batch(leader)
    assert leader.front.num_live == 1
    leader.step("ab")
    leader.turn(after_s=0.1)
    assert leader.redis.calls.count("clear") == 0
    first = leader.group.admitted[-1].handle
    leader.step("c")
    leader.turn(after_s=0.1)
    leader.turn(after_s=0.1)
    assert leader.redis.calls.count("clear") == 1
    assert leader.front.num_live == 1
    assert leader.group.admitted[-1].handle != first, "the next suspect does not wait for the end of the first"


def test_a_suspect_of_several_answers_runs_alone_until_each_has_passed_that_point_or_ended() -> None:
    leader = Leader(probation_tokens=3)
    leader.run(n=3)
    leader.down()
    leader.ready(epoch=2)
    leader.turn(after_s=0.1)
    first, second, third = (request.handle for request in leader.group.admitted[-3:])
    for of, tokens, finish in ((first, "abcdef", None), (second, "a", Finish.LENGTH), (third, "ab", None)):
        leader.step(tokens, of=of, finish=finish)
    leader.turn(after_s=0.1)
    assert leader.redis.calls.count("clear") == 0
    leader.step("c", of=third)
    leader.turn(after_s=0.1)
    assert leader.redis.calls.count("clear") == 1


def test_many_long_suspects_cost_a_short_run_each_and_then_go_on_together() -> None:
    jobs = 4
    leader = Leader(probation_tokens=2)
    crashed_batch(leader, jobs=jobs)
    for _ in range(jobs):
        assert leader.front.num_live == 1
        leader.step("abc")
        leader.turn(after_s=0.1)
        leader.turn(after_s=0.1)
    assert leader.front.num_live == jobs
    assert leader.store.queues()[0].suspects == 0
    assert {len(request.generated) for request in leader.group.admitted[1 - jobs :]} == {3}
    assert {leader.status(f"id-{number}").attempt for number in range(jobs)} == {2}, "stepping aside is not charged"


def test_a_cleared_suspect_that_already_has_company_is_not_sent_back() -> None:
    leader = Leader(probation_tokens=2)
    crashed_batch(leader, jobs=1)
    leader.step("ab")
    leader.run(job_id="next")
    other = leader.store.enqueue([Job(model=MODEL, prompt="x")], job_ids=["other"])[0].job_id
    [claimed] = leader.store.claim(MODEL, owner="another", limit=1, lease_s=60, idle=False).jobs
    leader.store.release([claimed.lease], reason=ReleaseReason.CRASHED)
    leader.turn(after_s=0.1)
    assert leader.front.num_live == 2
    assert leader.status(other).state is State.QUEUED


def test_nothing_joins_a_suspect_before_it_is_cleared() -> None:
    leader = Leader(probation_tokens=3)
    crashed_batch(leader, jobs=1)
    leader.run(job_id="next")
    leader.step("ab", of=leader.group.admitted[-1].handle)
    assert leader.status("next").state is State.QUEUED
    leader.step("c")
    leader.turn(after_s=0.1)
    assert leader.status("next").state is State.RUNNING
    assert leader.front.num_live == 2


def test_a_suspect_that_ends_makes_room_for_the_next() -> None:
    leader = Leader(probation_tokens=100)
    crashed_batch(leader)
    leader.step("a", finish=Finish.LENGTH)
    leader.turn(after_s=0.1)
    leader.step("b", finish=Finish.LENGTH)
    leader.turn(after_s=0.1)
    assert all(leader.status(f"id-{number}").state is State.SUCCEEDED for number in range(2))


def test_a_suspect_that_takes_its_group_down_alone_is_poison_and_the_innocent_succeeds() -> None:
    leader = Leader(probation_tokens=100)
    crashed_batch(leader)
    (culprit,) = leader.front._live
    leader.down()
    leader.ready(epoch=3)
    leader.turn(after_s=0.1)
    failure = leader.status(culprit).failure
    assert failure is not None
    assert failure.code == "poison"
    leader.step("a", finish=Finish.LENGTH)
    states = {leader.status(f"id-{number}").state for number in range(2)}
    assert states == {State.FAILED, State.SUCCEEDED}


def suspect_elsewhere(leader: Leader, job_id: str = "suspect") -> None:
    """Another group took this job, and died."""
    leader.enqueue(job_id=job_id)
    claims = leader.store.claim(MODEL, owner="another", limit=1, lease_s=60, idle=True)
    assert [one.lease.job_id for one in claims.jobs] == [job_id]
    leader.store.release([claims.jobs[0].lease], reason=ReleaseReason.CRASHED)


def test_a_full_group_makes_room_for_a_suspect_within_a_second_and_then_goes_on() -> None:
    leader = Leader(max_num_seqs=4, probation_tokens=2)
    for number in range(5):
        leader.run(job_id=f"id-{number}", max_tokens=50)
    leader.step("abc", of=leader.group.admitted[0].handle)
    suspect_elsewhere(leader)
    for _ in range(20):
        leader.turn(after_s=0.05)
    assert leader.status("suspect").state is State.RUNNING
    assert leader.front.num_live == 1
    assert len(leader.group.cancelled) == 5
    leader.step("xy", finish=Finish.LENGTH)
    for _ in range(5):
        leader.turn(after_s=0.05)
    assert leader.front.num_live == 5
    assert {leader.status(f"id-{number}").attempt for number in range(5)} == {1}, "making room is not charged"
    (first,) = [request for request in leader.group.admitted[6:] if request.generated]
    assert first.generated == tuple(b"abc")


def test_a_busy_group_is_left_alone_when_another_takes_the_suspect() -> None:
    leader = Leader()
    leader.run()
    suspect_elsewhere(leader)
    for _ in range(6):
        leader.turn(after_s=0.05)
    assert leader.store.claim(MODEL, owner="another", limit=1, lease_s=60, idle=True).jobs
    for _ in range(20):
        leader.turn(after_s=0.05)
    assert leader.gone_ == []
    leader.run(job_id="next")
    assert leader.status("next").state is State.RUNNING


def test_a_suspect_waits_until_the_engine_has_let_go_of_what_was_cancelled() -> None:
    leader = Leader()
    leader.run()
    suspect_elsewhere(leader)
    leader.group.empty = False
    leader.store.cancel(["id-1"])
    for _ in range(20):
        leader.turn(after_s=0.1)
    assert leader.front.num_live == 0
    assert leader.status("suspect").state is State.QUEUED
    leader.group.empty = True
    leader.turn(after_s=0.1)
    assert leader.status("suspect").state is State.RUNNING


def test_a_refused_suspect_does_not_keep_the_group_waiting() -> None:
    leader = Leader(probation_tokens=100)
    crashed_batch(leader, jobs=1)
    leader.store.cancel(["id-0"])
    leader.turn(after_s=1.1)
    leader.run(job_id="next")
    assert leader.status("next").state is State.RUNNING


# ---- Redis goes away


def test_finished_results_are_kept_and_committed_when_redis_is_back() -> None:
    leader = Leader()
    leader.run()
    leader.redis.away = True
    leader.step("abc", finish=Finish.LENGTH)
    assert leader.front.busy
    leader.turn(after_s=2.0)
    leader.redis.away = False
    leader.turn(after_s=1.1)
    leader.turn(after_s=1.1)
    status = leader.status()
    assert status.state is State.SUCCEEDED
    assert leader.journal() == "abc"
    assert not leader.front.busy


def test_an_absence_shorter_than_the_lease_costs_nothing() -> None:
    leader = Leader()
    leader.run()
    leader.redis.away = True
    leader.step("ab", after_s=2.0)
    leader.redis.away = False
    leader.step("cd", after_s=2.0)
    leader.step("e", finish=Finish.LENGTH, after_s=1.1)
    assert leader.gone_ == []
    assert leader.journal() == "abcde"
    assert leader.status().attempt == 1


def test_an_outage_of_some_leases_stops_nothing() -> None:
    leader = Leader(lease_s=3.0, outage_s=15.0)
    leader.run(max_tokens=20)
    leader.redis.away = True
    for _ in range(10):
        leader.step("a", after_s=1.0)
    leader.redis.away = False
    for _ in range(30):
        leader.turn(after_s=0.25)
    assert leader.gone_ == []
    assert leader.journal() == "a" * 10
    assert leader.status().attempt == 1


def test_an_absence_is_counted_from_the_last_renewal() -> None:
    leader = Leader()
    leader.run()
    for _ in range(20):
        leader.turn(after_s=0.5)
    leader.redis.away = True
    leader.turn(after_s=3.0)
    assert leader.gone_ == []


def test_a_front_that_cannot_renew_stops_its_jobs_by_itself() -> None:
    leader = Leader()
    leader.run()
    leader.redis.away = True
    leader.turn(after_s=3.0)
    assert leader.gone_ == []
    leader.turn(after_s=4.0)
    assert leader.gone_ == [("id-1", "its lease could not be renewed")]
    assert leader.group.cancelled == [leader.group.admitted[0].handle]


def test_an_outage_longer_than_the_lease_charges_nobody_and_keeps_the_tokens() -> None:
    leader = Leader()
    leader.run(max_tokens=8)
    leader.redis.away = True
    leader.step("ab", after_s=3.0)
    leader.turn(after_s=9.0)
    leader.redis.away = False
    for _ in range(20):  # long enough for the sweeper to believe in dead leaders again
        leader.turn(after_s=1.1)
    assert leader.group.admitted[-1].generated == tuple(b"ab")
    status = leader.status()
    assert (status.state, status.attempt) == (State.RUNNING, 1)
    assert leader.redis.calls.count("clear") == 0, "it was no suspect"


def test_a_lost_lease_stops_the_job_without_an_outcome() -> None:
    leader = Leader()
    leader.run()
    leader.clock.now += 7
    leader.store.sweep()
    leader.store.claim(MODEL, owner="other", limit=1, lease_s=60, idle=True)
    leader.turn()
    assert leader.gone_ == [("id-1", "another attempt owns it")]
    assert leader.ended_ == []


def test_a_zombies_commit_is_fenced() -> None:
    leader = Leader()
    leader.run()
    leader.redis.away = True
    leader.step("zombie", finish=Finish.LENGTH)
    leader.clock.now += 7
    leader.store.sweep()
    other = leader.store.claim(MODEL, owner="other", limit=1, lease_s=60, idle=True).jobs[0]
    leader.redis.away = False
    leader.turn()
    assert [verdict for _, verdict in leader.ended_] == [Verdict.FENCED]
    assert leader.status().state is State.RUNNING
    assert leader.status().attempt == other.lease.attempt


def test_outcomes_are_sent_in_bounded_calls_and_what_fails_is_kept() -> None:
    sent: list[int] = []

    class Half:
        def commit(self, outcomes: list[Outcome]) -> list[Verdict]:
            if sent:
                raise StoreUnavailable("away")
            sent.append(len(outcomes))
            return [Verdict.COMMITTED] * len(outcomes)

    outbox = Outbox(Half(), model=MODEL)  # type: ignore[arg-type]
    for number in range(COMMITS_PER_CALL + 5):
        outbox.commit(Outcome(Lease(f"id-{number}", 1), State.FAILED))
    delivery = Delivery()
    with pytest.raises(StoreUnavailable):
        outbox.flush(delivery)
    assert sent == [len(delivery.verdicts)] == [COMMITS_PER_CALL]
    assert len(outbox.leases) == 5


def test_a_job_whose_lease_was_lost_unnoticed_may_come_back_to_the_same_front() -> None:
    leader = Leader()
    leader.run(max_tokens=8)
    (old,) = leader.group.admitted
    leader.store.release([leader.front._live["id-1"].lease], reason=ReleaseReason.DRAINED)
    leader.turn(after_s=0.1)
    new = leader.group.admitted[-1]
    assert new.handle != old.handle
    assert leader.group.cancelled == [old.handle]
    leader.step("stale", of=old.handle, finish=Finish.LENGTH)
    leader.step("abc", of=new.handle, finish=Finish.LENGTH)
    result = leader.status().result
    assert result is not None
    assert result.text == "abc"


def test_a_redis_that_hangs_is_not_asked_again_at_once() -> None:
    leader = Leader()
    leader.run()
    asked = 0

    class Hanging:
        def __getattr__(self, name: str) -> object:
            def call(*_: object, **__: object) -> None:
                nonlocal asked
                asked += 1
                raise_unavailable()

            return call

    for part in (leader.front, leader.front._outbox, leader.front._claimer, leader.front._sweeper):
        part._store = Hanging()  # type: ignore[assignment]
    for _ in range(50):
        leader.step("a", after_s=0.01)
    assert asked < 10


def raise_unavailable() -> None:
    raise StoreUnavailable("timeout")


@pytest.mark.parametrize("error", [StoreUnsuitable("it evicts"), StoreForbidden("wrong password")])
def test_a_redis_that_cannot_be_used_is_fatal_before_the_first_claim(
    monkeypatch: pytest.MonkeyPatch, error: HortatorError
) -> None:
    leader = Leader(ready=False)

    def refuse() -> None:
        raise error

    monkeypatch.setattr(leader.store, "check", refuse)
    leader.enqueue()
    leader.ready()
    leader.turn(after_s=0.1)
    assert leader.front.fatal == error.message
    assert leader.status().state is State.QUEUED


def test_credentials_that_are_refused_later_are_an_outage_and_nothing_exits(monkeypatch: pytest.MonkeyPatch) -> None:
    leader = Leader()
    leader.run()

    def refuse(*_: object, **__: object) -> None:
        raise StoreForbidden("the password was changed")

    with monkeypatch.context() as rotated:
        for name in ("append", "renew", "commit", "claim", "beat"):
            rotated.setattr(leader.store, name, refuse)
        leader.step("ab", after_s=1.1)
    assert leader.front.fatal is None
    leader.step("c", finish=Finish.LENGTH, after_s=1.1)
    assert leader.status().state is State.SUCCEEDED


# ---- the end


def test_a_draining_front_claims_nothing_and_finishes_what_runs() -> None:
    leader = Leader()
    leader.run(job_id="a")
    leader.front.drain()
    leader.run(job_id="b")
    assert leader.status("b").state is State.QUEUED
    leader.step("x", finish=Finish.LENGTH)
    assert leader.status("a").state is State.SUCCEEDED
    assert leader.front.beat().state == "draining"


def test_a_job_handed_back_is_at_once_free_for_others_and_its_attempt_is_not_charged() -> None:
    leader = Leader()
    leader.run()
    leader.step("abc", after_s=0.001)
    leader.front.drain()
    leader.front.hand_back()
    leader.turn()
    assert leader.status().state is State.QUEUED
    claimed = leader.store.claim(MODEL, owner="other", limit=1, lease_s=60, idle=False).jobs[0]
    assert "".join(chunk.text for chunk in claimed.journal) == "abc"
    assert claimed.lease.attempt == 2
    assert leader.status().attempt == 1
    assert leader.group.cancelled


def another_leader(leader: Leader, **fields: Any) -> Holder:
    """Of the same name, on another host."""
    return dataclasses.replace(this_process("g"), host="elsewhere", place="elsewhere", life="other", **fields)


def test_a_leader_whose_name_a_living_leader_has_says_whose_it_is_and_ends() -> None:
    leader = Leader(ready=False)
    other = another_leader(leader, pid=4711)
    leader.store.hold(other)
    leader.enqueue(job_id="waits")
    leader.ready()
    for _ in range(3):
        leader.turn(after_s=1.1)
        leader.store.hold(other)
    assert leader.front.fatal == (
        "group g is led by pid 4711 on elsewhere already: end that one first, or choose another name"
    )
    assert leader.status("waits").state is State.QUEUED
    leader.front.leave()
    assert "beat" not in leader.redis.calls, "it neither beats in the other's name nor takes leave in it"


def test_the_name_of_a_leader_that_was_killed_is_free_again_when_its_beats_are_old() -> None:
    leader = Leader(ready=False)
    leader.store.hold(another_leader(leader))
    leader.enqueue(job_id="waits")
    leader.ready()
    for _ in range(7):
        leader.turn(after_s=1.0)
    assert leader.front.fatal is None
    assert leader.status("waits").state is State.RUNNING


def test_a_leader_that_was_killed_here_can_be_started_again_at_once() -> None:
    leader = Leader(ready=False)
    leader.store.hold(dataclasses.replace(this_process("g"), pid=1, born="boot:a dead one's"))
    leader.enqueue(job_id="waits")
    leader.ready()
    leader.turn()
    assert leader.status("waits").state is State.RUNNING


def test_a_leader_that_was_silent_while_another_took_its_name_ends() -> None:
    leader = Leader()
    leader.clock.now += 6.0
    leader.store.hold(another_leader(leader))
    leader.enqueue(job_id="waits")
    leader.turn()
    assert "was taken over by pid" in (leader.front.fatal or "")
    assert leader.status("waits").state is State.QUEUED


def test_a_group_says_every_second_that_it_lives() -> None:
    leader = Leader()
    leader.run()
    leader.step("ab", after_s=1.0)
    (queue,) = leader.store.queues()
    (beat,) = queue.groups
    assert (beat.group, beat.state, beat.running, beat.capacity, beat.epoch) == ("g", "ready", 1, 4, 1)
    assert beat.info["kv_use"] == 0.2
    assert beat.info["pids"] == [11, 12]
    leader.redis.calls.clear()
    for _ in range(10):
        leader.turn(after_s=0.5)
    assert 4 <= leader.redis.calls.count("beat") <= 6


def test_a_leader_sweeps_four_times_a_second_and_renews_twice() -> None:
    leader = Leader()
    leader.run()
    leader.redis.calls.clear()
    for _ in range(100):
        leader.turn(after_s=0.05)
    assert 17 <= leader.redis.calls.count("sweep") <= 20
    assert 9 <= leader.redis.calls.count("renew") <= 10


def test_deadlines_of_jobs_that_ended_are_forgotten() -> None:
    leader = Leader()
    for number in range(300):
        leader.run(job_id=f"id-{number}", deadline_s=86_400.0)
        leader.step("a", finish=Finish.LENGTH)
    assert len(leader.front._deadlines) <= 2 + MIN_DEADLINES


def test_a_refused_job_is_a_line_of_the_log_without_its_prompt(caplog: pytest.LogCaptureFixture) -> None:
    leader = Leader()
    with caplog.at_level("INFO", logger="hortator.front"):
        leader.run(prompt="secret" * 99, job_id="long-1")
    assert "job long-1 is refused: prompt_too_long" in caplog.messages
    assert "secret" not in caplog.text


def test_a_flood_of_refused_jobs_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    leader = Leader()
    with caplog.at_level("INFO", logger="hortator.front"):
        for number in range(23):
            leader.run(prompt="secret" * 99, job_id=f"long-{number}")
        assert sum("is refused" in line for line in caplog.messages) == 20
        leader.turn(after_s=60)
    assert "3 more jobs were refused: prompt_too_long 3" in caplog.messages


def test_a_start_tells_what_its_time_was_spent_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    leader = Leader()
    info = dataclasses.replace(leader.info, details={"meet_s": "0.5", "load_s": "7.0"})
    leader.front.on_events([Ready(2, info, 9.0)])
    assert "ready after 9.0 s (start and import 1.5, meet 0.5, load 7.0): " in caplog.text


def test_a_suspect_that_cannot_be_opened_for_whatever_reason_fails_and_the_next_job_is_claimed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leader = Leader()
    leader.run(job_id="bad")
    leader.down()
    leader.enqueue(job_id="good")
    with monkeypatch.context() as patch:
        patch.setattr("hortator.workers.front.open_envelope", lambda message: 1 / 0)
        leader.ready(epoch=2)
    failure = leader.status("bad").failure
    assert failure is not None
    assert "ZeroDivisionError" in failure.message
    leader.turn(after_s=0.1)
    assert leader.status("good").state is State.RUNNING


def claimed_again_with(leader: Leader, monkeypatch: pytest.MonkeyPatch, **damage: Any) -> None:
    """The job of an earlier attempt, as a claim tells it when its keys are damaged."""
    leader.run(job_id="bad")
    leader.step("a", of=leader.group.admitted[-1].handle)
    leader.front.hand_back()
    leader.turn()
    leader.enqueue(job_id="good")
    real = leader.store.claim

    def claim(*args: Any, **kwargs: Any) -> Claim:
        found = real(*args, **kwargs)
        jobs = (dataclasses.replace(one, **damage) if one.lease.job_id == "bad" else one for one in found.jobs)
        return dataclasses.replace(found, jobs=tuple(jobs))

    monkeypatch.setattr(leader.store, "claim", claim)
    leader.turn(after_s=0.1)


@pytest.mark.parametrize(
    "damage",
    [
        {"journal": (), "damage": "its journal in Redis was damaged"},
        {"journal": (Chunk(index=0, token_ids=(256,), text="a"),)},
        {"journal": (Chunk(index=0, token_ids=(97,), text="a", choice=1),)},
    ],
    ids=["as the store tells", "a token that the model lacks", "an answer that nobody asked for"],
)
def test_a_job_whose_journal_is_damaged_fails_and_others_run(
    monkeypatch: pytest.MonkeyPatch, damage: dict[str, Any]
) -> None:
    leader = Leader()
    claimed_again_with(leader, monkeypatch, **damage)
    failure = leader.status("bad").failure
    assert failure is not None
    assert (leader.status("bad").state, failure.code) == (State.FAILED, "damaged")
    assert "journal in Redis" in failure.message
    assert leader.store.count_dead_letters() == 0, "its message is sound"
    assert leader.status("good").state is State.RUNNING
    assert leader.front.num_live == 1

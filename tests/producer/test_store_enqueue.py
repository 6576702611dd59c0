"""Accepting jobs: all or none, once, within limits."""

import json

import pytest

from hortator.producer.errors import BadRequest, IdempotencyConflict, QueueFull, UnknownModel
from hortator.producer.schema import Job, Priority, State
from tests.producer.rig import MODEL, MemoryRig, RedisRig, Rig, done, foreign, job, prompts_of


def test_an_accepted_job_is_queued_with_its_own_id(rig: Rig) -> None:
    first, second = rig.enqueue("one", "two")
    assert first != second
    status = rig.status(first)
    assert (status.state, status.model, status.attempt, status.num_tokens) == (State.QUEUED, MODEL, 0, 0)
    assert status.timings.enqueued_ms is not None
    assert status.timings.claimed_ms is None


def test_the_message_is_celerys_and_its_kwargs_are_the_job(rig: Rig) -> None:
    one = job("what?", metadata={"a": "b"}, deadline_s=60)
    [receipt] = rig.store.enqueue([one])
    message = json.loads(rig.claim().jobs[0].message)
    assert message["headers"]["id"] == receipt.job_id
    assert message["headers"]["task"] == "llm.generate"
    assert message["headers"]["expires"] is None
    assert message["properties"]["body_encoding"] == "base64"
    import base64

    args, kwargs, embed = json.loads(base64.b64decode(message["body"]))
    assert (args, kwargs) == ([], one.model_dump(mode="json", exclude_none=True))
    assert Job.model_validate(kwargs) == one
    assert embed == {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def test_the_prompt_is_nowhere_in_the_envelope(rig: Rig) -> None:
    rig.enqueue("SECRET-PROMPT")
    assert b"SECRET-PROMPT" not in rig.claim().jobs[0].message


def test_any_text_travels_unchanged(rig: Rig) -> None:
    prompts = ["ünïcode \U0001f680", "\x00\x01\x1f", '"body": "', "\\", "\u2028", "a" * 100_000]
    rig.enqueue(*prompts)
    assert prompts_of(rig.claim()) == prompts


def test_jobs_of_one_class_are_served_in_order(rig: Rig) -> None:
    rig.enqueue(*map(str, range(600)))  # more than one round trip
    assert prompts_of(rig.claim(1000)) == list(map(str, range(600)))


def test_an_unknown_model_is_refused_and_the_known_ones_are_named(rig: Rig) -> None:
    rig.beat("other")
    with pytest.raises(UnknownModel, match=r"'nope'.*other, tiny") as caught:
        rig.enqueue("x", model="nope")
    assert (caught.value.job_id, caught.value.index) == (None, 0)


def test_a_refused_job_is_named_by_its_index_and_by_its_id_only_if_the_caller_chose_that(rig: Rig) -> None:
    rig.enqueue("first", idempotency_key="k")
    jobs = [job("a"), job("b"), job("other", idempotency_key="k")]
    with pytest.raises(IdempotencyConflict) as caught:
        rig.store.enqueue(jobs)
    assert (caught.value.job_id, caught.value.index) == (None, 2)
    with pytest.raises(IdempotencyConflict) as caught:
        rig.store.enqueue(jobs, job_ids=["id-a", "id-b", "id-c"])
    assert (caught.value.job_id, caught.value.index) == ("id-c", 2)
    assert rig.depth() == 1


def test_a_model_that_was_only_ever_claimed_for_is_not_known(rig: Rig) -> None:
    rig.push(foreign(), model="stranger")
    rig.claim(model="stranger")
    with pytest.raises(UnknownModel):
        rig.enqueue("x", model="stranger")


def test_with_require_known_model_off_jobs_wait_for_their_first_group(rig: Rig) -> None:
    rig.rule(require_known_model=False)
    [job_id] = rig.enqueue("x", model="later")
    assert [one.lease.job_id for one in rig.claim(model="later").jobs] == [job_id]


def test_a_refused_batch_writes_nothing(rig: Rig) -> None:
    with pytest.raises(UnknownModel):
        rig.store.enqueue([job("a"), job("b", model="nope"), job("c")])
    assert rig.depth() == 0
    assert rig.claim().jobs == ()


def test_a_full_queue_is_refused_with_the_time_to_come_back(rig: Rig) -> None:
    rig.rule(max_queued_per_model=3)
    rig.enqueue("1", "2")
    with pytest.raises(QueueFull, match="limit of 3") as caught:
        rig.enqueue("3", "4")
    assert 1 <= caught.value.retry_after_s <= 60
    assert rig.depth() == 2
    rig.enqueue("3")
    rig.claim(1)
    rig.enqueue("4")


def test_a_tenants_limit_is_its_own(rig: Rig) -> None:
    rig.rule(max_queued_per_tenant=2)
    rig.enqueue("1", "2", tenant="acme")
    with pytest.raises(QueueFull, match="acme"):
        rig.enqueue("3", tenant="acme")
    rig.enqueue("1", "2", tenant="other")
    rig.claim(1)
    rig.enqueue("3", tenant="acme")


def test_jobs_that_end_while_queued_make_room(rig: Rig) -> None:
    rig.rule(max_queued_per_model=2, max_queued_per_tenant=2)
    ids = rig.enqueue("1", "2")
    rig.store.cancel(ids)
    assert rig.depth() == 0
    rig.enqueue("3", "4")
    assert prompts_of(rig.claim()) == ["3", "4"]


def num_messages(rig: Rig) -> int:
    """In the lists, whether their jobs live or not."""
    if isinstance(rig, RedisRig):
        return sum(rig.redis.llen(name) for name in rig.names.queues(MODEL))
    assert isinstance(rig, MemoryRig)
    return sum(map(len, rig.memory._records.queue(MODEL).lists.values()))


@pytest.mark.parametrize("limit", ["max_queued_per_model", "max_queued_per_tenant"])
def test_jobs_that_are_cancelled_again_and_again_leave_no_more_messages_than_the_limit(rig: Rig, limit: str) -> None:
    rig.rule(**{limit: 10})
    for turn in range(100):
        ids = rig.enqueue(*map(str, range(10)), priority="batch" if turn % 2 else "standard")
        assert num_messages(rig) <= 10
        rig.store.cancel(ids)
    assert rig.depth() == 0
    last = rig.enqueue("last")
    assert [one.lease.job_id for one in rig.claim().jobs] == last


def test_messages_of_ended_jobs_behind_the_one_that_is_served_next_make_room_too(rig: Rig) -> None:
    rig.rule(max_queued_per_model=4)
    _, *others = rig.enqueue("1", "2", "3", "4")
    rig.store.cancel(others)
    rig.enqueue("5", "6", "7")
    assert num_messages(rig) == 4
    assert prompts_of(rig.claim()) == ["1", "5", "6", "7"]


def test_messages_of_foreign_clients_count_for_the_limit(rig: Rig) -> None:
    rig.rule(max_queued_per_model=3)
    for n in range(3):
        rig.push(foreign(f"f-{n}"))
    with pytest.raises(QueueFull, match="limit of 3") as caught:
        rig.enqueue("x")
    assert caught.value.retry_after_s >= 1
    rig.claim(1)
    rig.enqueue("x")


def test_a_tenants_ended_jobs_do_not_fill_the_queue_of_others(rig: Rig) -> None:
    """One that lives, further on than anybody looks, keeps those behind it in the list."""
    rig.rule(max_queued_per_tenant=50, max_queued_per_model=200)
    rig.enqueue(*["live"] * 50, tenant="one")
    ids = rig.enqueue(*["dead"] * 50, tenant="other")
    rig.store.cancel(ids)
    with pytest.raises(QueueFull, match="other"):
        rig.enqueue("x", tenant="other")
    rig.enqueue("x", tenant="third")


def test_a_sweep_takes_messages_of_ended_jobs_out_of_the_queue(rig: Rig) -> None:
    rig.store.cancel(rig.enqueue("1", "2", priority="batch") + rig.enqueue("3"))
    rig.enqueue("4")
    rig.store.sweep()
    assert (num_messages(rig), rig.depth()) == (1, 1)
    assert prompts_of(rig.claim()) == ["4"]


def test_a_key_whose_job_is_forgotten_begins_a_new_one(rig: Rig) -> None:
    rig.rule(result_ttl_s=1)
    [first] = rig.enqueue("a", idempotency_key="k")
    rig.store.cancel([first])
    rig.wait(1.2)
    assert rig.store.statuses([first]) == [None]
    [again] = rig.store.enqueue([job("b", idempotency_key="k")])
    assert (again.duplicate, again.job_id == first) == (False, False)
    assert rig.state(again.job_id) is State.QUEUED
    assert rig.store.enqueue([job("b", idempotency_key="k")])[0].job_id == again.job_id


def test_the_same_idempotency_key_and_body_gives_the_same_job(rig: Rig) -> None:
    [first] = rig.store.enqueue([job("a", idempotency_key="k")])
    [again] = rig.store.enqueue([job("a", idempotency_key="k")])
    assert again.job_id == first.job_id
    assert (first.duplicate, again.duplicate) == (False, True)
    assert rig.depth() == 1


def test_an_idempotency_key_works_within_one_batch(rig: Rig) -> None:
    receipts = rig.store.enqueue([job("a", idempotency_key="k"), job("b"), job("a", idempotency_key="k")])
    assert receipts[0].job_id == receipts[2].job_id != receipts[1].job_id
    assert rig.depth() == 2


def test_the_same_idempotency_key_with_another_body_is_refused(rig: Rig) -> None:
    rig.enqueue("a", idempotency_key="k")
    with pytest.raises(IdempotencyConflict):
        rig.enqueue("b", idempotency_key="k")
    with pytest.raises(IdempotencyConflict):
        rig.store.enqueue([job("a", idempotency_key="n"), job("b", idempotency_key="n")])
    assert rig.depth() == 1


def test_idempotency_keys_belong_to_a_tenant(rig: Rig) -> None:
    [one] = rig.enqueue("a", idempotency_key="k", tenant="t1")
    [two] = rig.enqueue("b", idempotency_key="k", tenant="t2")
    assert one != two


def test_an_idempotency_key_is_known_after_the_job_ended(rig: Rig) -> None:
    [first] = rig.enqueue("a", idempotency_key="k")
    rig.store.commit([done(rig.claim_one())])
    assert rig.enqueue("a", idempotency_key="k") == [first]


def test_an_idempotency_key_is_forgotten_after_its_time(rig: Rig) -> None:
    rig.rule(idempotency_ttl_s=0.05)
    [first] = rig.enqueue("a", idempotency_key="k")
    rig.wait(0.1)
    assert rig.enqueue("b", idempotency_key="k") != [first]


def test_a_call_whose_reply_was_lost_may_be_repeated(rig: Rig) -> None:
    jobs = [job("a"), job("b")]
    rig.store.enqueue(jobs, job_ids=["id-1", "id-2"])
    receipts = rig.store.enqueue(jobs, job_ids=["id-1", "id-2"])
    assert [(receipt.job_id, receipt.duplicate) for receipt in receipts] == [("id-1", True), ("id-2", True)]
    assert rig.depth() == 2


@pytest.mark.parametrize("bad", ["", "a b", "../x", "x" * 129, "\n", "a\nb", "ü"])
def test_ids_that_could_break_keys_are_refused(rig: Rig, bad: str) -> None:
    with pytest.raises(BadRequest):
        rig.store.enqueue([job()], job_ids=[bad])


def test_a_foreign_tenants_id_cannot_be_taken(rig: Rig) -> None:
    rig.store.enqueue([job(tenant="t1")], job_ids=["mine"])
    with pytest.raises(BadRequest):
        rig.store.enqueue([job(tenant="t2")], job_ids=["mine"])


def test_a_job_larger_than_a_message_may_be_is_refused(rig: Rig) -> None:
    rig.rule(max_message_bytes=10_000)
    with pytest.raises(BadRequest, match="limit is 10000"):
        rig.enqueue("x" * 10_000)


def test_a_long_enqueue_that_fails_names_what_was_accepted_before(rig: Rig) -> None:
    """MemoryStore takes all in one call, Redis a few hundred at a time."""
    jobs = [job(str(i)) for i in range(600)]
    jobs[550] = job("bad", model="nope")
    with pytest.raises(UnknownModel) as caught:
        rig.store.enqueue(jobs)
    assert len(caught.value.accepted) == rig.depth() in (0, 500)


def test_nothing_to_enqueue_is_fine(rig: Rig) -> None:
    assert rig.store.enqueue([]) == []


def test_every_priority_class_gets_its_share_and_none_starves(rig: Rig) -> None:
    for priority in Priority:
        rig.enqueue(*[f"{priority.value}-{i}" for i in range(60)], priority=priority)
    for i in range(60):
        rig.push(foreign(f"low-{i}", prompt=f"lowest-{i}"), step=9)
    served = [prompt.partition("-")[0] for _ in range(6) for prompt in prompts_of(rig.claim(10))]
    shares = {name: served.count(name) for name in ("interactive", "standard", "batch", "lowest")}
    assert shares == {"interactive": 32, "standard": 16, "batch": 8, "lowest": 4}


def test_an_empty_class_leaves_its_turns_to_the_others(rig: Rig) -> None:
    rig.enqueue(*["s"] * 40, priority="standard")
    rig.enqueue(*["b"] * 40, priority="batch")
    assert prompts_of(rig.claim(30)).count("s") == 20
    rig.enqueue(*["i"] * 10, priority="interactive")
    assert len(rig.claim(100).jobs) == 60

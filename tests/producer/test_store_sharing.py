"""Several groups of one model share what is queued, by the rows that each has free."""

import base64
import json

import pytest

from hortator.producer import calls, memory_claims
from hortator.producer.store import Claim, ClaimMode, GroupBeat, ReleaseReason
from tests.producer.rig import MODEL, RedisRig, Rig, foreign, job


def say(rig: Rig, group: str, room: int, *, state: str = "ready") -> None:
    rig.store.beat(GroupBeat(group, MODEL, 0, 64, 1, state, room=room))


def enqueue(rig: Rig, count: int, **fields: object) -> None:
    rig.enqueue(*(f"p{i}" for i in range(count)), **fields)


def taken(claim: Claim) -> tuple[ClaimMode, int]:
    return claim.mode, len(claim.jobs)


def test_idle_groups_share_a_burst(rig: Rig) -> None:
    say(rig, "a", 64)
    say(rig, "b", 64)
    enqueue(rig, 64)
    assert taken(rig.claim(80, owner="a", surplus=16)) == (ClaimMode.SHARED, 32)
    assert taken(rig.claim(80, owner="b", surplus=16)) == (ClaimMode.SHARED, 22)  # of 32, for 64 of 96 free rows
    assert taken(rig.claim(48, owner="a", surplus=16)) == (ClaimMode.SHARED, 5)
    assert taken(rig.claim(1, owner="b")) == (ClaimMode.TOGETHER, 1)


def test_the_emptier_group_takes_more(rig: Rig) -> None:
    say(rig, "a", 10)
    say(rig, "b", 30)
    enqueue(rig, 20)
    assert taken(rig.claim(10, owner="a")) == (ClaimMode.SHARED, 5)
    assert taken(rig.claim(30, owner="b")) == (ClaimMode.SHARED, 13)


def test_nothing_waits_inside_a_full_group_while_another_has_rows(rig: Rig) -> None:
    say(rig, "a", 0)
    say(rig, "b", 8)
    enqueue(rig, 8)
    assert taken(rig.claim(16, owner="a", surplus=16)) == (ClaimMode.SHARED, 0)
    enqueue(rig, 4)
    assert taken(rig.claim(16, owner="a", surplus=16)) == (ClaimMode.SHARED, 4)  # what is too much for all rows
    assert taken(rig.claim(10, owner="b", surplus=2)) == (ClaimMode.TOGETHER, 8)


def test_a_group_alone_takes_all_that_it_asks_for(rig: Rig) -> None:
    say(rig, "a", 64)
    enqueue(rig, 100)
    assert taken(rig.claim(80, owner="a", surplus=16)) == (ClaimMode.TOGETHER, 80)
    assert taken(rig.claim(16, owner="a", surplus=16)) == (ClaimMode.TOGETHER, 16)


def test_one_job_is_taken_by_whoever_comes_first(rig: Rig) -> None:
    for group in "abcd":
        say(rig, group, 64)
    enqueue(rig, 1)
    assert taken(rig.claim(80, owner="c", surplus=16)) == (ClaimMode.TOGETHER, 1)


@pytest.mark.parametrize("state", ["draining", "gone"])
def test_who_takes_no_jobs_has_no_share(rig: Rig, state: str) -> None:
    say(rig, "b", 64)
    say(rig, "b", 0, state=state)
    enqueue(rig, 10)
    assert taken(rig.claim(64, owner="a")) == (ClaimMode.TOGETHER, 10)


def test_a_silent_group_has_no_share_for_long(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "ROOM_COUNTS_S", 0.2)
    monkeypatch.setattr(memory_claims, "ROOM_COUNTS_S", 0.2)
    say(rig, "b", 64)
    enqueue(rig, 10)
    assert taken(rig.claim(64, owner="a")) == (ClaimMode.SHARED, 5)
    rig.wait(0.3)
    assert taken(rig.claim(64, owner="a")) == (ClaimMode.TOGETHER, 5)


def test_a_job_takes_a_row_for_each_of_its_answers(rig: Rig) -> None:
    enqueue(rig, 5, sampling={"n": 16, "temperature": 1.0})
    first = rig.claim(40)
    assert len(first.jobs) == 3  # 48 rows: the last one goes beyond the limit
    assert len(rig.claim(1).jobs) == 1
    rig.store.release([one.lease for one in first.jobs], reason=ReleaseReason.DRAINED)
    assert len(rig.claim(17).jobs) == 2, "it is not forgotten when a job goes back"


@pytest.fixture
def short_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (calls, memory_claims):
        monkeypatch.setattr(module, "CLAIM_JOBS", 10)
        monkeypatch.setattr(module, "CLAIM_BYTES", 100_000)


def test_a_group_with_more_rows_than_a_reply_holds_jobs_has_its_share_of_all_of_them(
    rig: Rig, short_replies: None
) -> None:
    say(rig, "a", 40)
    say(rig, "b", 40)
    enqueue(rig, 50)
    asked = [(50, "a"), (50, "b"), (40, "a"), (30, "a")]
    claims = [rig.claim(limit, owner=owner, surplus=10) for limit, owner in asked]
    assert [(len(one.jobs), one.more) for one in claims] == [(10, True), (10, True), (10, True), (8, False)]
    assert claims[-1].mode is ClaimMode.SHARED, "the other 12 are left to b, which has 30 of 50 free rows"


def test_a_group_alone_with_many_rows_is_told_that_there_is_more(rig: Rig, short_replies: None) -> None:
    enqueue(rig, 25)
    claims = [rig.claim(100) for _ in range(3)]
    assert [(len(one.jobs), one.more) for one in claims] == [(10, True), (10, True), (5, False)]


def test_a_reply_is_cut_at_its_bytes_too(rig: Rig, short_replies: None) -> None:
    rig.enqueue(*("x" * 50_000 for _ in range(4)))
    claims = [rig.claim(100) for _ in range(3)]
    assert [(len(one.jobs), one.more) for one in claims] == [(2, True), (2, True), (0, False)]


def test_two_groups_of_thousands_of_rows_empty_a_queue_of_thousands(rig: Rig) -> None:
    rows, spare, count = 4096, 1024, 2500
    say(rig, "a", rows)
    say(rig, "b", rows)
    rig.store.enqueue([job() for _ in range(count)])
    free = {"a": rows, "b": rows}
    for owner in "ab" * 20:
        claim = rig.claim(free[owner] + spare, owner=owner, surplus=spare)
        free[owner] -= len(claim.jobs)
    assert 2 * rows - sum(free.values()) == count


def asking(job_id: str, kwargs: dict[str, object], *, plain: bool = False) -> bytes:
    """A plain Celery client's message; `plain`: its body is not in base64."""
    body = json.dumps([[], kwargs, {}])
    return foreign(job_id, body=body if plain else base64.b64encode(body.encode()).decode())


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("padding", range(3))
@pytest.mark.parametrize("kwargs", [{"n": 16}, {"sampling": {"temperature": 1.0, "n": 16}}])
def test_a_plain_clients_job_takes_a_row_for_each_of_its_answers(
    rig: Rig, kwargs: dict[str, object], padding: int, plain: bool
) -> None:
    for number in range(5):
        prompt = "x" * padding + ' a prompt that says "n": 2'
        rig.push(asking(f"foreign-{number}", {"prompt": prompt} | kwargs, plain=plain))
    assert len(rig.claim(40).jobs) == 3


@pytest.mark.parametrize("n", [0, 17, "16", 1e99, None])
def test_what_asks_for_an_impossible_number_of_answers_counts_for_one(rig: Rig, n: object) -> None:
    for number in range(5):
        rig.push(asking(f"foreign-{number}", {"prompt": 'the text "n": 16', "n": n}))
    assert len(rig.claim(4).jobs) == 4


def test_a_replayed_letter_takes_a_row_for_each_of_its_answers(rig: Rig) -> None:
    rig.rule(max_attempts=1)
    enqueue(rig, 3, sampling={"n": 16, "temperature": 1.0})
    rig.store.release([one.lease for one in rig.claim(48).jobs], reason=ReleaseReason.CRASHED)
    rig.store.replay([letter.letter_id for letter in rig.store.dead_letters()])
    assert len(rig.claim(32).jobs) == 2


def test_of_a_group_that_is_gone_nothing_stays_where_others_go_on(redis_rig: RedisRig) -> None:
    rooms = redis_rig.names.own + f"rooms:{MODEL}"
    redis_rig.redis.hset(rooms, "killed", "1000 8")
    redis_rig.redis.hset(rooms, "garbage", "x")
    redis_rig.store.beat(GroupBeat("alive", MODEL, 0, 8, 1, "ready", room=8))
    redis_rig.store.sweep()
    assert redis_rig.redis.hkeys(rooms) == [b"alive"]

"""Somebody damaged single keys: each costs the job or the model that it belongs to, and nobody else."""

import time

import pytest

from hortator.producer import journal
from hortator.producer.errors import JobFailed
from hortator.producer.redis_store import RedisStore
from hortator.producer.schema import State, Status
from hortator.producer.store import ClaimMode, GroupBeat, Lease, ReleaseReason, Signals, Store, Verdict
from hortator.producer.sweeper import Sweeper
from tests.producer.rig import MODEL, MemoryRig, RedisRig, Rig, done, foreign, job, prompt_of, prompts_of, tokens


def drop_message(rig: Rig, job_id: str) -> None:
    if isinstance(rig, MemoryRig):
        rig.memory._records.by_id[job_id].message = None
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


@pytest.mark.parametrize("damage", ["gone", "of another type", "a strange entry", "half an entry", "a gap"])
def test_a_job_whose_journal_is_damaged_fails_when_it_is_claimed_again(redis_rig: RedisRig, damage: str) -> None:
    ids = redis_rig.enqueue("a", "b")
    leases = [one.lease for one in redis_rig.claim().jobs]
    redis_rig.store.append([tokens(lease, 0, 1, 2) for lease in leases])
    redis_rig.store.append([tokens(lease, 2, 3) for lease in leases])
    redis_rig.store.release(leases, reason=ReleaseReason.DRAINED)
    key, raw = redis_rig.names.journal(ids[0]), redis_rig.redis
    if damage == "a gap":
        raw.xdel(key, "2-0")
    elif damage == "a strange entry":
        raw.xadd(key, {"c": "x"}, id="4-0")
    elif damage == "half an entry":
        raw.xadd(key, {"c": "[3,[4]]"}, id="4-0")
        raw.hset(redis_rig.names.job(ids[0]), "tokens", 4)
    else:
        raw.delete(key)
        if damage == "of another type":
            raw.set(key, "x")
    claim = redis_rig.claim()
    assert prompts_of(claim) == ["b"]
    assert [chunk.token_ids for chunk in claim.jobs[0].journal] == [(1, 2), (3,)]
    assert_damaged(redis_rig.status(ids[0]), "journal")
    assert redis_rig.depth() == 0


ODD_CHUNKS = {
    "no JSON": "x",
    "not UTF-8": b'[0,[1,2],"\xff",null]',
    "no list": '{"index": 0}',
    "too few parts": '[0,[1,2],"ab"]',
    "too many parts": '[0,[1,2],"ab",null,null,1,1]',
    "token ids that are text": '[0,["1","2"],"ab",null]',
    "token ids that are true": '[0,[true,1],"ab",null]',
    "negative token ids": '[0,[1,-2],"ab",null]',
    "token ids out of range": '[0,[1,2147483648],"ab",null]',
    "huge token ids": f'[0,[1,{"9" * 5000}],"ab",null]',
    "a text that is none": "[0,[1,2],7,null]",
    "fewer log-probabilities than tokens": '[0,[1,2],"ab",[-0.5]]',
    "log-probabilities that are text": '[0,[1,2],"ab",["-0.5",null]]',
    "alternatives that are no pairs": '[0,[1,2],"ab",null,[[[1]],[]]]',
    "an answer beyond all": '[0,[1,2],"ab",null,null,16]',
    "deep nesting": f'[0,[1,2],"ab",null,{"[" * 50_000}]',
}


def with_odd_chunk(rig: RedisRig, odd: str | bytes) -> list[str]:
    """Two queued jobs with two tokens each, the first of which has a damaged journal."""
    ids = rig.enqueue("a", "b")
    leases = [one.lease for one in rig.claim().jobs]
    rig.store.append([tokens(lease, 0, 1, 2) for lease in leases])
    rig.store.release(leases, reason=ReleaseReason.DRAINED)
    rig.redis.delete(rig.names.journal(ids[0]))
    rig.redis.xadd(rig.names.journal(ids[0]), {"c": odd}, id="2-0")
    return ids


@pytest.mark.parametrize("odd", ODD_CHUNKS.values(), ids=ODD_CHUNKS)
def test_a_claim_names_the_damage_of_a_journal_that_no_leader_wrote(redis_rig: RedisRig, odd: str | bytes) -> None:
    ids = with_odd_chunk(redis_rig, odd)
    claims = {claimed.lease.job_id: claimed for claimed in redis_rig.claim().jobs}
    assert (claims[ids[1]].damage, len(claims[ids[1]].journal)) == (None, 1)
    if ids[0] in claims:
        assert claims[ids[0]].journal == ()
        assert "journal in Redis was damaged" in str(claims[ids[0]].damage)
    else:  # the script has seen it already
        assert_damaged(redis_rig.status(ids[0]), "journal")


@pytest.mark.parametrize("odd", ODD_CHUNKS.values(), ids=ODD_CHUNKS)
def test_whoever_reads_a_damaged_journal_hears_whose_it_is(redis_rig: RedisRig, odd: str | bytes) -> None:
    ids = with_odd_chunk(redis_rig, odd)
    with pytest.raises(JobFailed, match=f"job {ids[0]}: its journal in Redis was damaged") as failure:
        redis_rig.store.chunks(ids[0])
    assert (failure.value.job_id, failure.value.reason) == (ids[0], "damaged")
    assert [chunk.token_ids for chunk in redis_rig.store.chunks(ids[1])] == [(1, 2)]


@pytest.mark.parametrize("damage", ["of another type", "a strange field", "a gap", "a lost beginning", "twice"])
def test_a_journal_that_does_not_go_on_where_its_reader_stands_is_damaged(redis_rig: RedisRig, damage: str) -> None:
    redis_rig.enqueue("a")
    lease = redis_rig.claim_one()
    redis_rig.store.append([tokens(lease, index, index) for index in range(4)])
    key, raw = redis_rig.names.journal(lease.job_id), redis_rig.redis
    match damage:
        case "of another type":
            raw.set(key, "x")
        case "a strange field":
            raw.xadd(key, {"d": "x"}, id="9-0")
        case "a gap":
            raw.xdel(key, "3-0")
        case "a lost beginning":
            raw.xdel(key, "2-0")
        case _:
            raw.xadd(key, {"c": '[3,[3],"<3>",null]'}, id="4-1")
    with pytest.raises(JobFailed, match="was damaged"):
        redis_rig.store.chunks(lease.job_id, after=1)


def test_an_entry_longer_than_any_chunk_is_not_even_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MAX_CHUNK_BYTES", 30)
    assert journal.read_chunk(b'[0,[1,2],"ab",null]').token_ids == (1, 2)
    with pytest.raises(journal.DamagedJournal, match="an entry of 39 bytes"):
        journal.read_chunk(b'[0,[1,2],"ab",null]' + b" " * 20)


# ---- calls for many jobs


JOURNAL_DAMAGE = ["a later entry", "another type"]


def damage_journal(rig: RedisRig, job_id: str, how: str) -> None:
    key = rig.names.journal(job_id)
    if how == "another type":
        rig.redis.set(key, "x")
    else:
        rig.redis.xadd(key, {"c": "x"}, id="99-0")


@pytest.mark.parametrize("how", JOURNAL_DAMAGE)
def test_tokens_that_one_journal_does_not_take_cost_that_job_alone(redis_rig: RedisRig, how: str) -> None:
    ids = redis_rig.enqueue("a", "b", "c")
    leases = [one.lease for one in redis_rig.claim().jobs]
    damage_journal(redis_rig, ids[1], how)
    signals = redis_rig.store.append([tokens(lease, 0, 7) for lease in leases])
    assert signals == Signals(lost=frozenset({ids[1]}))
    assert_damaged(redis_rig.status(ids[1]), "journal")
    assert [redis_rig.status(job_id).num_tokens for job_id in ids] == [1, 0, 1]
    assert redis_rig.store.commit([done(lease) for lease in leases]) == [
        Verdict.COMMITTED,
        Verdict.FENCED,
        Verdict.COMMITTED,
    ]


def test_the_same_tokens_again_for_a_journal_of_another_type_cost_that_job_alone(redis_rig: RedisRig) -> None:
    ids = redis_rig.enqueue("a", "b")
    appends = [tokens(one.lease, 0, 7) for one in redis_rig.claim().jobs]
    redis_rig.store.append(appends)
    redis_rig.redis.set(redis_rig.names.journal(ids[0]), "x")
    assert redis_rig.store.append(appends) == Signals(lost=frozenset({ids[0]}))
    assert_damaged(redis_rig.status(ids[0]), "journal")


def call_for(store: Store, leases: list[Lease], what: str) -> object:
    match what:
        case "append":
            return store.append([tokens(lease, 0, 7) for lease in leases]).lost
        case "renew":
            return store.renew(leases, owner="a", lease_s=60).lost
        case "commit":
            verdicts = store.commit([done(lease) for lease in leases])
            return {lease.job_id for lease, verdict in zip(leases, verdicts, strict=True) if verdict is Verdict.FENCED}
        case "cancel":
            states = store.cancel([lease.job_id for lease in leases])
            return {lease.job_id for lease, state in zip(leases, states, strict=True) if state is None}
        case "ended":
            return set(store.ended([lease.job_id for lease in leases]))
        case _:
            store.release(leases, reason=ReleaseReason(what))
            found = store.statuses([lease.job_id for lease in leases])
            return {lease.job_id for lease, status in zip(leases, found, strict=True) if status is None}


@pytest.mark.parametrize("what", ["append", "renew", "commit", "cancel", "ended", *ReleaseReason])
def test_a_record_of_another_type_costs_that_job_alone(redis_rig: RedisRig, what: str) -> None:
    ids = redis_rig.enqueue("a", "b", "c")
    leases = [one.lease for one in redis_rig.claim().jobs]
    redis_rig.redis.set(redis_rig.names.job(ids[1]), "x")
    assert call_for(redis_rig.store, leases, what) == {ids[1]}


@pytest.mark.parametrize("reason", list(ReleaseReason))
@pytest.mark.parametrize("key", ["leases", "suspects", "depth"])
def test_bookkeeping_of_another_type_stops_no_hand_back(redis_rig: RedisRig, key: str, reason: ReleaseReason) -> None:
    ids = redis_rig.enqueue("a", "b")
    leases = [one.lease for one in redis_rig.claim().jobs]
    redis_rig.redis.set(getattr(redis_rig.names, key)(MODEL), "x")
    redis_rig.store.release(leases, reason=reason)
    assert [redis_rig.state(job_id) for job_id in ids] == [State.QUEUED, State.QUEUED]


def test_a_job_goes_back_although_a_key_of_another_type_has_the_queue_s_name(redis_rig: RedisRig) -> None:
    [job_id] = redis_rig.enqueue("a")
    lease = redis_rig.claim_one()
    redis_rig.redis.sadd(redis_rig.names.queue(MODEL, 3), "x")
    redis_rig.store.release([lease], reason=ReleaseReason.DRAINED)
    assert redis_rig.claim().jobs[0].lease == Lease(job_id, 2)
    assert redis_rig.redis.type(redis_rig.names.queue(MODEL, 3)) == b"set", "it may be somebody's"


def test_dead_letters_are_kept_although_their_count_is_garbage(redis_rig: RedisRig) -> None:
    redis_rig.redis.set(f"{redis_rig.names.own}letters_bytes", "x")
    redis_rig.push(b"junk")
    assert redis_rig.claim().jobs == ()
    assert redis_rig.reasons() == ["not a JSON object"]


# ---- the sweeper and the overview


def overdue_job(rig: RedisRig, model: str = MODEL) -> str:
    [receipt] = rig.store.enqueue([job(model=model, deadline_s=0.05)])
    rig.wait(0.1)
    return receipt.job_id


@pytest.mark.parametrize("model", ["aaa", "zzz"])
def test_leases_of_another_type_stop_the_sweep_of_no_other_model(redis_rig: RedisRig, model: str) -> None:
    redis_rig.beat(model)
    redis_rig.enqueue("a")
    lease = redis_rig.claim_one(lease_s=0.01)
    redis_rig.redis.set(redis_rig.names.leases(model), "x")
    late = overdue_job(redis_rig)
    report = redis_rig.store.sweep()
    assert (report.requeued, report.expired) == ((lease.job_id,), (late,))
    assert [told for told in report.damage if f"leases:{model}: WRONGTYPE" in told]
    assert redis_rig.store.sweep().damage == (), "it was dropped"


@pytest.mark.parametrize("zset", ["deadlines", "leases"])
@pytest.mark.parametrize("record", ["another type", "no model", "garbage"])
def test_a_record_that_cannot_be_read_is_dropped_by_the_sweep_and_others_are_ended(
    redis_rig: RedisRig, zset: str, record: str
) -> None:
    raw, names = redis_rig.redis, redis_rig.names
    late = overdue_job(redis_rig)
    key = names.deadlines if zset == "deadlines" else names.leases(MODEL)
    raw.zadd(key, {"evil": 1})
    if record == "another type":
        raw.set(names.job("evil"), "x")
    elif record == "no model":
        raw.hset(names.job("evil"), mapping={"state": "running"})
    else:
        fields = ("attempt", "free", "tokens", "suspicion", "deadline", "rows", "enqueued")
        raw.hset(names.job("evil"), mapping={"state": "running", "model": MODEL} | dict.fromkeys(fields, "x"))
    assert late in redis_rig.store.sweep().expired
    assert raw.zscore(key, "evil") is None
    assert redis_rig.store.sweep().expired == ()


def test_half_a_record_is_ended_at_its_deadline(redis_rig: RedisRig) -> None:
    late = overdue_job(redis_rig)
    redis_rig.redis.hdel(redis_rig.names.job(late), "model")
    assert f"job:{late}: no model" in redis_rig.store.sweep().damage[0]
    assert_damaged(redis_rig.status(late), "record")
    assert redis_rig.redis.ttl(redis_rig.names.job(late)) > 0


@pytest.mark.parametrize("key", ["models", "groups", "deadlines"])
def test_common_bookkeeping_of_another_type_stops_neither_sweep_nor_beat(redis_rig: RedisRig, key: str) -> None:
    redis_rig.redis.set(getattr(redis_rig.names, key), "x")
    redis_rig.store.queues()
    assert [told for told in redis_rig.store.sweep().damage if "WRONGTYPE" in told]
    redis_rig.beat()
    redis_rig.enqueue("a")
    assert redis_rig.depth() == 1
    assert len(redis_rig.store.queues()[0].groups) == 1


@pytest.mark.parametrize("key", ["leases:other", "suspects:other", "depth:other", "queue"])
def test_the_overview_passes_by_what_is_damaged_of_one_model(redis_rig: RedisRig, key: str) -> None:
    redis_rig.beat("other")
    redis_rig.enqueue("a")
    redis_rig.redis.sadd(redis_rig.names.queue("other") if key == "queue" else redis_rig.names.own + key, "x")
    assert [(queue.model, queue.depth) for queue in redis_rig.store.queues()] == [("other", 0), (MODEL, 1)]
    redis_rig.store.sweep()
    assert redis_rig.depth() == 1


def test_the_overview_passes_by_a_beat_that_no_group_can_have_sent(redis_rig: RedisRig) -> None:
    for said in ("{}", "x", "[]", '{"group": 1}'):
        redis_rig.redis.hset(redis_rig.names.groups, said, f"{int(time.time() * 1000)} {said}")
    assert [beat.group for beat in redis_rig.store.queues()[0].groups] == ["group"]


def test_a_sweeper_logs_what_is_damaged_once(redis_rig: RedisRig, caplog: pytest.LogCaptureFixture) -> None:
    redis_rig.redis.set(redis_rig.names.job("evil"), "x")
    sweeper = Sweeper(redis_rig.store, 60)
    for _ in range(3):
        redis_rig.redis.zadd(redis_rig.names.deadlines, {"evil": 1})
        sweeper.tick()
    [record] = caplog.records
    assert "hortator:job:evil: WRONGTYPE" in record.getMessage()


# ---- claims


GARBAGE = ["string x", "string 1e400", "string nan", "string -1.5", "list", "fields"]


def put_garbage(rig: RedisRig, key: str, what: str) -> None:
    raw = rig.redis
    before = raw.hkeys(key) if raw.type(key) == b"hash" else []
    if what != "fields":
        raw.delete(key)
    match what.split():
        case ["string", text]:
            raw.set(key, text)
        case ["list"]:
            raw.rpush(key, "x")
        case _:
            if raw.type(key) in (b"hash", b"none"):
                raw.hset(key, mapping=dict.fromkeys([*before, "!dead", "default", "since", "count", "rate"], "x"))


@pytest.mark.parametrize("what", GARBAGE)
@pytest.mark.parametrize("name", ["turn", "alone", "depth", "pace", "leases", "suspects", "rooms", "claimed"])
def test_garbage_in_bookkeeping_stops_no_claim(redis_rig: RedisRig, name: str, what: str) -> None:
    names, store = redis_rig.names, redis_rig.store
    store.beat(GroupBeat("other", MODEL, 0, 8, 1, "ready", room=8))
    redis_rig.enqueue("a", "b", "c")
    redis_rig.claim(1)
    assert isinstance(store, RedisStore)
    [claimed] = redis_rig.redis.keys(f"{names.own}claimed:*")
    key = claimed.decode() if name == "claimed" else f"{names.own}{name}:{MODEL}"
    put_garbage(redis_rig, key, what)
    redis_rig.enqueue("d")
    claims = [redis_rig.claim(8, idle=idle) for idle in (False, True, True, True)]
    assert sorted(prompt for claim in claims for prompt in prompts_of(claim)) == ["b", "c", "d"]
    leases = [one.lease for claim in claims for one in claim.jobs]
    assert redis_rig.store.commit([done(lease) for lease in leases]) == [Verdict.COMMITTED] * 3
    assert redis_rig.reasons() == []


def test_a_record_without_its_numbers_is_claimed_as_if_it_had_come_now(redis_rig: RedisRig) -> None:
    [job_id] = redis_rig.enqueue("a")
    redis_rig.redis.hdel(redis_rig.names.job(job_id), "enqueued", "attempt", "tenant")
    [claimed] = redis_rig.claim().jobs
    assert (claimed.lease.attempt, claimed.tenant) == (1, "default")
    assert abs(claimed.enqueued_ms - time.time() * 1000) < 5000
    redis_rig.redis.hdel(redis_rig.names.job(job_id), "enqueued", "attempt")
    assert redis_rig.status(job_id).timings.enqueued_ms is None


def test_the_message_of_a_job_whose_record_is_of_another_type_is_kept_as_a_dead_letter(redis_rig: RedisRig) -> None:
    ids = redis_rig.enqueue("a", "b")
    redis_rig.redis.set(redis_rig.names.job(ids[0]), "x")
    assert prompts_of(redis_rig.claim()) == ["b"]
    [letter] = redis_rig.letters()
    assert prompt_of(letter.message) == "a"


def test_a_foreign_message_runs_although_its_record_s_key_holds_something_else(redis_rig: RedisRig) -> None:
    redis_rig.redis.set(redis_rig.names.job("foreign-1"), "x")
    redis_rig.push(foreign("foreign-1"))
    assert redis_rig.claim_one() == Lease("foreign-1", 1)


# ---- records in a state that there is not


STATES = ["zombie", b"\xff"]


def with_odd_state(rig: RedisRig, state: str | bytes, phase: str) -> list[str]:
    """Two jobs, the first of which is in no known state; both are queued, suspects, running or have ended."""
    ids = rig.enqueue("a", "b")
    if phase != "queued":
        leases = [one.lease for one in rig.claim().jobs]
        if phase == "suspect":
            rig.store.release(leases, reason=ReleaseReason.CRASHED)
        if phase == "ended":
            rig.store.commit([done(lease) for lease in leases])
    rig.redis.hset(rig.names.job(ids[0]), "state", state)
    return ids


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("phase", ["queued", "suspect", "running", "ended"])
@pytest.mark.parametrize("look", ["status", "cancel", "ended", "claim", "sweep"])
def test_a_job_in_a_state_that_there_is_not_has_failed_for_whoever_looks(
    redis_rig: RedisRig, look: str, phase: str, state: str | bytes
) -> None:
    ids = with_odd_state(redis_rig, state, phase)
    match look:
        case "status":
            assert_damaged(redis_rig.status(ids[0]), "record")
        case "cancel":
            assert redis_rig.store.cancel(ids[:1]) == [State.FAILED]
        case "ended":
            assert ids[0] in redis_rig.store.ended(ids)
        case "claim":
            assert [one.lease.job_id for one in redis_rig.claim().jobs] == ids[1:] * (phase in ("queued", "suspect"))
        case _:
            redis_rig.redis.zadd(redis_rig.names.deadlines, {ids[0]: 1})
            redis_rig.store.sweep()
    assert_damaged(redis_rig.status(ids[0]), "record")
    assert redis_rig.redis.ttl(redis_rig.names.job(ids[0])) > 0, "it goes as any other"
    assert redis_rig.state(ids[1]) in (State.QUEUED, State.RUNNING, State.SUCCEEDED)
    redis_rig.claim()
    redis_rig.claim()
    assert (redis_rig.depth(), redis_rig.redis.exists(redis_rig.names.depth(MODEL))) == (0, 0)


METADATA = ["x", "[]", "7", '{"a": 1}', '{"a": null}', b'{"a": "\xff"}', "[" * 50_000, '{"a": {}}']


@pytest.mark.parametrize("metadata", METADATA, ids=lambda said: str(said[:10]))
def test_a_job_whose_metadata_cannot_be_read_has_failed_and_others_have_not(
    redis_rig: RedisRig, metadata: str | bytes
) -> None:
    ids = redis_rig.enqueue("a", "b", metadata={"k": "v"})
    redis_rig.redis.hset(redis_rig.names.job(ids[0]), "metadata", metadata)
    statuses = redis_rig.store.statuses(ids)
    assert statuses[0] is not None
    assert statuses[1] is not None
    assert_damaged(statuses[0], "record")
    assert (statuses[1].state, statuses[1].metadata) == (State.QUEUED, {"k": "v"})


# ---- records that are gone


def test_the_message_of_a_job_that_was_cancelled_long_ago_is_dropped_silently(rig: Rig) -> None:
    rig.rule(result_ttl_s=0.05)
    ids = rig.enqueue("cancelled", "waits")
    rig.store.cancel(ids[:1])
    [late] = [receipt.job_id for receipt in rig.store.enqueue([job("late", deadline_s=0.01)])]
    rig.wait(0.02)
    assert rig.store.sweep().expired == (late,)
    rig.wait(0.1)
    assert rig.store.statuses([ids[0], late]) == [None, None]
    assert rig.depth() == 1
    assert prompts_of(rig.claim()) == ["waits"]
    assert rig.reasons() == []
    rig.enqueue("next")
    assert rig.depth() == 1


def test_a_job_whose_record_was_lost_is_kept_as_a_dead_letter_although_others_were_cancelled(
    redis_rig: RedisRig,
) -> None:
    ids = redis_rig.enqueue("cancelled", "lost", "waits")
    redis_rig.store.cancel(ids[:1])
    redis_rig.redis.delete(*(redis_rig.names.job(job_id) for job_id in ids[:2]))
    assert prompts_of(redis_rig.claim()) == ["waits"]
    assert [prompt_of(letter.message) for letter in redis_rig.letters()] == ["lost"]


def test_a_record_that_was_lost_keeps_no_place_in_its_tenants_limit(redis_rig: RedisRig) -> None:
    redis_rig.rule(max_queued_per_tenant=1)
    [job_id] = redis_rig.enqueue("a")
    redis_rig.redis.set(redis_rig.names.job(job_id), "x")
    redis_rig.claim()
    redis_rig.claim()
    assert len(redis_rig.enqueue("b")) == 1

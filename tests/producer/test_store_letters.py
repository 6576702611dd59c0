"""Bad bytes never raise and are never lost: they are dead letters with a reason, readable and replayable."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hortator.producer.errors import BadRequest, UnknownJob
from hortator.producer.redis_store import RedisStore
from hortator.producer.schema import State
from hortator.producer.store import Lease, ReleaseReason
from tests.producer.rig import MODEL, RedisRig, Rig, done, foreign, prompts_of, tokens


class Canary:
    """Touches a file if anybody unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def headers(**changes: Any) -> dict[str, Any]:
    return {"task": "llm.generate", "id": "bad-1"} | changes


WITHOUT_ID = [
    b"",
    b" ",
    b"{",
    b"}",
    b"\xff",
    b"\xff\xfe\x00",
    b"\x00",
    b"null",
    b"true",
    b"NaN",
    b"1e999",
    b'"text"',
    b"[]",
    b'[{"headers": {"id": "x"}}]',
    b"{}",
    b'{"headers": null}',
    b'{"headers": []}',
    b'{"headers": "x"}',
    b'{"headers": {"id": NaN}}',
    b'{"headers": {"id": 7}}',
    b'{"headers": {"id": null}}',
    b'{"headers": {"id": ""}}',
    b'{"headers": {"id": "../../etc"}}',
    b'{"headers": {"id": "a b"}}',
    b'{"headers": {"id": "\xff"}}',
    b'{"headers": {"id": "' + b"x" * 129 + b'"}}',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"headers": {"id": "deep", "x": ' + b"[" * 5_000 + b"]" * 5_000 + b"}}",
    b'{"body": "' + b"A" * 1000,
    b"x" * 300_000,
    json.dumps({"headers": {"id": "fat", "argsrepr": "x" * 100_000}, "body": "", "properties": {}}).encode(),
]

untyped: dict[str, Any] = {"content-type": None}
WITH_ID = [
    foreign("bad-1", **{"content-type": "application/x-python-serialize"}),
    foreign("bad-1", **untyped),
    foreign("bad-1", body=None),
    foreign("bad-1", body={"prompt": "x"}),
    foreign("bad-1", properties=[1]),
    foreign("bad-1", properties=None),
    foreign("bad-1", headers={"id": "bad-1", "shadow": "\ud83d"}),
    foreign("bad-1", properties={"reply_to": {"\udc00": "\ud83d\ude00"}}),
]


@pytest.mark.parametrize("raw", WITHOUT_ID, ids=lambda raw: repr(raw[:24]))
def test_bytes_that_are_no_message_become_a_dead_letter(rig: Rig, raw: bytes) -> None:
    rig.push(raw)
    [good] = rig.enqueue("good", priority="interactive")
    assert [one.lease.job_id for one in rig.claim().jobs] == [good]
    [letter] = rig.letters()
    assert (letter.message, letter.model, letter.job_id) == (raw, MODEL, None)
    assert letter.reason
    assert letter.buried_ms > 0
    assert rig.claim().jobs == ()
    assert rig.depth() == 0


@pytest.mark.parametrize("raw", WITH_ID, ids=range(len(WITH_ID)))
def test_a_bad_message_with_an_id_gets_a_result_too(rig: Rig, raw: bytes) -> None:
    rig.push(raw)
    assert rig.claim().jobs == ()
    [letter] = rig.letters()
    assert (letter.message, letter.job_id) == (raw, "bad-1")
    status = rig.status("bad-1")
    assert status.state is State.FAILED
    assert status.failure is not None
    assert (status.failure.code, status.failure.message) == ("malformed", letter.reason)
    assert rig.depth() == 0


def test_a_pickle_is_never_opened(rig: Rig, tmp_path: Path) -> None:
    canary = pickle.dumps(Canary(tmp_path / "opened"))
    rig.push(canary)
    rig.push(foreign("p", body=canary.hex(), **{"content-type": "application/x-python-serialize"}))
    assert rig.claim().jobs == ()
    assert len(rig.store.dead_letters()) == 2
    assert not (tmp_path / "opened").exists()


def test_a_message_over_the_limit_is_buried_whole(rig: Rig) -> None:
    rig.rule(max_message_bytes=20_000)
    raw = foreign("big", prompt="x" * 20_000)
    rig.push(raw)
    assert rig.claim().jobs == ()
    [letter] = rig.letters()
    assert letter.message == raw
    assert letter.reason == f"too large: {len(raw)} bytes, the limit is 20000"


def test_of_a_message_over_the_limit_the_first_bytes_are_kept_and_it_cannot_be_replayed(rig: Rig) -> None:
    rig.rule(max_message_bytes=70_000)
    raw = foreign("big", prompt="x" * 100_000)
    rig.push(raw)
    assert rig.claim().jobs == ()
    [letter] = rig.letters()
    assert (letter.message, letter.message_bytes) == (raw[:65_536], len(raw))
    assert letter.reason == f"too large: {len(raw)} bytes, the limit is 70000; only its first 65536 bytes are kept"
    with pytest.raises(BadRequest, match=f"only 65536 of {len(raw)} bytes"):
        rig.store.replay([letter.letter_id])
    assert (len(rig.letters()), rig.depth()) == (1, 0)


def test_a_list_of_letters_holds_the_beginning_of_each_message(rig: Rig) -> None:
    raw = os.urandom(600)
    letter_id = rig.store.bury(MODEL, raw, reason="test")
    [listed] = rig.store.dead_letters()
    assert (listed.letter_id, listed.message, listed.message_bytes) == (letter_id, raw[:512], 600)
    assert rig.store.dead_letter(letter_id) == replace(listed, message=raw)
    assert rig.store.dead_letter("1-1") is None


def test_all_letters_together_keep_within_a_budget_of_bytes(rig: Rig) -> None:
    rig.rule(max_letters_bytes=3000)
    for i in range(6):
        rig.store.bury(MODEL, b"%d" % i * 1000, reason="test")
    assert [letter.message[:1] for letter in rig.letters()] == [b"5", b"4", b"3"]
    rig.store.bury(MODEL, b"L" * 5000, reason="one alone may be larger")
    assert [len(letter.message) for letter in rig.letters()] == [5000]
    rig.store.replay([rig.letters()[0].letter_id])
    for i in range(3):
        rig.store.bury(MODEL, b"%d" % i * 1000, reason="test")
    assert len(rig.letters()) == 3


def test_letters_of_an_earlier_version_are_read_dropped_and_replayed(redis_rig: RedisRig) -> None:
    redis_rig.rule(max_letters=2)
    old = {"model": MODEL, "job": "", "tenant": "default", "step": "0", "reason": "old", "message": b"x" * 600, "at": 1}
    for _ in range(2):
        redis_rig.redis.xadd(redis_rig.names.letters, old)
    redis_rig.store.bury(MODEL, b"new", reason="test")
    assert [len(letter.message) for letter in redis_rig.store.dead_letters()] == [3, 512]
    assert [len(letter.message) for letter in redis_rig.letters()] == [3, 600]
    assert redis_rig.store.replay([redis_rig.letters()[1].letter_id]) == [""]
    assert redis_rig.depth() == 1


def test_nothing_stays_of_a_letter_that_fell_out_or_was_replayed(redis_rig: RedisRig) -> None:
    redis_rig.rule(max_letters=1)
    for _ in range(2):
        letter_id = redis_rig.store.bury(MODEL, b"x" * 1000, reason="test")
    assert redis_rig.all_keys("*:letter:*") == [f"test:hortator:letter:{letter_id}"]
    redis_rig.store.replay([letter_id])
    assert redis_rig.all_keys("*:letter:*") == []


def test_many_large_letters_are_listed_within_a_producers_patience(redis_rig: RedisRig) -> None:
    redis_rig.rule(max_letters_bytes=2**30)
    for _ in range(20):
        redis_rig.store.bury(MODEL, b"x" * 15_000_000, reason="test")
    with RedisStore(redis_rig.url, namespace="test:") as store:
        assert len(store.dead_letters()) == 20


def test_an_accepted_job_that_is_too_large_for_the_leader_fails_at_once(rig: Rig) -> None:
    [job_id] = rig.enqueue("x" * 20_000)
    rig.rule(max_message_bytes=5000)
    assert rig.claim().jobs == ()
    [letter] = rig.letters()
    assert letter.job_id == job_id
    status = rig.status(job_id)
    assert (status.state, rig.depth()) == (State.FAILED, 0)
    assert status.failure is not None
    assert status.failure.message == letter.reason


def test_a_thousand_bad_messages_do_not_stop_the_good_ones(rig: Rig) -> None:
    for i in range(1000):
        rig.push(b"junk %d" % i)
    rig.push(foreign("good"))
    claims = [rig.claim(100) for _ in range(5)]
    assert [one.lease.job_id for claim in claims for one in claim.jobs] == ["good"]
    assert len(rig.store.dead_letters(limit=5000)) == 1000


def test_bodies_are_not_looked_into(rig: Rig) -> None:
    rig.push(foreign("odd", body="this is not base64 {[", properties={}))
    assert rig.claim_one() == Lease("odd", 1)


def test_other_json_spellings_are_read(rig: Rig) -> None:
    rig.push(json.dumps(json.loads(foreign("indented")), indent=4).encode())
    rig.push(json.dumps(json.loads(foreign("compact")), separators=(",", ":"), sort_keys=True).encode())
    escaped = json.loads(foreign("escaped")) | {"body": 'a "quoted" \\ body'}
    rig.push(json.dumps(escaped).encode())
    rig.push(json.dumps(dict(reversed(json.loads(foreign("reversed")).items()))).encode())
    ids = [one.lease.job_id for one in rig.claim().jobs]
    assert ids == ["indented", "compact", "escaped", "reversed"]
    assert rig.store.dead_letters() == []


def test_a_job_of_a_later_schema_stays_for_a_worker_that_speaks_it(rig: Rig) -> None:
    raw = foreign("future", headers=headers(id="future", hortator={"version": 2, "record": True}))
    rig.push(raw)
    rig.push(foreign("now"))
    for _ in range(3):
        assert {one.lease.job_id for one in rig.claim().jobs} <= {"now"}
    assert rig.depth() == 1
    assert rig.store.dead_letters() == []


@pytest.mark.parametrize("version", ["1", True, False, 1.5, 0, -1, [], {"major": 2}])
def test_a_version_that_is_none_is_buried_and_does_not_go_round_for_ever(rig: Rig, version: Any) -> None:
    rig.push(foreign("odd", headers=headers(id="odd", hortator={"version": version})))
    assert rig.claim().jobs == ()
    assert rig.depth() == 0
    [letter] = rig.letters()
    assert (letter.job_id, letter.reason) == ("odd", "its hortator.version is no version: a positive integer")
    assert rig.state("odd") is State.FAILED


@pytest.mark.parametrize("mark", [{"version": None}, {"version": 1.0}, {}, "x"])
def test_a_message_without_a_version_is_of_ours(rig: Rig, mark: Any) -> None:
    rig.push(foreign("plain", headers=headers(id="plain", hortator=mark)))
    assert rig.claim_one().job_id == "plain"


def test_a_queue_of_later_schemas_does_not_spin(rig: Rig) -> None:
    for i in range(2000):
        raw = foreign(f"f{i}", headers=headers(id=f"f{i}", hortator={"version": 2}))
        rig.push(raw)
    assert rig.claim(10).jobs == ()
    assert rig.depth() == 2000


def test_our_own_message_without_its_record_is_not_run_again(rig: Rig) -> None:
    raw = foreign("stale", headers=headers(id="stale", hortator={"version": 1, "record": True}))
    rig.push(raw)
    assert rig.claim().jobs == ()
    [letter] = rig.letters()
    assert letter.job_id == "stale"
    assert "record is gone" in letter.reason


def test_letters_come_newest_first_and_page(rig: Rig) -> None:
    for i in range(7):
        rig.store.bury(MODEL, b"%d" % i, reason="test")
    pages = [rig.store.dead_letters(limit=3)]
    while pages[-1]:
        pages.append(rig.store.dead_letters(limit=3, before=pages[-1][-1].letter_id))
    assert [letter.message for page in pages for letter in page] == [b"%d" % i for i in reversed(range(7))]


def test_letters_are_counted_until_they_are_replayed(rig: Rig) -> None:
    assert rig.store.count_dead_letters() == 0
    first, _ = (rig.store.bury(MODEL, b"x", reason=str(n)) for n in range(2))
    assert rig.store.count_dead_letters() == 2
    rig.store.replay([first])
    assert rig.store.count_dead_letters() == 1


def test_only_the_newest_letters_are_kept(rig: Rig) -> None:
    rig.rule(max_letters=5)
    for i in range(9):
        rig.store.bury(MODEL, b"%d" % i, reason="test")
    assert [letter.message for letter in rig.store.dead_letters()] == [b"8", b"7", b"6", b"5", b"4"]


def test_a_buried_message_can_be_read_back(rig: Rig) -> None:
    [job_id] = rig.enqueue("a")
    letter_id = rig.store.bury(MODEL, b"\xff\x00raw", reason="wrong schema", job_id=job_id)
    [letter] = rig.letters()
    assert (letter.letter_id, letter.message, letter.reason) == (letter_id, b"\xff\x00raw", "wrong schema")
    assert letter.job_id == job_id


def test_a_poison_job_can_be_replayed_with_a_clean_record(rig: Rig) -> None:
    [job_id] = rig.enqueue("bad", tenant="acme", priority="batch", metadata={"k": "v"}, deadline_s=100)
    lease = rig.claim_one()
    rig.store.append([tokens(lease, 0, 1)])
    rig.store.release([lease], reason=ReleaseReason.CRASHED)
    rig.store.release([rig.claim_one()], reason=ReleaseReason.CRASHED)
    [letter] = rig.letters()
    assert rig.store.replay([letter.letter_id]) == [job_id]
    status = rig.status(job_id)
    assert (status.state, status.tenant, status.attempt, status.num_tokens) == (State.QUEUED, "acme", 0, 0)
    assert (status.failure, status.metadata) == (None, {"k": "v"})
    assert status.timings.finished_ms is None
    claim = rig.claim()
    assert prompts_of(claim) == ["bad"]
    assert claim.jobs[0].journal == ()
    assert claim.jobs[0].lease.attempt == 3  # a fence never repeats
    assert rig.store.chunks(job_id) == []
    rig.store.release([claim.jobs[0].lease], reason=ReleaseReason.CRASHED)
    lease = rig.claim_one()
    rig.store.commit([done(lease)])
    assert rig.state(job_id) is State.SUCCEEDED
    assert rig.store.dead_letters() == []


def test_replaying_bad_bytes_buries_them_again(rig: Rig) -> None:
    rig.push(b"junk")
    rig.push(WITH_ID[0])
    rig.claim()
    letters = rig.store.dead_letters()
    assert rig.store.replay([letter.letter_id for letter in letters]) == ["bad-1", ""]
    assert rig.depth() == 2
    rig.claim()
    assert {letter.message for letter in rig.store.dead_letters()} == {b"junk", WITH_ID[0]}
    assert rig.state("bad-1") is State.FAILED
    assert rig.depth() == 0


def test_an_unknown_letter_stops_the_whole_replay(rig: Rig) -> None:
    letter_id = rig.store.bury(MODEL, b"x", reason="test")
    with pytest.raises(UnknownJob):
        rig.store.replay([letter_id, "1-1"])
    assert len(rig.store.dead_letters()) == 1
    assert rig.depth() == 0


def test_replaying_a_letter_of_a_job_that_runs_adds_nothing(rig: Rig) -> None:
    [job_id] = rig.enqueue("a")
    [claimed] = rig.claim().jobs
    letter_id = rig.store.bury(MODEL, claimed.message, reason="test", job_id=job_id)
    assert rig.store.replay([letter_id]) == [job_id]
    assert rig.claim().jobs == ()
    assert rig.state(job_id) is State.RUNNING


def test_a_letter_that_is_named_twice_is_replayed_once(rig: Rig) -> None:
    rig.push(b"junk")
    rig.claim()
    [letter] = rig.store.dead_letters()
    assert rig.store.replay([letter.letter_id] * 2) == ["", ""]
    assert rig.depth() == 1

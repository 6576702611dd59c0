"""What happens to single jobs: duplicates, poison, hostile bytes, cancels, deadlines.  Real processes throughout."""

import base64
import json
import pickle
import signal
import threading
import time

import pytest
import redis as redis_py

from hortator.producer import Sampling
from hortator.producer.errors import UnknownJob
from hortator.producer.schema import State
from hortator.producer.store import ReleaseReason
from tests.together.fleet import ECHO, Fleet, assert_all_right, wait_for

FIVE = ["alpha;", "beta;", "gamma;", "delta;", "epsilon;"]


def test_a_message_pushed_five_times_runs_once(fleet: Fleet) -> None:
    ids = fleet.enqueue(["only once;"], max_tokens=100)
    raw = redis_py.Redis.from_url(fleet.redis.url)
    queue = next(key for key in raw.scan_iter(f"{ECHO}*") if raw.type(key) == b"list")
    message = raw.lindex(queue, 0)
    assert message is not None
    for _ in range(4):
        raw.lpush(queue, message)
    leader = fleet.worker("one").ready()
    done = fleet.finished(ids)
    assert_all_right(done, {ids[0]: "only once;"}, 100)
    raw.lpush(queue, message)
    wait_for("the late duplicate is dropped", lambda: raw.llen(queue) == 0)
    raw.close()
    time.sleep(0.3)
    assert fleet.status(ids[0]).attempt == 1
    assert len(fleet.store.chunks(ids[0])) == len({c.index for c in fleet.store.chunks(ids[0])})
    assert leader.process.poll() is None


def test_a_poison_prompt_ends_after_two_crashes_and_harms_nobody(fleet: Fleet) -> None:
    leader = fleet.worker("one").ready()
    first_epoch = leader.epoch()
    innocents = dict(zip(fleet.enqueue(FIVE, max_tokens=100), FIVE, strict=True))
    fleet.progressed(list(innocents))
    [poison] = fleet.enqueue(["this is !poison! indeed"])
    done = fleet.finished([poison, *innocents], timeout_s=100)
    assert done[poison].state is State.FAILED
    failure = done[poison].failure
    assert failure is not None
    assert failure.code == "poison"
    assert_all_right({i: done[i] for i in innocents}, innocents, 100)
    assert any(letter.job_id == poison for letter in fleet.store.dead_letters())
    leader.ready(after_epoch=first_epoch + 1)
    assert leader.epoch() == first_epoch + 2, "exactly two groups died"


def test_a_prompt_that_kills_a_full_group_after_some_tokens_is_not_cleared_on_its_way_there(fleet: Fleet) -> None:
    leader = fleet.worker(
        "one", engine="tests.together.engines:late_poison", tensor_parallel_size=1, max_num_seqs=4, probation_tokens=2
    )
    first_epoch = leader.ready().epoch()
    innocents = dict(zip(fleet.enqueue(FIVE[:2], max_tokens=2000), FIVE, strict=False))
    fleet.progressed(list(innocents))
    [poison] = fleet.enqueue(["!late021!"], sampling=Sampling(max_tokens=500, n=2))
    failure = fleet.finished([poison])[poison].failure
    assert failure is not None
    assert failure.code == "poison"
    assert leader.ready(after_epoch=first_epoch + 1).epoch() == first_epoch + 2, "exactly two groups died"
    assert_all_right(fleet.finished(list(innocents)), innocents, 2000)


def test_a_prompt_that_hangs_a_rank_ends_like_poison(fleet: Fleet) -> None:
    leader = fleet.worker("one", stall_timeout_s=2).ready()
    first_epoch = leader.epoch()
    innocents = dict(zip(fleet.enqueue(FIVE, max_tokens=60), FIVE, strict=True))
    [hang] = fleet.enqueue(["please !hang! here"])
    done = fleet.finished([hang, *innocents], timeout_s=100)
    failure = done[hang].failure
    assert failure is not None
    assert failure.code == "poison"
    assert_all_right({i: done[i] for i in innocents}, innocents, 60)
    assert leader.ready(after_epoch=first_epoch + 1).epoch() == first_epoch + 2


def test_an_innocent_suspect_is_not_convicted_for_a_hang_whose_client_cancelled_it(fleet: Fleet) -> None:
    leader = fleet.worker("one", stall_timeout_s=4).ready()
    [hang] = fleet.enqueue(["please !hang! here"])
    wait_for("a rank that hangs", leader.running)
    leader.signal(signal.SIGSTOP)  # for a moment, else it claims the suspect itself
    [suspect] = fleet.enqueue(["innocent;"], max_tokens=20)
    [claimed] = fleet.store.claim(ECHO, owner="another", limit=1, lease_s=30, idle=True).jobs
    fleet.store.release([claimed.lease], reason=ReleaseReason.CRASHED)
    leader.signal(signal.SIGCONT)
    assert fleet.client.job(hang).cancel() is State.RUNNING
    done = fleet.finished([hang, suspect])
    assert done[hang].state is State.CANCELLED
    assert_all_right({suspect: done[suspect]}, {suspect: "innocent;"}, 20)


CANARY: list[str] = []


class Canary:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (CANARY.append, ("executed",))


def protocol_2(body: bytes, **headers: object) -> bytes:
    """A Celery message with any body."""
    return json.dumps(
        {
            "body": base64.b64encode(body).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {"lang": "py", "task": "llm.generate", "id": "evil-1", "root_id": "evil-1"} | headers,
            "properties": {
                "correlation_id": "evil-1",
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": ECHO},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": "evil-1",
            },
        }
    ).encode()


NOT_MESSAGES = [
    b"",
    b"{",
    b"\xff\xfe\x00",
    b"[" * 5000,
    b"[]",
    b"42",
    b"null",
    b'{"headers": {"id": NaN}}',
    b'{"a": 1}',
    b'{"headers": {"id": "../../etc"}, "body": ""}',
    pickle.dumps(Canary()),
]
BAD_BODIES = [
    b"not json",
    b"[]",
    b'[[], {"model": "echo", "prompt": 7}, {}]',
    b'[[], {"model": "echo", "prompt": "x", "sampling": {"max_tokens": -1}}, {}]',
    b'[[], {"model": "echo", "prompt": "x", "sampling": {"temperature": 1e999}}, {}]',
    b'[[], {"model": "echo"}, {}]',
]


def test_malformed_bytes_become_dead_letters_and_stop_nobody(fleet: Fleet) -> None:
    leader = fleet.worker("one").ready()
    raw = redis_py.Redis.from_url(fleet.redis.url)
    for junk in NOT_MESSAGES:
        raw.lpush(ECHO, junk)
    bad = [f"bad-{i}" for i in range(len(BAD_BODIES))]
    for job_id, body in zip(bad, BAD_BODIES, strict=True):
        raw.lpush(ECHO, protocol_2(body, id=job_id))
    raw.lpush(ECHO, protocol_2(b"[[],{},{}]", id="other-task", task="os.system"))
    ids = fleet.enqueue(FIVE)
    assert_all_right(fleet.finished(ids), dict(zip(ids, FIVE, strict=True)), 50)
    ended = fleet.finished([*bad, "other-task"])
    assert {status.state for status in ended.values()} == {State.FAILED}
    letters = wait_for("letters", lambda: fleet.store.dead_letters(limit=1000))
    unreadable = [letter for letter in letters if letter.job_id is None]
    kept = [fleet.store.dead_letter(letter.letter_id) for letter in unreadable]
    assert sorted(letter.message for letter in kept if letter) == sorted(NOT_MESSAGES)
    assert all(letter.reason for letter in letters)
    assert not CANARY
    assert leader.process.poll() is None
    raw.close()


def test_a_prompt_too_long_is_refused_with_the_real_limit(fleet: Fleet) -> None:
    fleet.worker("one", max_model_len=100).ready()
    [long, fits] = fleet.enqueue(["x" * 101, "fits;"], max_tokens=20)
    done = fleet.finished([long, fits])
    failure = done[long].failure
    assert failure is not None
    assert failure.code == "prompt_too_long"
    assert "100" in failure.message
    assert done[fits].state is State.SUCCEEDED


def test_a_never_issued_id_is_unknown_and_not_queued(fleet: Fleet) -> None:
    assert fleet.store.statuses(["never-issued"]) == [None]
    with pytest.raises(UnknownJob):
        fleet.client.job("never-issued").result(timeout_s=1)


def test_cancelled_jobs_end_cancelled_queued_or_running(fleet: Fleet) -> None:
    [queued] = fleet.enqueue(["waits;"], max_tokens=1000)
    assert fleet.client.job(queued).cancel() is State.CANCELLED
    fleet.worker("one").ready()
    [running] = fleet.enqueue(["runs;"], max_tokens=3000)
    fleet.progressed([running])
    fleet.client.job(running).cancel()
    done = fleet.finished([queued, running], timeout_s=5)
    assert {status.state for status in done.values()} == {State.CANCELLED}
    assert done[queued].attempt == 0


def test_cancel_racing_completion_leaves_exactly_one_terminal_state(fleet: Fleet) -> None:
    leader = fleet.worker("one", engine="echo", max_num_seqs=64).ready()
    ids = fleet.enqueue([f"race {i};" for i in range(400)], max_tokens=4)
    racers = [threading.Thread(target=fleet.store.cancel, args=(ids[k::4],)) for k in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    first = {i: s.state for i, s in fleet.finished(ids).items()}
    time.sleep(1)
    assert {i: s.state for i, s in fleet.finished(ids).items()} == first
    assert set(first.values()) <= {State.SUCCEEDED, State.CANCELLED}
    after = fleet.enqueue(FIVE, max_tokens=4)
    assert all(s.state is State.SUCCEEDED for s in fleet.finished(after).values())
    assert leader.epoch() == 1


def test_deadlines_end_jobs_queued_without_a_worker_and_running_ones(fleet: Fleet) -> None:
    fleet.worker("one").ready()
    [running] = fleet.enqueue(["never ends;"], max_tokens=3500, deadline_s=2.0)
    fleet.progressed([running])
    done = fleet.finished([running], timeout_s=6)
    assert done[running].state is State.EXPIRED
    [after] = fleet.enqueue(["next;"], max_tokens=5)
    assert fleet.finished([after], timeout_s=10)[after].state is State.SUCCEEDED


def test_a_queued_job_expires_with_nobody_alive_to_run_it(fleet: Fleet) -> None:
    leader = fleet.worker("one").ready()
    leader.stop()
    [queued] = fleet.enqueue(["too late;"], deadline_s=1.0)
    time.sleep(1.2)
    assert fleet.status(queued).state is State.EXPIRED

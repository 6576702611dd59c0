"""Redis dies, fills up, stalls or cuts everybody off, under load: nothing exits, is lost or runs twice."""

import time

import redis as redis_py

from hortator.producer.errors import StoreUnavailable
from tests.together.fleet import Fleet, assert_all_right

PROMPTS = [f"load {i} goes on and on;" for i in range(12)]
TOKENS = 120


def ask(fleet: Fleet) -> dict[str, str]:
    return dict(zip(fleet.enqueue(PROMPTS, max_tokens=TOKENS), PROMPTS, strict=True))


def test_nothing_runs_twice_when_redis_cuts_all_connections(fleet: Fleet) -> None:
    leader = fleet.worker("one").ready()
    asked = ask(fleet)
    fleet.progressed(list(asked))
    admin = redis_py.Redis.from_url(fleet.redis.url)
    for kind in ("normal", "pubsub"):
        admin.client_kill_filter(_type=kind, skipme=True)
    admin.close()
    done = fleet.finished(list(asked))
    assert_all_right(done, asked, TOKENS)
    assert {status.attempt for status in done.values()} == {1}
    again = ask(fleet)
    assert_all_right(fleet.finished(list(again)), again, TOKENS)
    assert leader.process.poll() is None


def test_redis_killed_and_restarted_under_load_loses_nothing(fleet: Fleet) -> None:
    leader = fleet.worker("one", lease_s=5).ready()
    asked: dict[str, str] = {}
    for _ in range(2):
        asked |= ask(fleet)
        fleet.progressed(list(asked))
        time.sleep(1.1)  # appendfsync everysec
        fleet.redis.kill()
        time.sleep(1.0)
        fleet.redis.restart()
    done = fleet.finished(list(asked), timeout_s=90)
    assert_all_right(done, asked, TOKENS)
    assert leader.process.poll() is None


def test_results_wait_for_a_full_redis_to_heal(fleet: Fleet) -> None:
    leader = fleet.worker("one", lease_s=5).ready()
    asked = ask(fleet)
    fleet.progressed(list(asked))
    admin = redis_py.Redis.from_url(fleet.redis.url)
    admin.config_set("maxmemory", "1mb")
    refused = None
    try:
        fleet.enqueue(["one more"])
    except StoreUnavailable as error:
        refused = error
    assert refused is not None, "a full Redis must refuse the submit"
    time.sleep(4)
    assert leader.process.poll() is None
    admin.config_set("maxmemory", "0")
    admin.close()
    assert_all_right(fleet.finished(list(asked), timeout_s=90), asked, TOKENS)


def test_writes_refused_for_longer_than_the_lease_charge_nobody(fleet: Fleet) -> None:
    leader = fleet.worker("one", lease_s=1.5, outage_s=1.5).ready()
    asked = ask(fleet)
    fleet.progressed(list(asked))
    admin = redis_py.Redis.from_url(fleet.redis.url)
    admin.config_set("min-replicas-to-write", 1)
    time.sleep(2.5)
    admin.config_set("min-replicas-to-write", 0)
    admin.close()
    done = fleet.finished(list(asked))
    assert_all_right(done, asked, TOKENS)
    assert {status.attempt for status in done.values()} == {1}
    assert leader.process.poll() is None


def test_a_job_longer_than_its_lease_runs_once(fleet: Fleet) -> None:
    fleet.worker("one", lease_s=1.5).ready()
    prompts = ["a long way to go;"]
    ids = fleet.enqueue(prompts, max_tokens=350)
    done = fleet.finished(ids)
    assert_all_right(done, dict(zip(ids, prompts, strict=True)), 350)
    assert done[ids[0]].attempt == 1

"""A group's name belongs to one leader at a time."""

from dataclasses import replace

from hortator.producer.memory import MemoryStore
from hortator.producer.rules import Rules
from hortator.producer.store import Holder
from tests.producer.rig import NAMESPACE, RedisRig, Rig

FIRST = Holder(group="llama-0", host="a", pid=7, place="a boot ns", born="boot:1", life="first")
OTHER = replace(FIRST, host="b", place="b boot ns", life="other")


def test_the_first_leader_has_the_name_and_a_second_one_is_told_whose_it_is(rig: Rig) -> None:
    assert rig.store.hold(FIRST) is None
    assert rig.store.hold(OTHER) == FIRST
    assert rig.store.hold(FIRST) is None
    assert rig.store.hold(OTHER) == replace(FIRST, renewals=1), "which shows that it lives"
    assert rig.store.hold(replace(OTHER, group="llama-1")) is None


def test_a_name_that_is_let_go_or_whose_life_is_over_can_be_taken_at_once(rig: Rig) -> None:
    rig.store.hold(FIRST)
    rig.store.let_go(OTHER)
    assert rig.store.hold(OTHER) == FIRST, "only its holder lets a name go"
    assert rig.store.hold(OTHER, replacing="another") == FIRST
    assert rig.store.hold(OTHER, replacing="first") is None
    rig.store.let_go(OTHER)
    assert rig.store.hold(FIRST) is None


def test_a_name_that_nobody_renews_is_free_when_a_beat_is_old() -> None:
    now = [1000.0]
    store = MemoryStore(clock=lambda: now[0])
    store.hold(FIRST)
    assert store.hold(OTHER) == FIRST
    now[0] += Rules.beat_ttl_s + 0.1
    assert store.hold(OTHER) is None


def test_in_redis_a_name_runs_out_with_the_beats(redis_rig: RedisRig) -> None:
    redis_rig.store.hold(FIRST)
    left_ms = redis_rig.redis.pttl(f"{NAMESPACE}hortator:holder:llama-0")
    assert 4000 < left_ms <= 5000

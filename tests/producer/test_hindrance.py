"""Why a job waits, from what groups say of themselves."""

from typing import Any

import pytest

from hortator.producer.hindrance import Why, hindrance
from hortator.producer.store import GroupBeat, QueueInfo


def beat(group: str = "a", state: str = "ready", running: int = 0, **info: Any) -> GroupBeat:
    return GroupBeat(group=group, model="m", running=running, capacity=8, epoch=1, state=state, info=info)


def queue(*groups: GroupBeat, suspects: int = 0, running: int = 0) -> QueueInfo:
    return QueueInfo(model="m", depth=3, oldest_age_s=1.0, running=running, suspects=suspects, groups=groups)


@pytest.mark.parametrize(
    ("waiting", "why", "said"),
    [
        (queue(), Why.NO_GROUP, "no group is alive: start one"),
        (queue(running=2), Why.NO_GROUP, "; 2 jobs of a dead one go on with it"),
        (queue(beat(state="starting")), Why.NOT_READY, "a is starting"),
        (queue(beat(state="down", last_failure="rank 1 died")), Why.NOT_READY, "a is down: rank 1 died"),
        (queue(beat(state="draining"), beat("b", "draining")), Why.DRAINING, "a, b drain and take nothing"),
        (queue(beat(running=8), beat("b", running=9)), Why.FULL, "all 16 rows of 2 groups are taken"),
        (queue(beat(running=4, waiting=3)), Why.FULL, "all 8 rows of 1 group"),  # by jobs with several answers
        (queue(beat(), suspects=1), Why.SUSPECTS, "1 job of a crashed batch"),
        (queue(beat(running=3, kv_use=0.97, waiting=2)), Why.MEMORY, "KV cache of a is full"),
    ],
)
def test_a_job_waits_for_the_reason_that_is_named(waiting: QueueInfo, why: Why, said: str) -> None:
    found = hindrance(waiting)
    assert found is not None
    assert (found.why, said in found.text) == (why, True)


@pytest.mark.parametrize(
    "groups",
    [
        (beat(running=7),),
        (beat(running=8), beat("b")),
        (beat(state="down"), beat("b")),
        (beat(kv_use="?", waiting=None),),
    ],
)
def test_nothing_is_in_the_way_while_one_group_has_room(groups: tuple[GroupBeat, ...]) -> None:
    assert hindrance(queue(*groups)) is None

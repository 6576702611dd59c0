"""What `hortator status` shows; the commands that steer groups are in tests/together/test_operate.py."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from hortator.cli_fleet import page, watch_pages
from hortator.producer.api.shapes import Queue
from hortator.producer.errors import StoreUnavailable
from hortator.producer.hindrance import queue_facts
from hortator.producer.store import GroupBeat, QueueInfo

FIGURES = {
    "ranks": 8,
    "waiting": 16,
    "steps_per_s": 31.25,
    "tokens_per_s": 1980.0,
    "kv_use": 0.713,
    "last_failure": None,
    "host": "h7",
}


def beat(group: str, state: str = "ready", running: int = 64, **info: Any) -> GroupBeat:
    told = FIGURES | info
    return GroupBeat(group, "llama", running, capacity=64, epoch=3, state=state, info=told, room=64 - running)


def queue(*groups: GroupBeat, depth: int = 310, running: int = 64) -> QueueInfo:
    return QueueInfo(model="llama", depth=depth, oldest_age_s=2.1, running=running, suspects=0, groups=groups)


def test_a_group_is_one_row_with_its_figures() -> None:
    lines = page([queue(beat("llama-0"))]).splitlines()
    assert lines[4].split() == ["llama-0", "llama", "ready", "8", "3", "64/64", "16", "31.25", "1980", "71%", "h7"]
    assert lines[-1] == "llama: jobs wait: all 64 rows of 1 group are taken"


def test_a_group_that_is_down_says_why_and_escapes_what_a_terminal_would_obey() -> None:
    shown = page([queue(beat("llama-1", "down", 0, last_failure="rank 5 was killed\x1b[31m"))])
    assert "llama-1: last failure: rank 5 was killed\\x1b[31m" in shown
    assert "jobs wait: no group is ready: llama-1 is down: rank 5" in shown


def test_what_took_a_group_down_is_told_with_its_time_and_the_latest_failed_try_beside_it() -> None:
    outage = {"reason": "rank 5 was killed", "epoch": 3, "at": 1_790_000_000.0}
    shown = page([queue(beat("llama-1", "down", 0, last_failure="ssh to h7 ended", outage=outage, given_up=True))])
    assert "llama-1: went down 2026-" in shown
    assert "(epoch 3): rank 5 was killed\n" in shown
    assert "llama-1: and since then: ssh to h7 ended\n" in shown
    assert "llama-1: it will not be tried again" in shown
    assert "since then" not in page([queue(beat("llama-1", last_failure="ssh to h7 ended", outage=outage))])


def test_draining_and_drained_are_told_apart() -> None:
    shown = page([queue(beat("a", "draining", 3), beat("b", "draining", 0))])
    assert [line.split()[2] for line in shown.splitlines()[4:6]] == ["draining", "drained"]


def test_an_empty_queue_with_a_full_group_does_not_wait() -> None:
    assert "jobs wait" not in page([queue(beat("a"), depth=0)])


def test_an_empty_queue_that_nobody_serves_says_that_jobs_would_wait() -> None:
    shown = page([queue(depth=0, running=0)])
    assert shown.splitlines()[-1].startswith("llama: jobs would wait: no group is alive")


def test_jobs_that_a_dead_group_ran_wait() -> None:
    shown = page([queue(depth=0, running=2)])
    assert shown.splitlines()[-1].startswith("llama: jobs wait: no group is alive")
    assert "2 jobs of a dead one go on with it" in shown


def test_groups_of_another_version_are_shown_without_the_figures_that_they_do_not_give() -> None:
    bare = GroupBeat(group="old", model="llama", running=1, capacity=8, epoch=1, state="ready", info={"pids": [1, 2]})
    assert page([queue(bare)]).splitlines()[4].split() == [
        "old",
        "llama",
        "ready",
        "2",
        "1",
        "1/8",
        "-",
        "-",
        "-",
        "-",
        "-",
    ]


def test_the_json_has_the_reason_too_and_is_what_the_api_says() -> None:
    said = json.loads(json.dumps(queue_facts(queue())))
    assert said["hindrance"]["why"] == "no_group"
    idle = queue_facts(queue(beat("a", running=1)))
    assert idle["hindrance"] is None
    for one in (said, idle):
        assert Queue.model_validate(one).model_dump(mode="json") == json.loads(json.dumps(one))


def test_watching_outlives_a_redis_that_is_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks: Iterator[list[QueueInfo] | Exception] = iter(
        [[queue(beat("llama-0"))], StoreUnavailable("Redis at x does not answer"), [queue(beat("llama-7"))]]
    )

    def look() -> str:
        found = next(looks, None)
        if found is None:
            raise KeyboardInterrupt
        if isinstance(found, Exception):
            raise found
        return page(found)

    monkeypatch.setattr("hortator.cli_fleet.time.sleep", lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        watch_pages(look, 1.0)
    shown = capsys.readouterr().out
    assert shown.index("llama-0") < shown.index("Redis at x does not answer; trying again") < shown.index("llama-7")

"""Files, options and answers from outside are bounded: none of them may cost a minute or a traceback."""

import time

import pytest
from pydantic import BaseModel, ValidationError

from hortator.topology.errand import Answer, read_answer
from hortator.topology.errors import BadFleet, BadHostfile, BadPlacement
from hortator.topology.fleet import parse_fleet
from hortator.topology.hostfile import parse_hostfile
from hortator.topology.join import place_of
from hortator.workers.settings import WorkerSettings


class Said(BaseModel):
    pid: int


def answer(stdout: bytes, returncode: int | None = 0) -> Answer:
    return Answer("host-a", returncode, stdout, "ssh: no route", 1.0, 0.0)


@pytest.mark.parametrize(
    "stdout", [b"hello", b"", b"[]", b"{}", b"3", b'{"pid": 1}\n\x1b[2Jbye', b"\xff\xfe", b"[" * 9999]
)
def test_an_answer_that_is_none_is_told_in_one_safe_line(stdout: bytes) -> None:
    said = read_answer(answer(stdout), Said)
    assert isinstance(said, str)
    assert said.startswith("answered with something that is no Said: ")
    assert said.isprintable()
    assert len(said) < 200


def test_an_answer_may_follow_a_greeting() -> None:
    assert read_answer(answer(b'Welcome to host-a\n{"pid": 7}\n'), Said) == Said(pid=7)


def test_a_host_that_was_not_reached_says_why() -> None:
    assert read_answer(answer(b'{"pid": 7}', 255), Said) == "ssh: no route"


@pytest.mark.parametrize(
    "text", ["a" + ".a" * 50_000 + "=1", 'x = {"a"' + '."a"' * 20_000 + "=1}", "x = " + "9" * 5000]
)
def test_a_fleet_file_that_would_take_a_minute_is_refused_at_once(text: str) -> None:
    began = time.process_time()
    with pytest.raises(BadFleet, match=r"fleet\.toml"):
        parse_fleet(text)
    assert time.process_time() - began < 5


def test_a_hostfile_with_more_slots_than_a_plan_can_hold_is_refused() -> None:
    with pytest.raises(BadHostfile, match="16777216 slots"):
        parse_hostfile("".join(f"h{number} slots=1024\n" for number in range(16_384)))


@pytest.mark.parametrize(("ranks", "per_node"), [("70000", 0), ("9" * 5000, 0), ("", 2000), ("", -1)])
def test_a_keeper_refuses_ranks_that_no_group_has(ranks: str, per_node: int) -> None:
    with pytest.raises(BadPlacement):
        place_of({"LWS_WORKER_INDEX": "1"}, ranks=ranks, ranks_per_node=per_node)


@pytest.mark.parametrize("group", ["", "a b", "a\n", "../x", "-x", "g" * 100_000])
def test_a_groups_name_is_one_that_files_and_celery_can_have(group: str) -> None:
    with pytest.raises(ValidationError, match="group") as refused:
        WorkerSettings(model="m", engine="echo", group=group)
    assert len(str(refused.value)) < 1000

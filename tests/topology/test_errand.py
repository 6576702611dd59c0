"""Commands on many hosts at once: what comes back, and what is given up."""

import time

import pytest

from hortator.topology.errand import MAX_ANSWER_BYTES, Errand, run_errands
from hortator.topology.fleet import Ssh
from hortator.topology.road import Road


def sh(script: str, host: str = "h", stdin: bytes = b"") -> Errand:
    return Errand(host, ("/bin/sh", "-c", script), stdin)


def test_answers_come_in_the_order_of_the_errands() -> None:
    answers = run_errands([sh("sleep 0.2; echo slow", "a"), sh("cat", "b", b"told")], timeout_s=5)
    assert [(one.host, one.stdout, one.ok) for one in answers] == [("a", b"slow\n", True), ("b", b"told", True)]


def test_a_failure_brings_the_last_line_of_its_complaint() -> None:
    [answer] = run_errands([sh("echo first >&2; echo last >&2; exit 255")], timeout_s=5)
    assert (answer.returncode, answer.problem) == (255, "last")


def test_a_silent_host_is_given_up_with_everything_it_started() -> None:
    began = time.monotonic()
    silent = [sh("sleep 60 & sleep 60", f"h{n}") for n in range(5)]
    answers = run_errands(silent, timeout_s=0.3)
    assert time.monotonic() - began < 3
    assert {one.returncode for one in answers} == {None}
    assert "no answer within" in answers[0].problem


def test_a_client_that_is_missing_is_an_answer_too() -> None:
    [answer] = run_errands([Errand("h", ("/no/such/ssh",))], timeout_s=5)
    assert "No such file" in answer.problem


def test_an_endless_answer_is_cut() -> None:
    [answer] = run_errands([sh(f"head -c {MAX_ANSWER_BYTES * 2} /dev/zero")], timeout_s=30)
    assert len(answer.stdout) == MAX_ANSWER_BYTES


def test_a_remote_command_survives_the_remote_shell_and_ssh_is_asked_to_ask_nothing() -> None:
    road = Road(Ssh(user="u", port=2222, connect_timeout_s=7), here=frozenset({"me"}))
    argv = road.argv("h", ("/opt/my python", "-c", "print('$HOME')"))
    assert argv[-3:] == ("--", "h", """'/opt/my python' -c 'print('"'"'$HOME'"'"')'""")
    assert {"BatchMode=yes", "ConnectTimeout=7", "2222", "-l", "u"} <= set(argv)
    assert road.argv("me", ("a b",)) == ("a b",)


@pytest.mark.parametrize("user", ["-oProxyCommand=x", "a b", "a;b"])
def test_a_user_that_is_an_option_is_refused(user: str) -> None:
    with pytest.raises(ValueError, match="user"):
        Ssh(user=user)

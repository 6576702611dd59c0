"""Keepers are real processes here, their ranks short scripts; the front is this process."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from hortator.topology.dial import dial
from hortator.topology.errors import LeaderLost
from hortator.topology.keeper import MUSTER_EPOCH
from hortator.topology.muster import Muster
from hortator.topology.vitals import Cause, Trouble

KEY = bytes(range(32))
SLEEP = "import os, time; print('rank', os.getpid(), flush=True); time.sleep(60)"


class Hall:
    """A muster that is pumped in the test's own thread, and the keepers that come."""

    def __init__(self) -> None:
        self.muster = Muster("127.0.0.1", 0, key=KEY, heartbeat_s=0.1, heartbeat_timeout_s=0.6)
        self.lines: list[tuple[int, str]] = []
        self.troubles: list[Trouble] = []
        self.keepers: list[subprocess.Popen[str]] = []

    def begin(self, *ranks: int, **env: str) -> None:
        self.muster.begin(dict.fromkeys(ranks, env), world_size=3, on_line=lambda *line: self.lines.append(line))

    def keeper(
        self, ranks: str, code: str = SLEEP, *, rejoin: str = "NEVER", token: str = ""
    ) -> "subprocess.Popen[str]":
        port = str(self.muster.address[1])
        argv = [sys.executable, "-m", "tests.topology.keeper_process", port, KEY.hex(), ranks, rejoin, token, code]
        keeper = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        self.keepers.append(keeper)
        return keeper

    def wait(self, what: Callable[[], Any], timeout_s: float = 10.0) -> float:
        started = time.monotonic()
        while not what():
            self.muster.pump(0.02)
            self.troubles += self.muster.troubles()
            assert time.monotonic() - started < timeout_s, (self.lines, self.troubles, self.muster.exits)
        return time.monotonic() - started

    def pids(self) -> list[int]:
        """Of the ranks, as they say."""
        return [int(text.split()[1]) for _, text in self.lines if text.startswith("rank")]

    def close(self) -> None:
        for keeper in self.keepers:
            keeper.kill()
            keeper.wait()
            assert keeper.stderr is not None
            keeper.stderr.close()
        self.muster.close()


@pytest.fixture
def hall() -> Iterator[Hall]:
    hall = Hall()
    yield hall
    hall.close()


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_ranks_start_when_their_keeper_comes_and_lines_and_exits_come_back(hall: Hall) -> None:
    hall.begin(1, 2)
    assert hall.muster.absent == [1, 2]
    hall.keeper(
        "1,2", "import os; print(os.environ['LOCAL_RANK']); raise SystemExit(70 + int(os.environ['LOCAL_RANK']))"
    )
    hall.wait(lambda: len(hall.muster.exits) == 2)
    hall.wait(lambda: len(hall.lines) == 2)
    assert hall.muster.absent == []
    assert hall.muster.exits == {1: 70, 2: 71}
    assert sorted(hall.lines) == [(1, "0"), (2, "1")]


def test_ending_kills_even_a_stopped_rank_and_its_keeper_says_so(hall: Hall) -> None:
    hall.begin(1)
    keeper = hall.keeper("1")
    hall.wait(hall.pids)
    (pid,) = hall.pids()
    os.kill(pid, signal.SIGSTOP)
    assert hall.muster.end() is False
    assert gone(pid)
    assert keeper.wait(5) == 0
    assert hall.muster.troubles() == []


def test_a_killed_keeper_is_a_trouble_and_takes_its_ranks_along(hall: Hall) -> None:
    code = f"from hortator.topology.tied import *; die_with(int(os.environ['HORTATOR_PARENT_PID'])); {SLEEP}"
    hall.begin(1)
    keeper = hall.keeper("1", code)
    hall.wait(hall.pids)
    keeper.kill()
    hall.wait(lambda: hall.troubles, timeout_s=1.0)
    assert hall.troubles[0].cause is Cause.GONE
    assert f"the keeper of rank 1 (pid {keeper.pid} on {socket.gethostname()})" in hall.troubles[0].message
    hall.wait(lambda: all(map(gone, hall.pids())), timeout_s=1.0)
    assert hall.muster.end() is True


def test_a_stopped_keeper_is_noticed_by_its_silence(hall: Hall) -> None:
    hall.begin(1)
    keeper = hall.keeper("1")
    hall.wait(hall.pids)
    keeper.send_signal(signal.SIGSTOP)
    took = hall.wait(lambda: hall.troubles)
    assert hall.troubles[0].cause is Cause.SILENT
    assert took > 0.4
    keeper.send_signal(signal.SIGCONT)
    hall.wait(lambda: all(map(gone, hall.pids())))


def test_a_keeper_ends_its_ranks_when_the_front_is_silent(hall: Hall) -> None:
    hall.begin(1)
    keeper = hall.keeper("1")
    hall.wait(hall.pids)
    (pid,) = hall.pids()
    started = time.monotonic()
    while not gone(pid):
        assert time.monotonic() - started < 3.0
        time.sleep(0.02)
    assert time.monotonic() - started > 0.4
    _, said = keeper.communicate(timeout=5)
    assert "the front has been silent for" in said


def test_a_keeper_that_is_told_to_go_ends_its_ranks_first(hall: Hall) -> None:
    hall.begin(1)
    keeper = hall.keeper("1", rejoin="ALWAYS")
    hall.wait(hall.pids)
    keeper.terminate()
    hall.wait(lambda: hall.troubles)
    assert "SIGTERM" in hall.troubles[0].message
    assert keeper.wait(5) == 0
    assert all(map(gone, hall.pids()))


@pytest.mark.parametrize("rejoin", ["ALWAYS", "AFTER_END"])
def test_a_lasting_keeper_serves_the_next_launch_with_new_ranks(hall: Hall, rejoin: str) -> None:
    hall.begin(1)
    keeper = hall.keeper("1", rejoin=rejoin)
    hall.wait(hall.pids)
    hall.muster.end()
    hall.begin(1)
    hall.wait(lambda: len(hall.pids()) == 2)
    first, second = hall.pids()
    assert gone(first)
    assert not gone(second)
    assert keeper.poll() is None


def test_a_keeper_that_lasts_only_while_the_front_does_ends_with_it(hall: Hall) -> None:
    hall.begin(1)
    keeper = hall.keeper("1", rejoin="AFTER_END")
    hall.wait(hall.pids)
    hall.muster.rekey(KEY)
    assert keeper.wait(5) != 0
    assert all(map(gone, hall.pids()))


def test_a_keeper_of_an_earlier_start_is_sent_away_for_good(hall: Hall) -> None:
    hall.muster.token = "new"
    hall.begin(1)
    keeper = hall.keeper("1", rejoin="AFTER_END", token="old")
    hall.wait(lambda: keeper.poll() is not None)
    assert "Refused: this keeper belongs to an earlier start" in keeper.communicate()[1]
    assert hall.muster.absent == [1]


def test_a_rank_that_this_group_does_not_have_is_refused(hall: Hall) -> None:
    hall.begin(1, 2)
    keeper = hall.keeper("3", rejoin="ALWAYS")
    hall.wait(lambda: keeper.poll() is not None)
    assert "there is no rank 3 in this group of 3" in keeper.communicate()[1]


def test_two_keepers_of_one_rank_do_not_start_it_twice(hall: Hall) -> None:
    hall.begin(1)
    hall.keeper("1")
    hall.wait(hall.pids)
    hall.keeper("1", rejoin="ALWAYS")
    hall.wait(lambda: hall.muster._wire.rejected["these ranks have a keeper"])
    assert len(hall.pids()) == 1
    assert hall.troubles == []


def test_who_does_not_know_the_key_learns_nothing(hall: Hall) -> None:
    hall.begin(1, HORTATOR_RANK_CONFIG="secret")
    done: list[Any] = []

    def intrude() -> None:
        try:
            dial(hall.muster.address, key=bytes(32), epoch=MUSTER_EPOCH, timeout_s=2.0)
        except LeaderLost as error:
            done.append(str(error))

    thread = threading.Thread(target=intrude)
    thread.start()
    hall.wait(lambda: done)
    thread.join()
    assert "wrong HMAC" in done[0]
    assert hall.muster.absent == [1]


def test_what_the_front_says_of_a_ranks_environment_wins_over_what_its_keeper_finds_out(hall: Hall) -> None:
    hall.begin(1, FOO_MARK="seven", NCCL_SOCKET_IFNAME="eth9")
    hall.keeper(
        "1", "import os; print(*(os.environ[n] for n in ('FOO_MARK', 'NCCL_SOCKET_IFNAME', 'GLOO_SOCKET_IFNAME')))"
    )
    hall.wait(lambda: hall.lines)
    assert hall.lines == [(1, "seven eth9 lo")]


@pytest.mark.parametrize("name", ["LD_PRELOAD", "PYTHONPATH", "PATH", "HORTATOR_REDIS_URL"])
def test_a_front_cannot_set_any_variable_that_it_likes(hall: Hall, name: str) -> None:
    hall.begin(1, **{name: "/tmp/evil.so"})
    keeper = hall.keeper("1")
    hall.wait(lambda: keeper.poll() is not None)
    assert f"the front may not set {name}: " in keeper.communicate()[1]
    assert hall.pids() == []


def test_a_hundred_connections_at_once_do_not_make_a_keeper_wait_for_as_many_turns(hall: Hall) -> None:
    """The launcher pumps ten times a second when nothing else happens."""
    hall.begin(0)
    idle = [socket.create_connection(hall.muster.address) for _ in range(100)]
    late = socket.create_connection(hall.muster.address)
    late.settimeout(0.2)
    hall.muster.pump()
    assert late.recv(4096), "it was greeted"
    for stranger in (*idle, late):
        stranger.close()


def test_a_probe_keeps_a_keeper_whose_connection_is_stuck(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    hall.begin(1)
    hall.keeper("1")
    hall.wait(hall.pids)
    (enlisted,) = hall.muster._keepers.values()
    heard = enlisted.heard
    for end in ("_serve", "_flush"):
        monkeypatch.setattr(hall.muster._wire, end, only_for_strangers(getattr(hall.muster._wire, end)))
    hall.wait(lambda: enlisted.heard > heard + 2.0, timeout_s=5.0)
    assert hall.troubles == []


def only_for_strangers(method: Callable[..., None]) -> Callable[..., None]:
    def instead(connection: Any, *arguments: Any) -> None:
        if connection.member is None:
            method(connection, *arguments)

    return instead

"""A group of real processes (two ranks over gloo): it steps, and whatever happens to a rank, it comes back."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from hortator.producer.errors import GroupFailed
from hortator.topology.launch import LineSink, LocalLauncher, RankCommand
from hortator.workers.engine.step import Finish
from hortator.workers.group import Down, Group, Ready, Stepped
from hortator.workers.rank import CONFIG_VARIABLE
from tests.topology.fake_launcher import FakeLauncher
from tests.workers.group_driver import Driver, alive, settings, wait_for

COLLECTIVE_TIMEOUT_S = 2.0
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shared() -> Iterator[Driver]:
    """One group for most tests: after a fault it restarts by itself."""
    with Driver(control_port=free_port(), collective_timeout_s=COLLECTIVE_TIMEOUT_S) as driver:
        driver.ready()
        yield driver


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture
def driver(shared: Driver) -> Driver:
    if shared.group.state != "ready":
        shared.ready()
        assert shared.answer(b"again", 7) == b"againag"
    return shared


# --- stepping


def test_a_request_travels_to_both_ranks_and_its_tokens_come_back(driver: Driver) -> None:
    assert driver.answer(b"hello", 12) == b"hellohellohe"
    last = driver.events[-1]
    assert isinstance(last, Stepped)
    assert last.report.idle
    assert last.report.finished[0][1] is Finish.LENGTH


def test_many_requests_run_together_and_a_cancel_frees_its_row(driver: Driver) -> None:
    endless = driver.busy()
    handles = [driver.submit(b"%d" % n, 20) for n in range(10)]
    driver.finished(handles)
    driver.group.submit(cancel=[endless])
    idle = driver.until(Stepped, lambda event: event.report.idle)
    assert idle.report.stats.running == 0
    assert [driver.said(handle) for handle in handles] == [b"%d" % n * 20 for n in range(10)]


def test_a_group_is_empty_only_once_rank_0_has_taken_what_was_cancelled(driver: Driver) -> None:
    wait_for("an empty group", lambda: bool(driver.turn(0.01)) or driver.group.empty)
    endless = driver.busy()
    assert not driver.group.empty
    driver.group.submit(cancel=[endless])
    assert not driver.group.empty
    driver.until(Stepped, lambda _: driver.group.empty)
    never = driver.submit(max_tokens=1_000_000)
    driver.group.submit(cancel=[never])
    assert not driver.group.empty, "the last report is of what was before"
    driver.until(Stepped, lambda _: driver.group.empty)


def test_a_long_prompt_travels_like_a_short_one(driver: Driver) -> None:
    prompt = bytes(range(1, 256)) * 400
    assert driver.answer(prompt, 300) == (prompt * 2)[:300]


def test_an_idle_group_answers_within_milliseconds(driver: Driver) -> None:
    driver.answer()
    took = []
    for _ in range(3):
        time.sleep(0.3)
        started = time.monotonic()
        driver.answer(max_tokens=1)
        took.append(time.monotonic() - started)
    assert min(took) < 0.3


def test_ranks_that_have_met_let_nobody_else_in(driver: Driver) -> None:
    """The store and gloo go on listening, but the kernel drops what comes; the mesh itself goes on."""
    ranks = [psutil.Process(pid) for pid in driver.group.pids.values()]
    doors = {c.laddr for rank in ranks for c in rank.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert len(doors) >= 3, "the store of rank 0, and each rank's gloo"
    for door in doors:
        with pytest.raises(TimeoutError):
            socket.create_connection(door, timeout=0.1).close()
    assert driver.answer(b"still", 10) == b"stillstill"


def test_an_idle_group_uses_almost_no_cpu(driver: Driver) -> None:
    def cpu_s() -> float:
        ticks = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in driver.group.pids.values()]
        return sum(int(t[11]) + int(t[12]) for t in ticks) / os.sysconf("SC_CLK_TCK")

    time.sleep(0.1)
    before = cpu_s()
    time.sleep(1.0)
    assert cpu_s() - before < 0.1


def test_idle_for_longer_than_a_collective_may_take_is_no_fault(driver: Driver) -> None:
    driver.answer()
    epoch = driver.group.epoch
    idle_since = time.monotonic()
    while time.monotonic() - idle_since < 2 * COLLECTIVE_TIMEOUT_S:
        assert driver.turn(0.5) == []
    assert driver.answer(b"hi", 4) == b"hihi"
    assert driver.group.epoch == epoch


def test_a_quiet_group_is_not_readable(driver: Driver) -> None:
    driver.answer()
    started = time.monotonic()
    assert driver.turn(0.3) == []
    assert time.monotonic() - started > 0.25


def test_strangers_on_the_control_port_do_not_disturb_a_running_group(driver: Driver) -> None:
    work = driver.busy()
    for garbage in (b"\x80\x04\x95", b"HRTC" + bytes(60), b"HR", os.urandom(5000)):
        with socket.create_connection(("127.0.0.1", driver.settings.control_port), timeout=5) as stranger:
            stranger.sendall(garbage)
    assert driver.answer(b"calm", 8) == b"calmcalm"
    wait_for("the strangers to be counted", lambda: sum(driver.group.rejected.values()) >= 4)
    driver.group.submit(cancel=[work])
    driver.until(Stepped, lambda event: event.report.idle)


# --- faults; each leaves the group to its own restart, and the next test sees that it answers again


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_takes_the_group_down_within_a_second(driver: Driver, rank: int) -> None:
    driver.busy()
    pids = driver.group.pids
    epoch, fd = driver.group.epoch, driver.group.fileno()
    killed = time.monotonic()
    os.kill(pids[rank], signal.SIGKILL)
    down = driver.down()
    assert time.monotonic() - killed < 1.0
    assert down.reason == f"rank {rank} (pid {pids[rank]} on {socket.gethostname()}) was killed by SIGKILL"
    assert (down.epoch, down.permanent, down.retry_in_s) == (epoch, False, 0.1)
    assert not any(alive(pid) for pid in pids.values())
    with pytest.raises(GroupFailed, match="nothing can be submitted"):
        driver.submit()
    assert driver.ready().epoch == epoch + 1
    assert driver.group.fileno() == fd
    assert driver.answer(b"again", 7) == b"againag"


@pytest.mark.parametrize(("rank", "busy"), [(0, True), (1, False)])
def test_a_stopped_rank_takes_the_group_down(driver: Driver, rank: int, busy: bool) -> None:
    """Here silence is borne for 1.5 s; in production for 3."""
    if busy:
        driver.busy()
    pids = driver.group.pids
    stopped = time.monotonic()
    os.kill(pids[rank], signal.SIGSTOP)
    down = driver.down()
    assert 1.0 < time.monotonic() - stopped < 1.5 + 1.0
    assert down.reason.startswith(f"rank {rank} (pid {pids[rank]}")
    assert "silent" in down.reason
    assert not any(alive(pid) for pid in pids.values())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_loops_is_found_although_it_beats(driver: Driver, rank: int) -> None:
    """Here standing still is borne for 1.5 s; in production for 5."""
    driver.busy()
    pids = driver.group.pids
    started = time.monotonic()
    driver.submit(b"H%d" % rank)
    down = driver.down()
    assert 1.2 < time.monotonic() - started < 1.5 + 1.0
    assert down.reason.startswith(f"rank {rank} (pid {pids[rank]}")
    assert "no progress" in down.reason


def test_a_rank_that_disagrees_takes_the_group_down(driver: Driver) -> None:
    pid = driver.group.pids[1]
    driver.submit(b"D1")
    down = driver.down()
    assert down.reason.startswith(f"rank 1 (pid {pid} on {socket.gethostname()}): rank 1 disagrees with the leader")
    assert not down.permanent


def test_a_plan_that_comes_to_a_rank_damaged_takes_the_group_down(driver: Driver) -> None:
    pid = driver.group.pids[1]
    driver.submit(b"G1")
    reason = driver.down().reason
    assert reason.startswith(f"rank 1 (pid {pid} on {socket.gethostname()}): rank 1 at step ")
    assert "damaged on its way" in reason


def test_a_rank_that_is_a_hundred_times_slower_holds_the_others_up_and_nobody_is_blamed(driver: Driver) -> None:
    """For longer than standing still is borne, but it moves."""
    epoch, started = driver.group.epoch, time.monotonic()
    assert driver.answer(b"S1", 6) == b"S1S1S1"
    assert time.monotonic() - started > 2.0
    assert driver.group.epoch == epoch


def test_a_rank_that_raises_is_named_with_its_error_and_leaves_a_traceback_in_the_log(
    driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hortator.rank")
    driver.submit(b"R0")
    assert "ZeroDivisionError: the test asked for it" in driver.down().reason
    assert any(line.startswith("[rank 0] Traceback") for line in caplog.messages)


def test_nothing_of_an_old_epoch_came_after_its_down(shared: Driver) -> None:
    """Over all that happened to the shared group."""
    epoch: int | None = None
    for event in shared.events:
        match event:
            case Ready():
                assert epoch is None
                epoch = event.epoch
            case Stepped():
                assert event.epoch == epoch
            case Down():
                epoch = None
    assert sum(isinstance(event, Down) for event in shared.events) >= 8


# --- starting


class Tampering(LocalLauncher):
    """Gives rank 1 another configuration than the front meant."""

    def __init__(self, **changes: object) -> None:
        super().__init__()
        self._changes = changes

    def launch(self, commands: Sequence[RankCommand], *, on_line: LineSink) -> None:
        first, second = commands
        config = json.dumps(json.loads(second.env[CONFIG_VARIABLE]) | self._changes)
        tampered = RankCommand(1, second.argv, dict(second.env) | {CONFIG_VARIABLE: config})
        super().launch([first, tampered], on_line=on_line)


def test_a_rank_that_runs_something_else_is_refused_for_good_by_name_and_entry() -> None:
    with Driver(launcher=Tampering(max_num_seqs=32)) as driver:
        down = driver.down()
        assert down.permanent
        assert down.retry_in_s is None
        assert "rank 1 (pid" in down.reason
        assert "max_num_seqs is '32', on rank 0 it is '64'" in down.reason
        assert driver.group.state == "down"
        assert driver.group.last_failure == down.reason


def test_a_configuration_error_at_load_is_told_in_one_line_and_is_final(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with Driver(engine="tests.workers.rank_engines:cannot_work", tensor_parallel_size=1) as driver:
        down = driver.down()
        assert down.permanent
        assert down.reason.endswith(": max_num_seqs=64 needs more memory than this device has: lower it")
        assert not any("Traceback" in line for line in caplog.messages)
        told = [record.name for record in caplog.records if "lower it" in record.getMessage()]
        assert told in ([], ["hortator.rank"])  # in the rank's own words; the worker's last ones are the pool's
        assert driver.turn(0.5) == []


def test_a_crash_at_load_is_told_and_tried_again() -> None:
    with Driver(engine="tests.workers.rank_engines:crashes_at_load", tensor_parallel_size=1) as driver:
        down = driver.down()
        assert "OSError: the disk of rank 0 is broken" in down.reason
        assert (down.permanent, down.retry_in_s) == (False, 0.1)


def test_starts_that_fail_are_tried_again_with_growing_pauses_and_new_keys() -> None:
    launcher = FakeLauncher()
    with Driver(launcher=launcher, restart_backoff_s=0.05) as driver:
        pauses = []
        for epoch in (1, 2, 3):
            wait_for("the launch", lambda: len(launcher.launches) == epoch)  # noqa: B023
            launcher.end(1, 70)
            down = driver.down()
            pauses.append(down.retry_in_s)
            assert (down.epoch, down.reason) == (epoch, "rank 1 exited with 70")
        configs = [json.loads(launch[0].env[CONFIG_VARIABLE]) for launch in launcher.launches]
    assert pauses == [0.05, 0.1, 0.2]
    assert [config["epoch"] for config in configs] == [1, 2, 3]
    assert len({config["control_key"] for config in configs}) == 3
    assert launcher.kills >= 3


def test_a_group_that_never_gets_ready_is_given_up() -> None:
    with Driver(launcher=FakeLauncher(), start_timeout_s=0.3) as driver:
        assert driver.down().reason == "not ready after 0.3 s"


def test_ranks_get_neither_the_fronts_settings_nor_a_key_in_their_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HORTATOR_REDIS_URL", "redis://:secret@host/0")
    launcher = FakeLauncher()
    with Driver(launcher=launcher):
        wait_for("the launch", lambda: bool(launcher.launches))
    for command in launcher.launches[0]:
        key = json.loads(command.env[CONFIG_VARIABLE])["control_key"]
        assert not any(key in argument for argument in command.argv)
        assert [name for name in command.env if name.startswith("HORTATOR_")] == [CONFIG_VARIABLE]


@pytest.mark.parametrize("setting", ["control_port", "store_port"])
def test_a_port_that_is_taken_is_named(setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        with Driver(**{setting: port}) as driver:
            down = driver.down()
            assert down.permanent
            assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in down.reason


# --- ending


def test_close_leaves_no_process_even_if_a_rank_is_stopped() -> None:
    driver = Driver(engine="echo", tensor_parallel_size=1)
    driver.ready()
    (pid,) = driver.group.pids.values()
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    driver.group.close(timeout_s=1.0)
    assert time.monotonic() - started < 2.0
    assert not alive(pid)
    assert driver.group.state == "closed"
    assert driver.group.poll() == []
    driver.group.close()


def test_close_in_the_middle_of_a_start_leaves_no_process() -> None:
    group = Group(settings(engine="echo"))
    group.start()
    wait_for("the ranks to be there", lambda: len(group.pids) == 2)
    pids = group.pids
    started = time.monotonic()
    group.close(timeout_s=2.0)
    assert time.monotonic() - started < 3.0
    assert not any(alive(pid) for pid in pids.values())


def test_a_group_that_never_started_can_be_closed() -> None:
    Group(settings()).close()


def test_no_rank_outlives_a_killed_front() -> None:
    """Not even one that is stopped and cannot see that its connection ended."""
    front = subprocess.Popen(
        [sys.executable, "-m", "tests.workers.front_process", json.dumps({"engine": "echo"})],
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
    )
    assert front.stdout is not None
    pids = list(json.loads(front.stdout.readline()).values())
    assert all(alive(pid) for pid in pids)
    os.kill(pids[1], signal.SIGSTOP)
    front.kill()
    try:
        wait_for("the ranks to end", gone(pids), timeout_s=2.0)
    finally:
        front.communicate()
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)


def gone(pids: list[int]) -> Callable[[], bool]:
    return lambda: not any(alive(pid) for pid in pids)

"""From settings to launchers and to what ranks are told; the last tests start ranks through a keeper on this host."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hortator.producer.errors import ConfigError
from hortator.topology.errors import CannotStart
from hortator.topology.launch import LocalLauncher, RankCommand
from hortator.topology.remote import RemoteLauncher
from hortator.workers.group import Group
from hortator.workers.launching import check_meeting_host, make_launcher, num_own, rank_commands
from hortator.workers.rank import CONFIG_VARIABLE
from hortator.workers.settings import WorkerSettings
from tests.topology.fake_launcher import FakeLauncher
from tests.workers.group_driver import Driver, alive, settings, wait_for

REPOSITORY = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("s" * 64)
    path.chmod(0o600)
    return path


def spread(**chosen: Any) -> WorkerSettings:
    """Four ranks, two of them on another host."""
    return settings(launcher="ssh", hosts="10.1.1.1:2,10.1.1.2:2", tensor_parallel_size=4, **chosen)


def commands(group: WorkerSettings, environment: Mapping[str, str] = os.environ) -> list[RankCommand]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        return rank_commands(
            group, epoch=1, key=bytes(32), control=("10.1.1.1", 4711), pipe=theirs, environment=environment
        )


def config(command: RankCommand) -> dict[str, Any]:
    found = json.loads(command.env[CONFIG_VARIABLE])
    assert isinstance(found, dict)
    return found


# --- settings


def test_without_hosts_all_ranks_are_children_of_the_front() -> None:
    assert isinstance(make_launcher(settings(), {}), LocalLauncher)
    assert isinstance(make_launcher(settings(hosts="here:2", launcher="ssh"), {}), LocalLauncher)


def test_the_first_host_is_the_fronts_and_where_the_others_find_it(monkeypatch: pytest.MonkeyPatch) -> None:
    group = spread()
    assert num_own(group) == 2
    assert group.meeting_host == "10.1.1.1"
    assert spread(control_host="10.9.9.9").meeting_host == "10.9.9.9"
    assert isinstance(make_launcher(group, {}), RemoteLauncher)
    monkeypatch.setenv("HORTATOR_HOSTS", "10.1.1.1:1,10.1.1.2:1")
    monkeypatch.setenv("HORTATOR_LAUNCHER", "ssh")
    assert [node.host for node in settings().hosts] == ["10.1.1.1", "10.1.1.2"]


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"hosts": "a:1,b:2", "launcher": "ssh"}, "hosts has room for 3 ranks, but tensor_parallel_size=2"),
        ({"hosts": "a:1,b:1"}, "launcher=local starts ranks on this host only"),
        ({"launcher": "ssh"}, "launcher=ssh needs hosts"),
        ({"launcher": "external"}, "needs a keeper_port"),
        ({"launcher": "external", "keeper_port": 1, "front_ranks": 3}, "the group has 2 ranks"),
        ({"hosts": "a;b:2"}, "'a;b' is no host name"),
    ],
)
def test_settings_that_contradict_each_other_are_told(chosen: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        settings(**chosen)


@pytest.mark.parametrize("launcher", ["external", "deepspeed"])
def test_a_secret_that_is_not_there_is_told_at_once(launcher: str) -> None:
    chosen: dict[str, Any] = {"launcher": launcher, "hosts": "a:1,b:1", "keeper_port": 4700}
    with pytest.raises(ConfigError, match="secret_file is not set; make one with"):
        Group(settings(**chosen))


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("127.0.0.1", "is 127.0.0.1 here"),
        ("0.0.0.0", "cannot reach it"),
        ("no-such-host.invalid", "cannot be resolved"),
    ],
)
def test_an_address_that_other_hosts_cannot_reach_is_refused_before_anything_starts(host: str, words: str) -> None:
    with pytest.raises(CannotStart, match=words):
        check_meeting_host(spread(control_host=host))


@pytest.mark.parametrize(
    ("chosen", "here"),
    [
        ({"control_host": "127.0.0.1"}, True),
        ({"control_host": "localhost"}, True),
        ({"hosts": "127.0.0.1:1,localhost:1"}, True),
        ({}, False),
        ({"hosts": "localhost:1,10.1.1.2:1"}, False),
        ({"control_host": "my-node"}, False),
        ({"control_host": "0.0.0.0"}, False),
    ],
)
def test_ranks_that_others_start_find_no_loopback_address_unless_somebody_says_that_all_are_here(
    chosen: dict[str, Any], here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`my-node` is what a host often calls itself: its name leads to 127.0.1.1."""
    known = {"my-node": "127.0.1.1"}
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: resolve(known.get(host, host), *a, **k))
    group = settings(launcher="external", keeper_port=4700, **chosen)
    if here:
        check_meeting_host(group)
        return
    with pytest.raises(CannotStart, match=r"control_host: .* is .* here.*HORTATOR_CONTROL_HOST.*or to 127\.0\.0\.1"):
        check_meeting_host(group)


# --- what ranks are told


def test_every_rank_is_told_its_place_and_keepers_tell_the_devices_of_theirs() -> None:
    found = [config(command) for command in commands(spread())]
    assert [entry["rank"] for entry in found] == [0, 1, 2, 3]
    assert [entry["local_rank"] for entry in found] == [0, 1, None, None]
    assert {entry["store_host"] for entry in found} == {"10.1.1.1"}
    assert {entry["control_port"] for entry in found} == {4711}


def test_remote_ranks_get_what_concerns_the_network_and_nothing_else_of_the_front() -> None:
    names = ("NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "HORTATOR_REDIS_URL", "AWS_SECRET_ACCESS_KEY")
    remote = commands(spread(), dict.fromkeys(names, "value"))[2].env
    assert set(remote) - {name for name in remote if name.startswith("GLOO_")} == {
        CONFIG_VARIABLE, "NCCL_DEBUG", "PYTHONUNBUFFERED",
    }  # fmt: skip


def test_an_interface_that_is_named_for_a_host_reaches_its_ranks() -> None:
    hosts = [{"host": "10.1.1.1", "ranks": 1, "interface": "ib0"}, {"host": "10.1.1.2", "ranks": 1, "interface": "ib1"}]
    own, other = commands(settings(launcher="ssh", hosts=hosts))
    assert (own.env["GLOO_SOCKET_IFNAME"], own.env["NCCL_SOCKET_IFNAME"]) == ("ib0", "ib0")
    assert (other.env["GLOO_SOCKET_IFNAME"], other.env["NCCL_SOCKET_IFNAME"]) == ("ib1", "ib1")


def test_named_variables_reach_the_ranks_of_every_host_and_a_named_interface_wins_over_one_that_is_found() -> None:
    front = {"FOO_MARK": "1", "NCCL_SOCKET_IFNAME": "eth9", "OTHER": "2"}
    group = spread(rank_variables="FOO_MARK,NCCL_SOCKET_IFNAME,NOT_SET")
    for command in commands(group, front):
        assert (command.env["FOO_MARK"], command.env["NCCL_SOCKET_IFNAME"]) == ("1", "eth9")
    assert "OTHER" not in commands(group, front)[2].env
    with pytest.raises(ValidationError, match="HORTATOR_REDIS_URL is the front's alone"):
        spread(rank_variables="FOO_MARK,HORTATOR_REDIS_URL")


def test_ranks_of_a_host_share_its_cores_unless_somebody_says_how_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(9)))
    pair = settings(tensor_parallel_size=2)
    assert [command.env["OMP_NUM_THREADS"] for command in commands(pair, {})] == ["4", "4"]
    for said, found in (("3", "3"), ("4,2", "4,2"), ("", "4"), ("abc", "4"), ("0", "4"), ("-1", "4")):
        assert [c.env["OMP_NUM_THREADS"] for c in commands(pair, {"OMP_NUM_THREADS": said})] == [found, found]


# --- a budget


def test_a_group_that_comes_down_too_often_is_given_up() -> None:
    launcher = FakeLauncher()
    with Driver(launcher=launcher, restart_budget=2, restart_backoff_s=0.01) as driver:
        downs = []
        for number in (1, 2, 3):
            wait_for("the launch", lambda: len(launcher.launches) == number)  # noqa: B023
            launcher.end(1, 70)
            downs.append(driver.down())
    assert [down.permanent for down in downs] == [False, False, True]
    assert downs[2].reason == "rank 1 exited with 70; given up after 2 restarts within 600 s (restart_budget)"


# --- ranks that come


@pytest.fixture
def joinable(secret: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a group whose rank 1 somebody else has to start."""
    monkeypatch.setenv("HORTATOR_LAUNCHER", "external")
    return {"keeper_port": free_port(), "secret_file": secret, "control_host": "127.0.0.1"}


@pytest.fixture
def external(joinable: dict[str, Any]) -> Iterator[Driver]:
    with Driver(**joinable, start_timeout_s=20.0) as driver:
        yield driver


def keeper(driver: Driver, *options: str, **env: str) -> "subprocess.Popen[str]":
    address, secret_file = f"127.0.0.1:{driver.settings.keeper_port}", str(driver.settings.secret_file)
    return subprocess.Popen(
        [sys.executable, "-m", "hortator.topology.keeper", "--join", address, "--secret-file", secret_file, *options],
        env=os.environ | env,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )


def ended(process: "subprocess.Popen[str]") -> str:
    """What it said on its way out."""
    process.terminate()
    return process.communicate(timeout=10)[1]


def test_a_rank_that_slurm_starts_joins_and_a_new_one_takes_the_place_of_a_killed_one(external: Driver) -> None:
    slurm = {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}
    first = keeper(external, **slurm)
    external.ready()
    assert external.answer(b"hello", 7) == b"hellohe"
    first.send_signal(signal.SIGKILL)
    first.communicate()
    down = external.down()
    assert down.reason.startswith(f"the keeper of rank 1 (pid {first.pid} on ")
    assert not down.permanent
    second = keeper(external, "--ranks", "1")
    try:
        assert external.ready().epoch == 2
        assert external.answer(b"again", 7) == b"againag"
    finally:
        external.group.close()
        ended(second)


def test_a_keeper_that_counts_other_ranks_than_the_group_has_is_sent_away(external: Driver) -> None:
    wrong = keeper(external, RANK="1", LOCAL_RANK="0", WORLD_SIZE="4")
    wait_for("it to leave", lambda: external.turn() is not None and wrong.poll() is not None)
    assert wrong.returncode == 78
    assert "this group has 2 ranks, but it was started with 4" in wrong.communicate()[1]


def test_a_rank_with_other_code_is_refused_for_good(external: Driver, tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "src" / "hortator" / "workers" / "stroke.py").open("a") as file:
        file.write("# another version of the step\n")
    other = keeper(external, "--ranks", "1", PYTHONPATH=f"{tmp_path / 'src'}:{REPOSITORY}")
    down = external.down()
    external.group.close()
    ended(other)
    assert down.permanent
    assert "rank 1" in down.reason
    assert "does not run what rank 0 runs: code is " in down.reason


def test_a_group_that_nobody_joins_says_whom_it_waits_for(joinable: dict[str, Any]) -> None:
    with Driver(engine="echo", start_timeout_s=1.0, **joinable) as driver:
        wait_for("rank 0", lambda: bool(driver.group.pids))
        pids = driver.group.pids
        assert driver.down().reason == "not ready after 1 s: nobody has come for rank 1"
        assert not any(alive(pid) for pid in pids.values())


def test_a_keepers_port_that_is_taken_is_named(joinable: dict[str, Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        with Driver(**joinable | {"keeper_port": port}) as driver:
            down = driver.down()
            assert down.permanent
            assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in down.reason

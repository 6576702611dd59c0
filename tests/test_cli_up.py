"""`hortator up`, `restart --fleet`, `logs` and `down --fleet` on this host, with real leaders of one echo rank each."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest

from hortator.cli import run
from hortator.cli_hosts import FleetOnHosts, FoundLeader
from hortator.cli_logs import merged
from hortator.cli_waiting import Awaited
from hortator.producer.client import Client
from hortator.producer.store import GroupBeat
from hortator.topology.leaders import Leader, StateDirectory, birth
from tests.together.fleet import wait_for

FLEET = """
redis_url = "{redis}"
hostfile = "hosts"
[[models]]
name = "echo"
engine = "echo"
device = "cpu"
max_num_seqs = {max_num_seqs}
"""


class Shell:
    def __init__(self, directory: Path, redis: str, capture: pytest.CaptureFixture[str]) -> None:
        self.directory, self.redis, self._capture = directory, redis, capture
        (directory / "hosts").write_text("127.0.0.1 slots=2\n")
        self.write(max_num_seqs=8)

    @property
    def state(self) -> StateDirectory:
        return StateDirectory(self.directory / "state", f"{self.redis} namespace=none")

    def write(self, **settings: object) -> None:
        (self.directory / "f.toml").write_text(FLEET.format(redis=self.redis, **settings))

    def __call__(self, command: str, *arguments: str, code: int = 0) -> str:
        """Output of a command that is given the fleet file and its directory."""
        self._capture.readouterr()
        file = str(self.directory / "f.toml")
        given = [file] if command in ("up", "logs") else ["--fleet", file]
        ended = run([command, *arguments, *given, "--dir", str(self.directory / "state")])
        out, err = self._capture.readouterr()
        assert ended == code, out + err
        return out + err

    def over_redis(self, command: str, *, code: int = 0) -> str:
        """Output of a command about the group that needs no fleet file."""
        self._capture.readouterr()
        ended = run([command, "echo-0", "--redis-url", self.redis])
        out, err = self._capture.readouterr()
        assert ended == code, out + err
        return out + err

    def busy(self, **settings: object) -> None:
        """The group runs, with one job that takes a minute."""
        with (self.directory / "f.toml").open("a") as file:
            file.writelines(f"{name} = {value}\n" for name, value in {"echo_latency_s": 60, **settings}.items())
        self("up")
        with Client(self.redis) as client:
            client.enqueue("a long one", model="echo")
            wait_for("it runs", lambda: any(queue.running for queue in client.queues()))

    @contextmanager
    def beside(self, command: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """A command as a process of its own, of the fleet unless it has arguments; what it says is in its stdout."""
        file = str(self.directory / "f.toml")
        fleet = [*([file] if command == "up" else ["--fleet", file]), "--dir", str(self.directory / "state")]
        argv = [sys.executable, "-m", "hortator", command, *(arguments or fleet)]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def shown(self) -> str | None:
        """The state that the group has in `status`."""
        with Client(self.redis) as client:
            return next((beat.state for queue in client.queues() for beat in queue.groups), None)

    def rows(self) -> str:
        """The capacity that the group shows, which tells its settings."""
        self._capture.readouterr()
        assert run(["status", "--redis-url", self.redis, "--json"]) == 0
        return str(json.loads(self._capture.readouterr().out)["groups"][0]["capacity"])


@pytest.fixture
def sh(tmp_path: Path, newest_redis_url: str, capsys: pytest.CaptureFixture[str]) -> Iterator[Shell]:
    shell = Shell(tmp_path, newest_redis_url, capsys)
    yield shell
    for found in shell.state.leaders():
        shell.state.stop(found.group, patience_s=0.0)


def test_a_fleet_comes_up_takes_new_settings_and_goes_down(sh: Shell) -> None:
    said = sh("up")
    assert "echo-0 starts: pid" in said
    assert "echo-0 is ready" in said
    assert "echo-0 runs already" in sh("up")
    assert sh.rows() == "8"
    before = sh.state.look("echo-0").pid
    sh.write(max_num_seqs=12)
    again = f"`hortator restart --fleet {sh.directory / 'f.toml'} --dir {sh.directory / 'state'} echo-0` takes them"
    assert f"f.toml has other settings for it now: {again}" in sh("up")
    assert "echo-0 is ready" in sh("restart")
    assert "other settings" not in sh("up")
    assert sh.rows() == "12"
    pid = sh.state.look("echo-0").pid
    assert pid not in (None, before)
    assert "group echo-0 is ready after" in sh("logs", "-n", "50").split("echo-0 leader 127.0.0.1 | ")[-1]
    assert "echo-0 is down" in sh("down")
    assert birth(pid or 0) == ""
    assert sh("down") == f"nothing of {sh.directory / 'f.toml'} was found running\n"
    assert sh("down", "echo-0") == "nothing of echo-0 was found running\n"


def test_up_waits_for_a_group_that_still_stops_and_starts_it_anew(sh: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    sh.busy(grace_s=12)
    before = sh.state.look("echo-0").pid
    with sh.beside("down") as down:
        wait_for("it stops", lambda: sh.shown() == "stopping")
        with monkeypatch.context() as impatient:
            impatient.setattr("hortator.cli_waiting.LAST_WORDS_S", -12.0)
            said = sh("up", code=1)
            assert f"error: echo-0 (pid {before} on 127.0.0.1) still stops after its grace: see" in said
        assert (
            "echo-0 was told to stop, and hears nothing more: `hortator up FLEET` starts it when it has ended"
            in sh.over_redis("drain", code=1)
        )
        said = sh("up")
        assert "echo-0 still stops, or starts anew: waiting for its end, at most 27 s" in said
        assert "echo-0 starts: pid" in said
        assert "echo-0 is ready" in said
        assert down.wait(60) == 0
    assert sh.state.look("echo-0").pid not in (None, before), "what was started since is not ended by the former down"


def test_a_group_that_could_not_be_started_again_is_not_stopped(sh: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    sh("up")
    pid = sh.state.look("echo-0").pid
    with monkeypatch.context() as full:
        full.setattr("hortator.cli_hosts.FleetOnHosts.obstacles", lambda *_: {"127.0.0.1": "no space"})
        said = sh("restart", code=1)
    assert said == "error: echo-0 was left as it is, for 127.0.0.1 could not start it again: no space\n"
    assert sh.state.look("echo-0").pid == pid
    assert sh.shown() == "ready"


def test_who_is_told_to_stop_while_he_starts_anew_does_not_come_back(sh: Shell) -> None:
    sh.busy(grace_s=6)
    with sh.beside("restart", "echo-0", "--redis-url", sh.redis):
        wait_for("it starts anew", lambda: sh.shown() == "restarting")
        assert "echo-0 is down" in sh.over_redis("down")
    assert wait_for("its process ends", lambda: sh.state.look("echo-0").pid is None)
    assert sh.shown() is None


@pytest.mark.parametrize("command", ["up", "down", "restart"])
def test_ctrl_c_tells_what_goes_on_and_how_to_end_it(sh: Shell, command: str) -> None:
    if command != "up":
        sh.busy(grace_s=30)
    with sh.beside(command) as process:
        if command == "up":
            wait_for("it was started", lambda: sh.state.look("echo-0").pid)
        else:
            wait_for("it stops", lambda: sh.shown() == "stopping")
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    file, pid, state = sh.directory / "f.toml", sh.state.look("echo-0").pid, sh.directory / "state"
    assert re.search(
        rf"note: these run: echo-0 \(pid {pid} on 127.0.0.1, {'.*' if command == 'up' else 'stopping'}\); ", said
    )
    assert f"`hortator down --fleet {file} --dir {state} echo-0` ends it" in said


def test_a_group_that_is_drained_makes_up_fail_and_says_how_to_resume_it(sh: Shell) -> None:
    sh("up")
    assert sh.over_redis("drain") == "echo-0 is drained\n"
    said = sh("up", code=1)
    [back] = re.findall(r"error: echo-0 was told to drain and takes nothing: `hortator (resume .*)` lets it", said)
    assert back == f"resume echo-0 --redis-url {sh.redis}"
    assert sh.over_redis("resume") == "echo-0 takes jobs again\n"
    assert "echo-0 is ready" in sh("up")


@pytest.mark.parametrize("command", [("down",), ("restart",), ("up",)], ids=" ".join)
def test_a_redis_of_the_shell_that_a_fleet_file_overrules_is_told(
    command: tuple[str, ...], sh: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("cli_up.start_fleet", "cli_steering.restart_fleet", "cli_steering.down_fleet"):
        monkeypatch.setattr(f"hortator.{module}", lambda *_, **__: 0)
    monkeypatch.setenv("HORTATOR_REDIS_URL", sh.redis)
    assert sh(*command) == ""
    monkeypatch.setenv("HORTATOR_REDIS_URL", "redis://:s3kret@other/0")
    file = sh.directory / "f.toml"
    assert sh(*command) == f"warning: HORTATOR_REDIS_URL is ignored: {file} says redis_url = {sh.redis}\n"
    file.write_text(re.sub("redis_url.*", "", file.read_text()))
    assert "has by default redis_url = redis://127.0.0.1:6379/0" in sh(*command)


def test_a_setting_that_cannot_work_is_told_by_up_itself(sh: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hortator.cli_waiting.LOOK_EVERY_S", 1.0)
    file = sh.directory / "f.toml"
    file.write_text(file.read_text() + 'engine_typo = "x"\n')
    assert "there is no such key" in sh("up", code=2)
    sh.write(max_num_seqs=8)
    file.write_text(file.read_text().replace('engine = "echo"', 'path = "/no/such/model"'))
    assert re.search("error: echo-0.* ended.*/no/such/model", sh("up", code=1))


def test_a_group_that_is_alive_elsewhere_is_not_started_again_and_both_places_are_named(
    sh: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hortator.cli_up.STRANGER_S", 0.0)
    beat = GroupBeat("echo-0", "echo", 0, 8, 1, "ready", {"host": "h9", "pid": 4711, "born": "x"})
    monkeypatch.setattr("hortator.cli_hosts.FleetOnHosts.alive", lambda _: {"echo-0": beat})
    said = sh("up", code=1)
    assert "echo-0 is alive (pid 4711 on h9), but" in said
    assert "on 127.0.0.1, where the plan has it, knows nothing of it: it was started with another --dir" in said
    assert sh.state.look("echo-0").pid is None


def test_two_fleets_whose_files_have_one_name_have_nothing_to_do_with_each_other(
    tmp_path: Path, newest_redis_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    started = []
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "hosts").write_text("127.0.0.1 slots=2\n")
        text = FLEET.format(redis=newest_redis_url, max_num_seqs=8)
        (tmp_path / name / "fleet.toml").write_text(f'namespace = "{name}:"\n' + text)
        assert run(["up", str(tmp_path / name / "fleet.toml")]) == 0
        said = capsys.readouterr().out
        assert "echo-0 starts" in said, "the other fleet's leader is not taken for this one's"
        started.append(int(said.split("pid ")[1].split()[0]))
    assert run(["down", "--fleet", str(tmp_path / "y" / "fleet.toml")]) == 0
    assert [birth(pid) != "" for pid in started] == [True, False]
    log = capsys.readouterr() and run(["logs", str(tmp_path / "x" / "fleet.toml"), "--dir", str(tmp_path / "no")])
    assert log == 1
    assert "no log in" in capsys.readouterr().err
    assert run(["down", "--fleet", str(tmp_path / "x" / "fleet.toml")]) == 0


def test_leaders_of_the_fleet_as_it_was_before_its_namespace_changed_are_told(
    tmp_path: Path, newest_redis_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "hosts").write_text("127.0.0.1 slots=2\n")
    text = FLEET.format(redis=newest_redis_url, max_num_seqs=8).replace('"cpu"', '"auto"')
    file, pids, said = tmp_path / "fleet.toml", [], []
    for namespace in ("was:", "is:"):
        file.write_text(f'namespace = "{namespace}"\n{text}')
        assert run(["up", str(file)]) == 0
        out, err = capsys.readouterr()
        pids.append(out.split("pid ")[1].split()[0])
        said.append(err)
    for namespace in ("is:", "was:"):
        file.write_text(f'namespace = "{namespace}"\n{text}')
        assert run(["down", "--fleet", str(file)]) == 0
    assert said[0] == ""
    assert said[1].startswith("warning: echo-0 of another fleet (redis://")
    assert f"namespace=was:) has GPUs of echo-0: pid {pids[0]}, " in said[1]


def test_a_fleet_that_shrank_or_moved_says_what_runs_beyond_it_and_ends_it_when_told(sh: Shell) -> None:
    file = sh.directory / "f.toml"
    one = file.read_text()
    (sh.directory / "hosts").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    assert "pid" in sh("up", "--exclude", "127.0.0.1", "--no-wait")
    file.write_text(one + "replicas = 2\n")
    said = sh("up")
    assert "echo-0 runs already" in said, "it is found where it is, whatever the plan for empty hosts says"
    assert "echo-1 starts: pid" in said
    assert sh.state.look("echo-1").seats[0].host == "127.0.0.1", "beside the group that runs"
    file.write_text(one)
    said = sh("down")
    assert "echo-0 is down" in said
    assert "note: echo-1 runs too (pid" in said
    assert {line.split()[2] for line in sh("logs").splitlines()} == {"127.0.0.1", "localhost"}
    assert "echo-1 is down" in sh("down", "echo-1")
    assert all(found.pid is None for found in sh.state.leaders())


def test_nothing_is_started_before_every_leaders_host_has_answered(sh: Shell) -> None:
    (sh.directory / "hosts").write_text("127.0.0.1 slots=1\nno-such-host.invalid slots=1\n")
    file = sh.directory / "f.toml"
    file.write_text(file.read_text().replace("127.0.0.1", "0.0.0.0") + "replicas = 2\n")
    said = sh("up", code=1)
    assert "error: no-such-host.invalid: ssh: Could not resolve hostname" in said
    assert "nothing was started" in said
    assert sh.state.leaders() == []
    file.write_text(file.read_text().replace("0.0.0.0", "127.0.0.1"))
    assert "is every host's own, but leaders run on 127.0.0.1, no-such-host.invalid" in sh("up", code=2)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["up", "FILE", "--for", "slurm"], "--for slurm goes with --launcher external"),
        (["restart", "--fleet", "FILE", "--namespace", "x:"], "--namespace and --fleet"),
        (["restart", "--fleet", "FILE", "--all"], "--all and --fleet: its groups are meant, unless you name some"),
        (["down", "--fleet", "FILE", "--redis-url", "redis://a"], "--redis-url and --fleet"),
        (["down", "--fleet", "FILE", "--all"], "--all and --fleet: its groups are meant, unless you name some"),
        (
            ["down", "FILE"],
            "f.toml looks like a fleet file, and names of groups are wanted here: hortator down --fleet",
        ),
        (["restart", "FILE"], "wanted here: hortator restart --fleet"),
        (["drain", "FILE"], "wanted here; hortator status lists those that live"),
        (["down"], "which groups? Name them as `hortator status` does, or say --all, or give --fleet FILE"),
        (["down", "a", "--dir", "x"], "--dir goes with --fleet"),
        (["drain"], "which groups?"),
        (["drain", "a", "--all"], "and a was named too"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    sh: Shell, arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(sh.directory / "f.toml")
    assert run([file if word == "FILE" else word for word in arguments]) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("command", ["drain", "resume", "restart", "down"])
def test_all_of_nothing_is_said_with_the_same_words_by_every_command(
    command: str, newest_redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([command, "--all", "--redis-url", newest_redis_url]) == 1
    place = newest_redis_url.removesuffix("/")
    assert capsys.readouterr().err.startswith(f"error: no group is alive in {place}")
    assert run([command, "a", "b", "--redis-url", newest_redis_url, "--namespace", "n:"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: no group a, b is alive in {place}")
    assert ", namespace 'n:'; alive: none; `hortator up FLEET`" in said


def test_only_the_leader_that_was_started_makes_its_group_ready(capsys: pytest.CaptureFixture[str]) -> None:
    leader = Leader(group="echo-0", pid=1, log=Path("log"), born="ours")
    awaited = Awaited(cast(FleetOnHosts, None), {"echo-0": FoundLeader("a", leader)})

    def beat(born: str, state: str = "ready", **info: object) -> dict[str, GroupBeat]:
        told = {"born": born, "pid": 7, "host": "b"} | info
        return {"echo-0": GroupBeat("echo-0", "echo", 0, 8, 1, state, told)}

    awaited.look(beat("another"))
    assert list(awaited.left) == ["echo-0"]
    assert "echo-0 is another process's: pid 7 on b has this name" in capsys.readouterr().err
    awaited.look(beat("ours"))
    assert (awaited.left, awaited.failed) == ({}, False)
    hopeless = Awaited(cast(FleetOnHosts, None), {"echo-0": FoundLeader("a", leader)})
    hopeless.look(beat("ours", "down", last_failure="no such model", given_up=True))
    assert (hopeless.left, hopeless.failed) == ({}, True), "what will not be tried again is not waited for"


def test_lines_of_several_leaders_are_in_the_order_of_time() -> None:
    tails = [
        ["before any time", "[2026-11-24 10:00:01,000: INFO/M] a", "its second line", "[2026-11-24 10:00:03,000: I] c"],
        ["[2026-11-24 10:00:02,000: INFO/M] b"],
    ]
    assert [text[-1] for _, text in merged(tails)] == ["e", "a", "e", "b", "c"]


def test_what_others_start_is_printed_where_psutil_is_not_installed_and_hosts_do_not_resolve(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("no-such-host.invalid slots=2\n")
    (tmp_path / "f.toml").write_text(FLEET.format(redis="redis://localhost/0", max_num_seqs=8))
    script = (
        "import sys; sys.modules['psutil'] = None; from hortator.cli import run;"
        f"raise SystemExit(run(['up', {str(tmp_path / 'f.toml')!r}, '--launcher', 'external']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "on no-such-host.invalid:" in done.stdout

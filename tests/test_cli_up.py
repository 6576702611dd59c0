"""`hortator up`, `restart --fleet`, `logs` and `down --fleet` on this host, with real leaders of one echo rank each."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hortator.cli import run
from hortator.producer.redis_store import RedisStore
from hortator.producer.store import GroupBeat
from hortator.topology.leaders import StateDirectory, birth

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

    def rows(self) -> str:
        """The capacity that the group shows, which tells its settings."""
        self._capture.readouterr()
        assert run(["status", "--redis-url", self.redis, "--json"]) == 0
        return str(json.loads(self._capture.readouterr().out)["groups"][0]["capacity"])


@pytest.fixture
def sh(tmp_path: Path, newest_redis_url: str, capsys: pytest.CaptureFixture[str]) -> Iterator[Shell]:
    shell = Shell(tmp_path, newest_redis_url, capsys)
    yield shell
    StateDirectory(tmp_path / "state").stop("echo-0", patience_s=0.0)


def test_a_fleet_comes_up_takes_new_settings_and_goes_down(sh: Shell) -> None:
    said = sh("up")
    assert "echo-0 starts: pid" in said
    assert "echo-0 is ready" in said
    assert "echo-0 runs already" in sh("up")
    assert sh.rows() == "8"
    before = StateDirectory(sh.directory / "state").look("echo-0").pid
    sh.write(max_num_seqs=12)
    assert "echo-0 is ready" in sh("restart", "--all")
    assert sh.rows() == "12"
    pid = StateDirectory(sh.directory / "state").look("echo-0").pid
    assert pid not in (None, before)
    assert "group echo-0 is ready after" in sh("logs", "-n", "50").split("echo-0 leader 127.0.0.1 | ")[-1]
    assert "echo-0 is down" in sh("down")
    assert birth(pid or 0) == ""
    assert "echo-0" not in sh("down")


def test_a_setting_that_cannot_work_is_told_by_up_itself(sh: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hortator.cli_up.LOOK_EVERY_S", 1.0)
    file = sh.directory / "f.toml"
    file.write_text(file.read_text() + 'engine_typo = "x"\n')
    assert "there is no such key" in sh("up", code=2)
    sh.write(max_num_seqs=8)
    file.write_text(file.read_text().replace('engine = "echo"', 'path = "/no/such/model"'))
    assert re.search("error: echo-0.* ended.*/no/such/model", sh("up", code=1))


def test_a_group_that_is_alive_elsewhere_is_not_started_again(sh: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hortator.cli_up.STRANGER_S", 0.0)
    with RedisStore(sh.redis) as store:
        store.beat(GroupBeat("echo-0", "echo", 0, 8, 1, "ready"))
    assert "echo-0: alive, but not on the host where the plan has it" in sh("up", code=1)
    assert StateDirectory(sh.directory / "state").look("echo-0").pid is None


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

"""`hortator doctor` as a command: a stub stands in for ssh, and the hosts behind it are this one."""

import json
import time
from pathlib import Path

import pytest

from hortator.cli import run
from hortator.topology.probe import HostReport
from tests.topology.reports import report


class Hosts:
    """A stub of ssh: `ssh ... -- HOST COMMAND` prints HOST's report, or does what a test says of that host."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ssh = directory / "ssh"
        self.ssh.write_text(
            "#!/bin/sh\n"
            'while [ "$1" != -- ]; do shift; done\n'
            f'cd {directory}; [ -f "$2" ] && . ./"$2"\n'
            "read -r head < sound\n"
            'exec date "+$head%s.%N}"\n'
        )
        self.ssh.chmod(0o755)
        self.sound(report("10.9.9.9", gpus=()))

    def sound(self, like: HostReport) -> None:
        text = like.model_dump_json(exclude={"clock_s"})
        (self.directory / "sound").write_text(f'{text[:-1]},"clock_s":\n')

    def but(self, host: str, script: str) -> None:
        (self.directory / host).write_text(script)

    def file(self, *hosts: str) -> str:
        path = self.directory / "hostfile"
        path.write_text("".join(f"{host} slots=2\n" for host in hosts))
        return str(path)


@pytest.fixture
def hosts(tmp_path: Path) -> Hosts:
    return Hosts(tmp_path)


def examined(capsys: pytest.CaptureFixture[str], hosts: Hosts, *arguments: str) -> tuple[int, list[str]]:
    code = run(["doctor", "--ssh", str(hosts.ssh), "--device", "cpu", "--no-links", *arguments])
    out, err = capsys.readouterr()
    assert err == ""
    return code, out.splitlines()


def test_a_thousand_hosts_take_seconds(hosts: Hosts, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"10.1.{n // 250}.{n % 250 + 1}" for n in range(1000)]
    for name in names[::100]:
        hosts.but(name, "echo 'Permission denied (publickey).' >&2; exit 255")
    began = time.monotonic()
    code, lines = examined(capsys, hosts, "--hostfile", hosts.file(*names))
    took_s = time.monotonic() - began
    print(f"doctor on 1,000 simulated hosts: {took_s:.1f} s")
    assert took_s < 40
    assert code == 1
    [ssh] = [line for line in lines if "ssh:" in line]
    assert "and 6 more: Permission denied" in ssh


def test_every_check_is_one_line_and_sound_hosts_end_with_zero(
    hosts: Hosts, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = examined(capsys, hosts, "--hostfile", hosts.file("10.1.0.1", "10.1.0.2"))
    assert code == 0
    assert all(line.startswith(("ok  ", "     suggested")) for line in lines[:-1])
    assert lines[-1].startswith("2 hosts in ")


def test_findings_are_json_for_machines(hosts: Hosts, capsys: pytest.CaptureFixture[str]) -> None:
    hosts.but("10.1.0.2", "echo 'Host key verification failed.' >&2; exit 255")
    code, lines = examined(capsys, hosts, "--hostfile", hosts.file("10.1.0.1", "10.1.0.2"), "--json")
    [bad] = [one for one in map(json.loads, lines) if one["grade"] != "ok"]
    assert (code, bad["check"], bad["hosts"]) == (1, "ssh", ["10.1.0.2"])


def test_a_host_that_answers_with_something_else_is_named(hosts: Hosts, capsys: pytest.CaptureFixture[str]) -> None:
    hosts.but("10.1.0.2", "printf 'Welcome\\n\\033[31mto a login shell\\n'; exit 0")
    code, lines = examined(capsys, hosts, "--hostfile", hosts.file("10.1.0.1", "10.1.0.2"))
    assert code == 1
    assert "10.1.0.2: answered with something that is no report" in lines[0]
    assert "\033" not in "".join(lines)


def test_this_host_needs_no_ssh(hosts: Hosts, capsys: pytest.CaptureFixture[str]) -> None:
    hosts.but("127.0.0.1", "exit 9")
    model = Path(__file__).resolve().parents[1] / "demo" / "model"
    code, lines = examined(capsys, hosts, "--hostfile", hosts.file("127.0.0.1"), "--model", str(model))
    assert code == 0
    assert any(line.startswith("ok   model") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "FLEET file or --hostfile"),
        (["--hostfile", "/no/such/file"], "/no/such/file"),
    ],
)
def test_what_cannot_be_read_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1

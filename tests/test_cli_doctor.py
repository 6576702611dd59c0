"""`hortator doctor` as a command: a stub stands in for ssh, and the hosts behind it are this one."""

import json
import time
from pathlib import Path

import pytest
import redis

from hortator.cli import run
from hortator.cli_doctor import redis_of
from hortator.producer.embedded import EmbeddedRedis
from hortator.topology.fleet import parse_fleet
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


def test_the_redis_that_a_fleet_file_does_not_name_is_asked_all_the_same() -> None:
    [address] = redis_of(parse_fleet('[[models]]\nname = "m"\nengine = "echo"\n'))
    assert (address.host, address.port) == ("127.0.0.1", 6379)


def test_a_redis_that_refuses_the_fleets_password_or_would_lose_jobs_is_found_before_the_leaders_find_it(
    hosts: Hosts, capsys: pytest.CaptureFixture[str], redis_servers: dict[str, EmbeddedRedis]
) -> None:
    hosts.file("127.0.0.1")
    fleet = hosts.directory / "fleet.toml"

    def found(url: str) -> tuple[int, str]:
        fleet.write_text(f'redis_url = "{url}"\nhostfile = "hostfile"\n[[models]]\nname = "m"\nengine = "echo"\n')
        code, lines = examined(capsys, hosts, str(fleet))
        return code, next(line for line in lines if "redis itself:" in line)

    with EmbeddedRedis(executable=list(redis_servers.values())[-1].executable) as server:
        assert found(server.url) == (0, "ok   redis itself: lets us in, and loses no job")
        with redis.Redis.from_url(server.url) as admin:
            admin.config_set("maxmemory-policy", "allkeys-lru")
            code, said = found(server.url)
            assert (code, said[:18]) == (1, "FAIL redis itself:")
            assert "maxmemory-policy" in said
            admin.config_set("requirepass", "right")
        code, said = found(server.url.replace("//", "//:s3kret@"))
        assert (code, said[:18]) == (1, "FAIL redis itself:")
        assert "s3kret" not in said


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


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ('[hosts."node-x"]\n', "hosts.node-x: the hostfile has no such host"),
        ('[environment]\nHORTATOR_MAX_NUM_SEQZ = "8"\n', "HORTATOR_MAX_NUM_SEQZ is no setting"),
    ],
)
def test_what_plan_refuses_doctor_refuses_in_the_same_words(
    hosts: Hosts, capsys: pytest.CaptureFixture[str], added: str, said: str
) -> None:
    hosts.file("10.1.0.1")
    fleet = hosts.directory / "fleet.toml"
    fleet.write_text(f'hostfile = "hostfile"\n{added}[[models]]\nname = "m"\nengine = "echo"\n')
    answers = []
    for command in (["plan"], ["doctor", "--ssh", str(hosts.ssh), "--no-links"]):
        answers.append((run([*command, str(fleet)]), capsys.readouterr().err))
    assert answers[0] == answers[1]
    assert answers[0][0] == 2
    assert said in answers[0][1]


def test_each_obstacle_of_ssh_is_a_finding_with_its_own_advice(
    hosts: Hosts, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {
        "10.1.0.2": "ssh: connect to host 10.1.0.2 port 22: Connection timed out",
        "10.1.0.3": "ssh: connect to host 10.1.0.3 port 22: Connection timed out",
        "10.1.0.4": "root@10.1.0.4: Permission denied (publickey).",
        "no-name": "ssh: Could not resolve hostname no-name: Name or service not known",
        "10.1.0.6": "Host key verification failed.",
    }
    for host, words in said.items():
        hosts.but(host, f"echo '{words}' >&2; exit 255")
    _, lines = examined(capsys, hosts, "--hostfile", hosts.file("10.1.0.1", *said))
    assert [line for line in lines if " ssh: " in line] == [
        f"FAIL ssh: 10.1.0.2, 10.1.0.3: {said['10.1.0.2']}  -> is the host up (ping 10.1.0.2)? Does a firewall stand"
        " between? If it is slow: connect_timeout_s under [ssh]",
        f"FAIL ssh: 10.1.0.4: {said['10.1.0.4']}  -> put your public key into authorized_keys there"
        " (ssh-copy-id 10.1.0.4), or name user and identity_file under [ssh]",
        f"FAIL ssh: no-name: {said['no-name']}  -> correct the name in the hostfile, or make it known to the resolver"
        " (/etc/hosts, DNS)",
        f"FAIL ssh: 10.1.0.6: {said['10.1.0.6']}  -> check the host's key and accept it once: ssh 10.1.0.6 true",
    ]

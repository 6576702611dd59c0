"""What is run to reach another host: an argument list, and no word in it that a user could turn into a command."""

import shlex
import sys
import time
from pathlib import Path

import pytest

from hortator.topology.deepspeed import deepspeed_command, deepspeed_environment, hostfile_of
from hortator.topology.errors import BadPlacement, CannotStart
from hortator.topology.placement import Node, read_nodes, shares
from hortator.topology.ssh import SshOptions, SshStarter, keeper_command
from hortator.topology.vitals import Cause

NODES = read_nodes('[{"host": "a", "devices": [0]}, {"host": "b", "devices": [2, 3]}]')


def test_the_remote_command_is_fixed_words_and_a_checked_python() -> None:
    command = keeper_command("nodeB", SshOptions(user="me", port=2222, identity_file=Path("/home/me/my key")))
    end = command.index("--")
    assert command[end + 1 :] == ("nodeB", sys.executable, "-m", "hortator.topology.keeper", "--stdin")
    assert "BatchMode=yes" in command
    assert "ConnectTimeout=5" in command
    assert "ConnectTimeout=30" in keeper_command("nodeB", SshOptions(connect_timeout_s=30))
    assert 'IdentityFile="/home/me/my key"' in command
    assert command[command.index("-p") + 1] == "2222"
    assert command[command.index("-l") + 1] == "me"


@pytest.mark.parametrize("host", ["-oProxyCommand=reboot", "a b", "a;reboot", "$(reboot)", "me@host"])
def test_a_host_that_is_no_name_never_reaches_ssh(host: str) -> None:
    with pytest.raises(BadPlacement):
        keeper_command(host, SshOptions())


@pytest.mark.parametrize("python", ["python; reboot", "$(reboot)", "-c", "a b", "`x`", ""])
def test_a_python_that_a_shell_would_read_otherwise_is_refused(python: str) -> None:
    with pytest.raises(CannotStart, match="remote_python"):
        SshOptions(python=python)


@pytest.mark.parametrize("user", ["-l", "a b", "x;y", "", "u" * 42])
def test_a_user_that_is_no_name_is_refused(user: str) -> None:
    with pytest.raises(CannotStart, match="ssh_user"):
        SshOptions(user=user)


@pytest.mark.parametrize("name", ['a"b', "a'b", "a\\b", "${HOME}", "%h", "a\nb"])
def test_a_path_that_ssh_could_misread_is_refused(name: str) -> None:
    with pytest.raises(CannotStart, match="quotes"):
        keeper_command("a", SshOptions(known_hosts_file=Path("/tmp") / name))


def test_a_host_that_cannot_be_reached_is_named_with_what_ssh_says() -> None:
    starter = SshStarter(SshOptions(port=1))
    nodes = (Node("localhost", (0,)), Node("127.0.0.1", (0,)))
    starter.start(shares(nodes), address=("127.0.0.1", 1), key=bytes(32), on_line=lambda *_: None)
    try:
        until = time.monotonic() + 10
        while not (troubles := starter.troubles()):
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        starter.stop(lost=True)
    (trouble,) = troubles
    assert (trouble.ranks, trouble.cause) == ((1,), Cause.GONE)
    assert trouble.message.startswith("ssh to 127.0.0.1 (rank 1) ended: ")
    assert "port 1" in trouble.message


def test_the_hostfile_has_slots_for_the_highest_device() -> None:
    assert hostfile_of(shares(NODES)) == "a slots=1\nb slots=4\n"


def test_deepspeeds_command_picks_the_devices_and_holds_no_secret(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    command = deepspeed_command(
        shares(NODES), hostfile=tmp_path / "hostfile", address=("a", 4700), secret_file=secret, token="0f"
    )
    assert command[command.index("--include") + 1] == "a:0@b:2,3"
    assert command[command.index("--join") + 1] == "a:4700"
    assert command[command.index("--secret-file") + 1] == str(secret)
    assert shlex.join(command[3:]) == " ".join(command[3:]), "no word that a remote shell would read otherwise"


def test_deepspeed_is_refused_where_a_path_would_break_its_remote_command(tmp_path: Path) -> None:
    with pytest.raises(CannotStart, match="must be a path"):
        deepspeed_command(
            shares(NODES), hostfile=tmp_path, address=("a", 1), secret_file=Path("/a b/secret"), token="0f"
        )


def test_deepspeed_is_refused_where_a_host_has_an_address_with_colons(tmp_path: Path) -> None:
    nodes = read_nodes("a:1,[fd00::4]:1")
    with pytest.raises(CannotStart, match="cannot reach fd00::4, an IPv6 address: use launcher=ssh, or names"):
        deepspeed_command(shares(nodes), hostfile=tmp_path, address=("a", 1), secret_file=Path("/s"), token="0f")


def test_deepspeed_without_pdsh_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotStart, match="needs pdsh"):
        deepspeed_environment({}, SshOptions())

"""Starting and ending ranks on this host; here a rank is any command."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from hortator.topology.launch import MAX_LINE_BYTES, LocalLauncher, RankCommand, describe_exit
from tests.topology.fake_launcher import FakeLauncher

Lines = list[tuple[int, str]]


@pytest.fixture
def launcher() -> Iterator[LocalLauncher]:
    launcher = LocalLauncher()
    yield launcher
    launcher.kill()


def python(rank: int, code: str, **env: str) -> RankCommand:
    return RankCommand(rank, (sys.executable, "-c", code), {"PATH": os.environ["PATH"]} | env)


def wait(probe: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not probe():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_what_ranks_print_arrives_line_by_line_with_their_number(launcher: LocalLauncher) -> None:
    lines: Lines = []
    code = "import sys; print('one\\ntwo'); print('err', file=sys.stderr); sys.stdout.write('no newline')"
    launcher.launch([python(0, code), python(1, "print('three')")], on_line=lambda *line: lines.append(line))
    wait(lambda: len(lines) == 5)
    assert {line for line in lines if line[0] == 0} == {(0, "one"), (0, "two"), (0, "err"), (0, "no newline")}
    assert (1, "three") in lines


def test_an_endless_line_is_cut(launcher: LocalLauncher) -> None:
    lines: Lines = []
    code = f"import sys, time; sys.stdout.write('x' * {3 * MAX_LINE_BYTES}); sys.stdout.flush(); time.sleep(60)"
    launcher.launch([python(0, code)], on_line=lambda *line: lines.append(line))
    wait(lambda: sum(len(text) for _, text in lines) > MAX_LINE_BYTES)


def test_bytes_that_are_no_text_do_not_end_the_reading(launcher: LocalLauncher) -> None:
    lines: Lines = []
    code = "import sys; sys.stdout.buffer.write(b'\\xff\\xfe\\nafter\\n')"
    launcher.launch([python(0, code)], on_line=lambda *line: lines.append(line))
    wait(lambda: (0, "after") in lines)


def test_exits_tell_code_and_signal_and_keep_the_pid_until_kill(launcher: LocalLauncher) -> None:
    codes = ["raise SystemExit(78)", "import os; os.abort()", "import time; time.sleep(60)"]
    launcher.launch([python(rank, code) for rank, code in enumerate(codes)], on_line=lambda *_: None)
    wait(lambda: len(launcher.exits()) == 2)
    assert launcher.exits() == {0: 78, 1: -6}
    assert psutil.Process(launcher.pids[0]).status() == psutil.STATUS_ZOMBIE


def test_kill_ends_stopped_ranks_and_what_they_started(launcher: LocalLauncher, tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"name = {str(child)!r}\n"
        "open(name + '.new', 'w').write(str(child.pid))\n"
        "os.rename(name + '.new', name)\n"
        "os.kill(os.getpid(), signal.SIGSTOP)\n"
    )
    launcher.launch([python(0, code)], on_line=lambda *_: None)
    wait(child.exists)
    pids = [launcher.pids[0], int(child.read_text())]
    started = time.monotonic()
    launcher.kill()
    wait(lambda: all(gone(pid) for pid in pids), timeout_s=1.0)
    assert time.monotonic() - started < 1.0


def test_a_rank_gets_only_the_environment_and_descriptors_that_it_was_given(launcher: LocalLauncher) -> None:
    lines: Lines = []
    read, write = os.pipe()
    other, another = os.pipe()
    try:
        code = f"import os; os.write({write}, os.environ['KEY'].encode()); print(os.listdir('/proc/self/fd'))"
        command = RankCommand(0, (sys.executable, "-c", code), {"KEY": "secret"}, pass_fds=(write,))
        launcher.launch([command], on_line=lambda *line: lines.append(line))
        assert os.read(read, 100) == b"secret"
        wait(lambda: bool(lines))
        assert str(other) not in lines[0][1].strip("[]").split(", ")
    finally:
        for fd in (read, write, other, another):
            os.close(fd)


def test_a_command_that_does_not_exist_is_an_error_and_leaves_no_rank(launcher: LocalLauncher) -> None:
    commands = [python(0, "import time; time.sleep(60)"), RankCommand(1, ("/no/such/program",), {})]
    with pytest.raises(FileNotFoundError):
        launcher.launch(commands, on_line=lambda *_: None)
    (pid,) = launcher.pids.values()
    launcher.kill()
    assert gone(pid)


def test_kill_without_a_launch_is_harmless() -> None:
    LocalLauncher().kill()


def test_the_fake_remembers_commands_and_ends_ranks_on_demand() -> None:
    fake = FakeLauncher()
    fake.launch([python(0, ""), python(1, "")], on_line=lambda *_: None)
    fake.end(1, -9)
    assert [command.rank for command in fake.launches[0]] == [0, 1]
    assert fake.exits() == {1: -9}
    fake.launch([python(0, "")], on_line=lambda *_: None)
    assert fake.exits() == {}


@pytest.mark.parametrize(
    ("returncode", "words"), [(0, "exited with 0"), (-9, "was killed by SIGKILL"), (-250, "was killed by signal 250")]
)
def test_an_exit_in_words(returncode: int, words: str) -> None:
    assert describe_exit(returncode) == words

"""Leaders on their host: started detached, found again, ended.  Any command will do for a leader here."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hortator.topology.errors import CannotStart
from hortator.topology.leaders import Order, Seat, StateDirectory, birth

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StateDirectory]:
    monkeypatch.setattr("hortator.topology.leaders.LOOK_S", 0.2)
    made = StateDirectory(tmp_path / "fleet", "redis://a:6379/0 namespace=x:")
    made.directory.mkdir()
    yield made
    if (pid := made.look("g").pid) is not None:
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two interpreters start one after the other, on a machine that does other things as well."""
    monkeypatch.setattr("hortator.topology.leaders.LOOK_S", 10.0)


def order(code: str, **environment: str) -> Order:
    return Order(group="g", argv=(sys.executable, "-c", code), environment=environment)


def test_a_leader_outlives_whoever_started_it_and_is_found_again(tmp_path: Path, state: StateDirectory) -> None:
    script = (
        "import sys; from pathlib import Path; from hortator.topology.leaders import *;"
        "print(StateDirectory(Path(sys.argv[1]), sys.argv[2])"
        ".start(Order(group='g', argv=('sleep', '60'), environment={})).pid)"
    )
    started = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "fleet"), state.fleet], capture_output=True, text=True, check=True
    )
    assert state.look("g").pid == int(started.stdout)


def test_a_group_that_runs_is_not_started_twice(state: StateDirectory) -> None:
    first = state.start(order("import time; time.sleep(60)"))
    again = state.start(order("import time; time.sleep(60)"))
    assert (first.fresh, again.fresh, again.pid) == (True, False, first.pid)


def test_one_that_ends_at_once_is_an_error_with_its_last_words(state: StateDirectory, patient: None) -> None:
    with pytest.raises(CannotStart, match="ended at once with 78: hortator: model_path is not set"):
        state.start(order("import sys; print('hortator: model_path is not set'); sys.exit(78)"))
    assert state.look("g").pid is None


def test_a_full_disk_is_told_before_anything_starts_and_nothing_of_the_try_is_left(
    state: StateDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path, _: str) -> None:
        file.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as filled:
        filled.setattr(Path, "write_text", full)
        with pytest.raises(CannotStart, match="cannot be written: No space left on device"):
            state.check()
    assert list(state.directory.iterdir()) == []
    state.check()
    assert [file.name for file in state.directory.iterdir()] == ["fleet"]


def test_orders_are_alike_whatever_the_password_of_redis() -> None:
    one, two, three = (
        order("x", HORTATOR_REDIS_URL=url, A=a).settings for url, a in (("u", "1"), ("v", "1"), ("u", "2"))
    )
    assert one == two != three


def test_a_later_process_of_the_same_number_is_not_taken_for_the_leader(state: StateDirectory) -> None:
    state.directory.joinpath("g.json").write_text(f'{{"pid": {os.getpid()}, "born": "another boot:1"}}')
    assert state.look("g").pid is None
    assert state.stop("g", patience_s=1) is False


def test_one_that_ignores_sigterm_is_killed_when_the_patience_is_over(state: StateDirectory) -> None:
    pid = state.start(order(STUBBORN)).pid
    assert pid is not None
    while state.tail("g", 1) != ["up"]:
        time.sleep(0.02)
    assert state.stop("g", patience_s=0.3, born="another boot:1") is False, "only the process that is meant"
    assert birth(pid) != ""
    began = time.monotonic()
    assert state.stop("g", patience_s=0.3) is True
    assert 0.3 <= time.monotonic() - began < 3
    assert birth(pid) == ""


def test_what_it_is_told_is_in_its_environment_and_on_no_disk(state: StateDirectory) -> None:
    state.start(order("import os, time; print(os.environ['SEKRET'][:2], flush=True); time.sleep(60)", SEKRET="s3kret"))
    while not state.tail("g", 5):
        time.sleep(0.02)
    assert state.tail("g", 5) == ["s3"]
    assert not any("s3kret" in file.read_text() for file in state.directory.iterdir())
    assert {oct(file.stat().st_mode & 0o077) for file in state.directory.glob("*.log")} == {"0o0"}


def test_settings_of_the_shell_that_starts_it_are_not_a_leaders(
    state: StateDirectory, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HORTATOR_LEASE_S", "77")
    monkeypatch.setenv("hortator_grace_s", "77")
    told = "import os, sys; print({n: v for n, v in os.environ.items() if 'HORTATOR' in n.upper()}); sys.exit(1)"
    with pytest.raises(CannotStart, match=r"\{'HORTATOR_GROUP': 'g'\}"):
        state.start(order(told, HORTATOR_GROUP="g"))


def test_a_log_is_followed_over_its_rotation(state: StateDirectory) -> None:
    log = state.log("g")
    lines = state.follow("g")
    assert next(lines) == ""
    with log.open("a") as file:
        file.write("one\ntw")
    assert next(line for line in lines if line) == "one"
    log.rename(log.with_suffix(".1"))
    log.write_text("three\n")
    assert next(line for line in lines if line) == "three"


@pytest.mark.parametrize("name", ["../x", "a/b", "-x", "", "a b"])
def test_a_group_is_no_path(name: str) -> None:
    with pytest.raises(ValueError, match="group"):
        Order(group=name, argv=("true",), environment={})


def test_the_directory_of_another_fleet_is_refused_and_its_leaders_are_not_taken_for_ours(
    state: StateDirectory,
) -> None:
    state.start(order("import time; time.sleep(60)"))
    with pytest.raises(CannotStart, match=r"the directory of another fleet \(redis://a:6379/0 namespace=x:\)"):
        StateDirectory(state.directory, "redis://a:6379/0 namespace=y:")


def test_where_the_ranks_are_is_remembered_also_of_a_leader_that_has_ended(state: StateDirectory) -> None:
    seats = (Seat(host="a", devices=(2, 3)),)
    started = state.start(order("import time; time.sleep(60)").model_copy(update={"seats": seats, "model": "m"}))
    assert state.stop("g", patience_s=1)
    [found] = state.leaders()
    assert (found.pid, found.born, found.model, found.seats) == (None, started.born, "m", seats)


def test_the_last_words_of_a_leader_are_its_complaint_not_its_farewell(state: StateDirectory, patient: None) -> None:
    with pytest.raises(CannotStart, match=r"CRITICAL/MainProcess\] group g is led by pid 7"):
        state.start(order("print('[x: CRITICAL/MainProcess] group g is led by pid 7\\n[x: INFO/MainProcess] drained')"))


def test_the_last_words_of_a_leader_are_its_own_not_those_of_a_rank(state: StateDirectory, patient: None) -> None:
    with pytest.raises(CannotStart, match="told to stop"):
        state.start(order("print('[x: INFO/MainProcess] told to stop\\n[x: INFO/MainProcess] [rank 1] a warning')"))


STARTS_AGAIN = """
import os, signal, sys, time
if sys.argv[1:]:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print("again", flush=True)
else:
    signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), os.execv(sys.executable, [*sys.orig_argv, "again"])))
    print("up", flush=True)
time.sleep(60)
"""


def test_a_leader_that_starts_itself_anew_when_it_is_ended_is_told_again(state: StateDirectory) -> None:
    state.start(order(STARTS_AGAIN))
    began = time.monotonic()
    assert state.stop("g", patience_s=30) is True
    assert time.monotonic() - began < 15


def test_a_leader_that_cannot_be_recorded_is_not_begun(state: StateDirectory, tmp_path: Path) -> None:
    state.directory.mkdir(exist_ok=True)
    state.directory.joinpath("g.json.new").mkdir()
    begun = tmp_path / "begun"
    with pytest.raises(CannotStart, match=r"group g is not started: .*/g\.json\.new: Is a directory"):
        state.start(Order(group="g", argv=("touch", str(begun)), environment={}))
    assert not begun.exists()
    assert state.look("g").pid is None


def test_a_program_that_is_not_there_is_an_error_that_names_it(state: StateDirectory, patient: None) -> None:
    with pytest.raises(CannotStart, match="ended at once with 127: hortator: cannot start /no/such: No such file"):
        state.start(Order(group="g", argv=("/no/such",), environment={}))


def test_a_record_without_a_birth_is_no_living_leader(state: StateDirectory) -> None:
    state.directory.joinpath("g.json").write_text('{"pid": 4194304, "born": ""}')
    assert state.look("g").pid is None

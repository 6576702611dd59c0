"""Operating a fleet: drain, resume, rolling restart and stop of real groups under load, over Redis alone."""

import os
import re
import signal
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from hortator.cli import run
from hortator.producer.schema import State
from tests.together.fleet import Fleet, alive, assert_all_right, wait_for

TOKENS = 80  # 1.6 s of generation, more than the grace


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with Fleet(tmp_path_factory.mktemp("fleet")) as running:
        yield running


@pytest.fixture
def two(shared: Fleet, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    """Two groups of one model, each of one rank, both ready and idle; and a shell that knows their Redis."""
    monkeypatch.setenv("HORTATOR_REDIS_URL", shared.redis.url)
    shared.workers = [worker for worker in shared.workers if worker.process.poll() is None]
    for name in {"one", "two"} - {worker.group for worker in shared.workers}:
        shared.worker(name, tensor_parallel_size=1, grace_s=0.7, max_num_seqs=8, restart_backoff_s=2)
    shared.workers.sort(key=lambda worker: worker.group)
    for worker in shared.workers:
        worker.ready()
    return shared


def operate(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    code = run(arguments)
    out, err = capsys.readouterr()
    assert (code, err) == (0, ""), err
    return out


def ask(fleet: Fleet, number: int, tokens: int = TOKENS) -> dict[str, str]:
    prompts = [f"job {n} of a rolling restart;" for n in range(number)]
    return dict(zip(fleet.enqueue(prompts, max_tokens=tokens), prompts, strict=True))


def test_a_rolling_restart_under_load_loses_no_job_and_charges_none(
    two: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    pids = [worker.pid for worker in two.workers]
    ranks = [rank for worker in two.workers for rank in worker.ranks()]
    asked = ask(two, 40)
    two.progressed(list(asked)[:8])
    lines = operate(capsys, "restart", "--all").splitlines()
    assert [line.split(" is ready again")[0] for line in lines] == ["one", "two"]
    asked |= ask(two, 4)
    done = two.finished(list(asked))
    assert_all_right(done, asked, TOKENS)
    handed_back = sum(
        " jobs handed back" in line and " 0 jobs" not in line
        for w in two.workers
        for line in w.tail(20_000).splitlines()
    )
    assert handed_back, "the load was too light: nothing had to be handed back"
    assert {status.attempt for status in done.values()} == {1}, "what was handed back is not charged"
    assert not any(map(alive, ranks)), "ranks of the former lives are gone"
    assert [worker.pid for worker in two.workers if worker.process.poll() is None] == pids


def test_a_restart_waits_for_a_redis_that_is_away_for_a_while(two: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    def away() -> None:
        wait_for("the restart is under way", lambda: "told to restart" in two.workers[0].log.read_text()[before:])
        two.redis.pause()
        time.sleep(3.0)
        two.redis.resume()

    before = len(two.workers[0].log.read_text())
    nuisance = threading.Thread(target=away)
    nuisance.start()
    try:
        assert operate(capsys, "restart", "one").startswith("one is ready again after")
    finally:
        nuisance.join()


def test_a_drained_group_hands_back_what_outlasts_its_grace_and_stays_up(
    two: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    assert operate(capsys, "drain", "two") == "two is drained\n"
    asked = ask(two, 6, 2 * TOKENS)
    two.progressed(list(asked))
    assert operate(capsys, "drain", "one") == "one is drained\n"
    left = [status for status in two.store.statuses(list(asked)) if status is not None]
    assert {status.state for status in left} == {State.QUEUED}
    assert all(5 <= status.num_tokens < 2 * TOKENS for status in left)
    assert "jobs wait: one, two drain and take nothing" in operate(capsys, "status")
    operate(capsys, "resume", "two")
    done = two.finished(list(asked))
    assert_all_right(done, asked, 2 * TOKENS)
    assert {status.attempt for status in done.values()} == {1}, "what was handed back is not charged"
    assert "one    echo   drained" in operate(capsys, "status")
    operate(capsys, "resume", "one")
    assert run(["drain", "three"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: no group three is alive in {two.redis.url.removesuffix('/')}")
    assert said.endswith(", no namespace; alive: one, two; `hortator up FLEET` starts one that is not\n")
    assert run(["restart"]) == 2


def test_a_group_that_is_down_says_why_and_its_jobs_run_elsewhere_within_five_seconds(
    two: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = two.workers
    operate(capsys, "drain", "two")
    asked = ask(two, 4)
    two.progressed(list(asked))
    operate(capsys, "resume", "two")
    [rank] = one.ranks()
    began = time.monotonic()
    os.kill(rank, signal.SIGKILL)

    def taken_over() -> bool:
        return all(status.attempt == 2 for status in two.store.statuses(list(asked)) if status)

    wait_for("its jobs run elsewhere", taken_over, 5.0)
    print(f"all jobs of the killed group ran elsewhere after {time.monotonic() - began:.1f} s")
    assert_all_right(two.finished(list(asked)), asked, TOKENS)
    for group in (one, other):
        [rank] = group.ready().ranks()
        os.kill(rank, signal.SIGKILL)
    wait_for("both say that they are down", lambda: {b.state for g in two.workers if (b := g.beat())} == {"down"})
    shown = operate(capsys, "status")
    assert "jobs would wait: no group is ready: one is down: rank 0" in shown
    assert re.search(r"two: went down \d{4}-.* \(epoch \d+\): rank 0", shown)
    assert shown.count("SIGKILL") >= 2


def test_down_ends_every_group_at_once_and_leaves_no_process(two: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    mine = [psutil.Process(pid) for worker in two.workers for pid in (worker.pid, *worker.ranks())]
    asked = ask(two, 40)
    two.progressed(list(asked)[:8])
    began = time.monotonic()
    assert sorted(operate(capsys, "down", "--all").splitlines()) == ["one is down", "two is down"]
    assert time.monotonic() - began < 5, "in parallel, and nobody waits for a beat to grow old"
    assert [worker.wait(10) for worker in two.workers] == [0, 0]
    assert not any(map(alive, (process.pid for process in mine)))
    assert "no group is alive: start one" in operate(capsys, "status")
    states = [status for status in two.store.statuses(list(asked)) if status is not None]
    assert {status.state for status in states} <= {State.QUEUED, State.SUCCEEDED}
    assert max(status.attempt for status in states) <= 1

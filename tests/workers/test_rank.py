"""A rank's own parts: its configuration, its loops (ranks as threads over the in-process channel), how it gives up."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, cast

import pytest

from hortator.producer.errors import ConfigError
from hortator.topology.errors import LeaderLost, MeshFailed, PortTaken, Refused
from hortator.topology.tether import ControlClient
from hortator.workers import stroke
from hortator.workers.engine.echo import EchoEngine
from hortator.workers.engine.step import EngineInfo, Request, SamplingParams, StepPlan
from hortator.workers.lockstep import CollectiveFailed, Follower, InProcessChannel, LockstepError
from hortator.workers.pipe import Message, Pipe, PipeBroken, read_report, submissions
from hortator.workers.rank import (
    CONFIG_VARIABLE,
    Exit,
    RankConfig,
    _kind_of,
    describe,
    fingerprint_of,
    load_engine,
    read_description,
)
from hortator.workers.stroke import LINGER_S, MOST_UNTOLD_STEPS, Leader, Peer, most_untold_steps

CONFIG: dict[str, Any] = {
    "rank": 0,
    "epoch": 1,
    "control_host": "127.0.0.1",
    "control_port": 1,
    "control_key": "ab" * 32,
    "heartbeat_s": 1.0,
    "heartbeat_timeout_s": 3.0,
    "stall_timeout_s": 5.0,
    "start_timeout_s": 60.0,
    "collective_timeout_s": 60.0,
    "engine": "echo",
}


class FakeControl:
    """The control connection of all ranks at once: WAKE reaches the peers, the rest is written down."""

    def __init__(self, *peers: "FakeControl") -> None:
        self._peers = peers
        self._wakes = threading.Semaphore(0)
        self.busy = False
        self.step = 0
        self.wakes = 0

    def wake(self) -> None:
        self.wakes += 1
        for peer in self._peers:
            peer._wakes.release()

    def wait_wake(self) -> None:
        self._wakes.acquire()

    def as_client(self) -> ControlClient:
        return cast(ControlClient, self)


class Recorder(EchoEngine):
    """Keeps the plans that it was given."""

    def __init__(self, max_num_seqs: int) -> None:
        super().__init__(max_num_seqs=max_num_seqs, tokens_per_step=1)
        self.plans: list[StepPlan] = []

    def apply(self, plan: StepPlan) -> int:
        self.plans.append(plan)
        return super().apply(plan)


class Ranks:
    """A leader and a peer, each a thread, and the front's end of the pipe."""

    def __init__(self, max_num_seqs: int = 64, most_untold_steps: int = MOST_UNTOLD_STEPS) -> None:
        ours, theirs = socket.socketpair()
        self.front, self.pipe = Pipe(ours), Pipe(theirs)
        channel = InProcessChannel()
        self.engines = [Recorder(max_num_seqs), Recorder(max_num_seqs)]
        self.peer_control = FakeControl()
        self.control = FakeControl(self.peer_control)
        self.errors: list[Exception] = []
        peer_channel = channel.peer()
        control = self.control.as_client()
        leader = Leader(self.engines[0], channel, control, self.pipe, epoch=1, most_untold_steps=most_untold_steps)
        follower = Follower(rank=1, epoch=1)
        peer = Peer(self.engines[1], peer_channel, self.peer_control.as_client(), follower)
        self.leader_thread = threading.Thread(target=self._guard(leader.run), daemon=True)
        self.leader_thread.start()
        threading.Thread(target=self._guard(peer.run), daemon=True).start()

    def _guard(self, run: Callable[[], None]) -> Callable[[], None]:
        def guarded() -> None:
            try:
                run()
            except Exception as error:
                self.errors.append(error)

        return guarded

    def submit(self, *prompts: bytes, cancel: tuple[int, ...] = (), max_tokens: int = 3, first: int = 0) -> None:
        params = SamplingParams(max_tokens=max_tokens)
        requests = [Request(n, tuple(prompt), params) for n, prompt in enumerate(prompts, first)]
        for message in submissions(requests, cancel):
            self.front.send(message)

    def await_joined(self, handle: int) -> None:
        """Until a plan has brought this request."""
        deadline = time.monotonic() + 5
        while not any(request.handle == handle for plan in list(self.engines[0].plans) for request in plan.admit):
            assert time.monotonic() < deadline, self.errors
            time.sleep(0.001)

    def until_idle(self) -> list[Message]:
        messages: list[Message] = []
        deadline = time.monotonic() + 5
        while not (messages and messages[-1]["idle"]):
            assert time.monotonic() < deadline, (messages, self.errors)
            messages += self.front.receive()
            time.sleep(0.001)
        return messages

    def close(self) -> None:
        self.front.close()
        self.leader_thread.join(5)
        self.pipe.close()


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture
def full_ranks() -> Iterator[Ranks]:
    """Two jobs fill them."""
    ranks = Ranks(max_num_seqs=2)
    yield ranks
    ranks.close()


def test_all_ranks_apply_the_same_plans_and_the_leader_reports(ranks: Ranks) -> None:
    ranks.submit(b"abc", b"xyz")
    reports = [read_report(message) for message in ranks.until_idle()]
    said = {
        handle: bytes(i for report in reports for gain in report.gains if gain.handle == handle for i in gain.token_ids)
        for handle in (0, 1)
    }
    assert said == {0: b"abc", 1: b"xyz"}
    assert [report.step for report in reports] == [1, 2, 3]
    time.sleep(0.05)
    assert ranks.engines[0].plans == ranks.engines[1].plans
    assert ranks.errors == []


def test_a_full_group_tells_of_several_steps_at_once_and_loses_none(full_ranks: Ranks) -> None:
    full_ranks.submit(b"abc", b"xyz", max_tokens=50)
    reports = [read_report(message) for message in full_ranks.until_idle()]
    for handle, prompt in ((0, b"abc"), (1, b"xyz")):
        said = bytes(i for report in reports for gain in report.gains if gain.handle == handle for i in gain.token_ids)
        assert said == (prompt * 17)[:50]
    assert len(reports) < 25
    assert sum(len(report.finished) for report in reports) == 2


@pytest.mark.parametrize(("probation_tokens", "most"), [(1, 1), (2, 1), (4, 3), (8, MOST_UNTOLD_STEPS)])
def test_a_full_group_leaves_fewer_steps_untold_than_a_suspect_must_pass(
    probation_tokens: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stroke, "REPORT_EVERY_S", 60.0)
    ranks = Ranks(max_num_seqs=2, most_untold_steps=most_untold_steps(probation_tokens))
    ranks.submit(b"abc", b"xyz", max_tokens=60)
    told = [read_report(message).step for message in ranks.until_idle()]
    ranks.close()
    assert max(after - before for before, after in pairwise(told)) == most


def test_ends_wait_for_the_next_report_while_others_wait_for_their_rows(
    full_ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stroke, "REPORT_EVERY_S", 60.0)
    full_ranks.submit(*[b"a"] * 40, max_tokens=1)
    reports = [read_report(message) for message in full_ranks.until_idle()]
    assert sum(len(report.finished) for report in reports) == 40
    assert len(reports) <= 20 // MOST_UNTOLD_STEPS + 3, "twenty steps, in each of which two of them end"


def test_who_joins_a_group_in_which_others_wait_for_a_row_makes_no_report_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stroke, "REPORT_EVERY_S", 60.0)
    ranks = Ranks(max_num_seqs=2, most_untold_steps=10**6)
    ranks.submit(b"a", b"b", b"c", max_tokens=10**6)
    for handle in range(3, 13):
        ranks.submit(b"x", max_tokens=1, first=handle)
        ranks.await_joined(handle)
    ranks.submit(cancel=(0, 1, 2))
    reports = [read_report(message) for message in ranks.until_idle()]
    ranks.close()
    assert sum(len(report.finished) for report in reports) == 10, "those cancelled get no word"
    assert len(reports) <= 5, "not one for each of the ten"


def test_an_idle_group_parks_and_is_woken_by_the_next_submission(ranks: Ranks) -> None:
    for expected in (1, 2):
        ranks.submit(b"abc")
        ranks.until_idle()
        time.sleep(5 * LINGER_S)
        assert not ranks.control.busy
        assert not ranks.peer_control.busy
        assert ranks.control.wakes == expected


def test_a_submission_right_after_the_last_needs_no_wake(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stroke, "LINGER_S", 5.0)
    for _ in range(5):
        ranks.submit(b"abc")
        ranks.until_idle()
    assert ranks.control.wakes == 1


def test_steps_in_which_nothing_happens_are_not_reported() -> None:
    left, right = socket.socketpair()
    engine = EchoEngine(latency_s=0.2)
    leader = Leader(engine, InProcessChannel(), FakeControl().as_client(), Pipe(left), epoch=1)

    def lead() -> None:
        with pytest.raises(PipeBroken):
            leader.run()

    thread = threading.Thread(target=lead)
    thread.start()
    front = Pipe(right)
    for message in submissions([Request(1, (1,), SamplingParams(max_tokens=1))], []):
        front.send(message)
    messages: list[Message] = []
    until = time.monotonic() + 20
    while len(messages) < 2 or engine.progress <= 20:
        assert time.monotonic() < until
        time.sleep(0.01)
        messages += front.receive()
    front.close()
    thread.join(5)
    left.close()
    assert len(messages) == 2  # the admission, and the token


def test_the_end_of_the_pipe_ends_the_leader(ranks: Ranks) -> None:
    ranks.front.close()
    ranks.leader_thread.join(5)
    assert [type(error) for error in ranks.errors] == [PipeBroken]


def test_a_peer_that_derives_something_else_says_so(ranks: Ranks) -> None:
    ranks.engines[1].apply(StepPlan(99))
    ranks.submit(b"abc")
    deadline = time.monotonic() + 5
    while not ranks.errors and time.monotonic() < deadline:
        time.sleep(0.01)
    assert isinstance(ranks.errors[0], LockstepError)
    assert "rank 1 disagrees with the leader at step 1" in ranks.errors[0].message


# --- what a rank says of itself


def test_the_fingerprint_covers_what_ranks_must_share_and_nothing_else() -> None:
    one = fingerprint_of(RankConfig(**CONFIG))
    assert one == fingerprint_of(RankConfig(**CONFIG | {"control_port": 2, "local_rank": 1}))
    assert one != fingerprint_of(RankConfig(**CONFIG | {"max_num_seqs": 7}))
    assert one["hortator"]


def test_limits_travel_as_they_are() -> None:
    info = EngineInfo(8, 64, 256, 512, (1, 2), {"a": "b"})
    assert read_description(json.loads(json.dumps(describe(info)))) == info


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), Exit.CONFIG),
        (PortTaken("x"), Exit.CONFIG),
        (Refused("x"), Exit.CONFIG),
        (LockstepError("x"), Exit.LOCKSTEP),
        (LeaderLost("x"), Exit.LEADER_LOST),
        (PipeBroken("x"), Exit.LEADER_LOST),
        (CollectiveFailed("x"), Exit.COLLECTIVE),
        (MeshFailed("x"), Exit.COLLECTIVE),
        (RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer"), Exit.COLLECTIVE),
        (RuntimeError("a bug"), Exit.CRASH),
        (ZeroDivisionError(), Exit.CRASH),
    ],
)
def test_the_exit_code_tells_cause_from_consequence(error: Exception, code: Exit) -> None:
    assert _kind_of(error)[0] is code


@pytest.mark.parametrize("engine", ["no.such.module:f", "json:no_such_thing"])
def test_an_engine_that_does_not_exist_is_a_configuration_error(engine: str) -> None:
    from hortator.topology.mesh import join

    with pytest.raises(ConfigError, match=f"engine={engine}"):
        load_engine(RankConfig(**CONFIG | {"engine": engine}), join(rank=0, tp_size=1, device="cpu"))


def test_the_key_is_not_in_the_repr_of_a_configuration() -> None:
    assert CONFIG["control_key"] not in repr(RankConfig(**CONFIG))


# --- the command


def run(config: dict[str, Any], **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "hortator.workers.rank"],
        env=os.environ | {CONFIG_VARIABLE: json.dumps(config)} | env,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_a_rank_without_a_usable_configuration_says_what_is_wrong_in_one_line() -> None:
    done = run(CONFIG | {"rank": "first", "nonsense": 1})
    assert done.returncode == Exit.CONFIG
    assert done.stderr == "hortator: HORTATOR_RANK_CONFIG is not a rank's configuration: rank, nonsense\n"


def test_a_rank_whose_front_is_not_there_ends() -> None:
    done = run(CONFIG)
    assert done.returncode == Exit.LEADER_LOST
    assert "no control connection to the front at 127.0.0.1:1" in done.stderr


def test_a_rank_whose_parent_is_already_gone_ends_before_anything_else() -> None:
    done = run(CONFIG, HORTATOR_PARENT_PID="1")
    assert (done.returncode, done.stderr) == (Exit.LEADER_LOST, "hortator: the front is gone\n")

"""A whole fleet of real processes on private ports and directories; everything is ended by pid."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import psutil

from hortator.producer import Client, Job, Sampling, Status
from hortator.producer.embedded import EmbeddedRedis
from hortator.producer.redis_store import RedisStore
from hortator.producer.schema import State
from hortator.producer.store import GroupBeat

REPOSITORY = Path(__file__).resolve().parents[2]
PATH = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
ECHO = "echo"
LEASE_S = 2.0
PATIENCE_S = 10.0
"""Of those who look on: on a loaded machine Redis answers late, and that is not what is tested."""
T = TypeVar("T")


def wait_for(what: str, probe: Callable[[], T | None], timeout_s: float = 60.0) -> T:
    """Poll until the probe gives something true; its value."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = probe()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s:g} s for: {what}")
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """A process that runs or is stopped; zombies are dead."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Worker:
    """One leader: a real `celery worker` command with its ranks."""

    def __init__(
        self, fleet: "Fleet", group: str, env: dict[str, str], environment: dict[str, str] | None = None
    ) -> None:
        self.fleet, self.group = fleet, group
        self.log = fleet.directory / f"{group}.log"
        queue = env["HORTATOR_MODEL"]
        argv = [sys.executable, "-m", "celery", "-A", "hortator.workers", "worker", "-Q", queue, "-l", "INFO"]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [*argv, "-n", f"{group}@test"],
                env=os.environ | env | {"HORTATOR_GROUP": group, "PYTHONPATH": PATH} | (environment or {}),
                cwd=fleet.directory,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def beat(self) -> GroupBeat | None:
        """What the group last said of itself, if it is alive."""
        beats = (beat for queue in self.fleet.store.queues() for beat in queue.groups)
        return next((beat for beat in beats if beat.group == self.group), None)

    def ready(self, *, after_epoch: int = -1, timeout_s: float = 40.0) -> Self:
        """Wait until the group takes jobs (in a later epoch than the given one)."""

        def probe() -> bool:
            assert self.process.poll() is None, f"{self.group} exited:\n{self.tail()}"
            beat = self.beat()
            return beat is not None and beat.state == "ready" and beat.epoch > after_epoch

        wait_for(f"{self.group} ready", probe, timeout_s)
        return self

    def running(self) -> int:
        """Jobs that the group holds, by its last beat."""
        beat = self.beat()
        return beat.running if beat else 0

    def epoch(self) -> int:
        beat = self.beat()
        assert beat is not None
        return beat.epoch

    def ranks(self) -> list[int]:
        """Pids of the ranks, rank 0 first, from the process tree (not from what the group says)."""
        found: dict[int, int] = {}
        for child in psutil.Process(self.pid).children(recursive=True):
            try:
                environment = child.environ()
                command = child.cmdline()
            except psutil.Error:
                continue
            if "hortator.workers.rank" in command:
                found[rank_of(environment)] = child.pid
        return [found[rank] for rank in sorted(found)]

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = 40.0) -> int:
        return self.process.wait(timeout_s)

    def tail(self, size: int = 4000) -> str:
        return self.log.read_text(errors="replace")[-size:]

    def stop(self) -> None:
        """End it whatever its state: front first, then ranks that a broken build left behind."""
        ranks = self.ranks() if self.process.poll() is None else []
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        time.sleep(0.1)
        for pid in filter(alive, ranks):
            os.kill(pid, signal.SIGKILL)


def rank_of(environment: dict[str, str]) -> int:
    """The rank of a rank process, read from the configuration that it was given."""
    return int(json.loads(environment["HORTATOR_RANK_CONFIG"])["rank"])


class Fleet(AbstractContextManager["Fleet"]):
    """Redis, any number of workers, and a client."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.workers: list[Worker] = []

    def __enter__(self) -> Self:
        self.redis = EmbeddedRedis(self.directory / "redis")
        self.redis.__enter__()
        self.store = RedisStore(self.redis.url, timeout_s=PATIENCE_S)
        # jobs may come before the first worker
        self.client = Client(self.redis.url, require_known_model=False, timeout_s=PATIENCE_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.workers:
            if kind is not None:
                print(f"---- {worker.group}\n{worker.tail()}")
            worker.stop()
        self.client.close()
        self.redis.__exit__(kind, error, trace)

    def worker(self, group: str = "one", *, environment: dict[str, str] | None = None, **settings: object) -> Worker:
        """Start a leader; by default two ranks of an echo engine that gives a token every 20 ms."""
        chosen: dict[str, object] = {
            "redis_url": self.redis.url,
            "model": ECHO,
            "engine": "tests.together.engines:slow_echo",
            "tensor_parallel_size": 2,
            "max_num_seqs": 32,
            "max_model_len": 4096,
            "lease_s": LEASE_S,
            "device": "cpu",
            "restart_backoff_s": 0.1,
        } | settings
        env = {f"HORTATOR_{name.upper()}": str(value) for name, value in chosen.items()}
        worker = Worker(self, group, env, environment)
        self.workers.append(worker)
        return worker

    def enqueue(self, prompts: list[str], *, max_tokens: int = 50, **fields: object) -> list[str]:
        jobs = [
            Job.model_validate({"model": ECHO, "prompt": prompt, "sampling": Sampling(max_tokens=max_tokens)} | fields)
            for prompt in prompts
        ]
        return [handle.id for handle in self.client.enqueue_many(jobs)]

    def status(self, job_id: str) -> Status:
        status = self.store.statuses([job_id])[0]
        assert status is not None
        return status

    def progressed(self, job_ids: list[str], tokens: int = 5) -> None:
        """Wait until every job has some tokens in its journal."""

        def probe() -> bool:
            return all(s is not None and s.num_tokens >= tokens for s in self.store.statuses(job_ids))

        wait_for(f"{len(job_ids)} jobs with {tokens} tokens", probe)

    def finished(self, job_ids: list[str], timeout_s: float = 60.0) -> dict[str, Status]:
        """Wait until all jobs are terminal."""

        def probe() -> dict[str, Status] | None:
            found = {s.id: s for s in self.store.statuses(job_ids) if s is not None and s.state.terminal}
            return found if len(found) == len(set(job_ids)) else None

        return wait_for(f"{len(job_ids)} jobs terminal", probe, timeout_s)


def echoed(prompt: str, max_tokens: int) -> str:
    """What the echo engine answers: the prompt's bytes over and over."""
    data = prompt.encode()
    return (data * (max_tokens // len(data) + 1))[:max_tokens].decode()


def assert_all_right(statuses: dict[str, Status], prompts: dict[str, str], max_tokens: int) -> None:
    """Every job succeeded with exactly the answer that it would have had without the fault."""
    for job_id, status in statuses.items():
        assert status.state is State.SUCCEEDED, (job_id, status.state, status.failure)
        assert status.result is not None
        assert status.result.text == echoed(prompts[job_id], max_tokens), job_id

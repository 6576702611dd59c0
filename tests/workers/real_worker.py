"""Real `celery worker` processes, and a Celery client that knows nothing of hortator."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

from celery import Celery
from celery.result import AsyncResult

from hortator.producer.redis_store import RedisStore
from hortator.producer.schema import State, Status

REPOSITORY = Path(__file__).resolve().parents[2]
QUEUE = "m"
TOKEN_S = 0.01  # of slow_engine
T = TypeVar("T")


def wait_for(what: str, probe: Callable[[], T | None], timeout_s: float = 60.0) -> T:
    """Poll until the probe gives something true; its value."""
    until = time.monotonic() + timeout_s
    while not (value := probe()):
        assert time.monotonic() < until, f"waited {timeout_s:g} s for: {what}"
        time.sleep(0.02)
    return value


class Worker:
    """A leader with the slow engine, on its own log file."""

    def __init__(self, url: str, directory: Path, *arguments: str, queue: str | None = QUEUE, **settings: Any) -> None:
        self.url = url
        self.namespace = settings.get("namespace", "")
        self.store = RedisStore(url, namespace=self.namespace if self.namespace.endswith(":") else "", timeout_s=2.0)
        self.log = directory / f"worker-{time.monotonic_ns()}.log"
        self.name = f"w{time.monotonic_ns()}@test"
        chosen = {
            "redis_url": url, "model": QUEUE, "engine": "tests.workers.slow_engine:make", "max_num_seqs": 16,
            "max_model_len": 4096, "lease_s": 3.0, "grace_s": 10.0, "group": self.name, "restart_backoff_s": 0.1,
        } | settings  # fmt: skip
        env = {f"HORTATOR_{name.upper()}": str(value) for name, value in chosen.items() if value is not None}
        command = [sys.executable, "-m", "celery", "-A", "hortator.workers", "worker", "-l", "INFO", "-n", self.name]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, *(("-Q", queue) if queue else ()), *arguments],
                env=os.environ | {"PYTHONPATH": f"{REPOSITORY / 'src'}{os.pathsep}{REPOSITORY}"} | env,
                cwd=directory,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.store.close()

    def ready(self) -> Self:
        def probe() -> bool:
            assert self.process.poll() is None, self.output()
            return any(group.group == self.name and group.state == "ready" for group in self._groups())

        wait_for(f"{self.name} ready", probe)
        return self

    def _groups(self) -> list[Any]:
        return [group for queue in self.store.queues() for group in queue.groups]

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def status(self, job_id: str) -> Status | None:
        return self.store.statuses([job_id])[0]

    def state(self, job_id: str) -> State | None:
        status = self.status(job_id)
        return status.state if status else None

    def running(self, *job_ids: str, tokens: int = 1) -> None:
        """Wait until each has some tokens."""

        def probe() -> bool:
            return all(s is not None and s.num_tokens >= tokens for s in self.store.statuses(job_ids))

        wait_for(f"{len(job_ids)} jobs running", probe)

    def terminal(self, *job_ids: str) -> list[Status]:
        def probe() -> list[Status] | None:
            statuses = self.store.statuses(job_ids)
            return [s for s in statuses if s] if all(s and s.state.terminal for s in statuses) else None

        return wait_for(f"{len(job_ids)} jobs terminal", probe, 25)


class Client:
    """What somebody writes who only knows Celery."""

    def __init__(self, url: str, namespace: str = "") -> None:
        self.app = Celery(broker=url, backend=url, set_as_current=False)
        if namespace:
            options = {"global_keyprefix": namespace}
            self.app.conf.update(broker_transport_options=options, result_backend_transport_options=options)

    def send(self, prompt: str = "hello", *, tokens: int = 5, queue: str = QUEUE, **options: Any) -> AsyncResult:
        kwargs = {"prompt": prompt, "max_tokens": tokens} | options.pop("kwargs", {})
        return self.app.send_task("llm.generate", kwargs=kwargs, queue=queue, **options)

    def inspect(self, worker: Worker, what: str, *args: Any) -> Any:
        """One worker's reply."""
        replies = getattr(self.app.control.inspect([worker.name], timeout=3.0, limit=1), what)(*args)
        assert replies, f"no reply to inspect {what}: {worker.output()[-2000:]}"
        return replies[worker.name]

    def answers(self, worker: Worker) -> bool:
        return bool(self.app.control.inspect([worker.name], timeout=1.0, limit=1).ping())

    def active(self, worker: Worker) -> set[str]:
        return {request["id"] for request in self.inspect(worker, "active")}

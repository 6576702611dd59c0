"""`make demo`: the whole line on one machine, on real parts, ended cleanly.

A private Redis, one model group of two ranks (tensor parallel) whose leader is a real Celery worker, the polling
API.  Prompts of a JSONL file are enqueued with the Python producer, one more with a plain Celery `send_task`; one
job's tokens are streamed while they come, the others are polled over HTTP; every answer is checked.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import celery
import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hortator.producer import Client, Job, Sampling
from hortator.producer.embedded import EmbeddedRedis

HERE = Path(__file__).resolve().parent
MODEL = "demo"
GREEDY = Sampling(max_tokens=400)
START_TIMEOUT_S = 180
CELERY_PROMPT, CELERY_ANSWER = "25+17=", "42"

console = Console()


class Stop:
    """Ctrl-C or SIGTERM unwinds, so that nothing is left running: once, and not while a process is being made that
    nobody knows yet."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._held = False
        self._pending = 0

    def __call__(self, number: int, _: object) -> None:
        if self._held:
            self._pending = number
            return
        for one in self.SIGNALS:
            signal.signal(one, signal.SIG_IGN)
        sys.exit(128 + number)

    @contextmanager
    def held(self) -> Iterator[None]:
        self._held = True
        yield
        self._held = False

    def deliver(self) -> None:
        """What came meanwhile."""
        if self._pending:
            self(self._pending, None)


stop = Stop()


@dataclass(frozen=True)
class Question:
    """One line of the prompts file."""

    text: str
    answer: str
    job: Job


def read_questions(file: Path) -> list[Question]:
    """Each line has `answer` and either `prompt` or chat `messages`."""
    questions = []
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        answer = record.pop("answer")
        job = Job(model=MODEL, sampling=GREEDY, **record)
        text = job.messages[-1].content if job.messages else job.prompt or ""
        questions.append(Question(text, answer, job))
    return questions


@contextmanager
def running(name: str, argv: list[str], env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A child process of its own group, asked to stop by SIGTERM at the end, and killed if it does not."""
    with log.open("wb") as out, stop.held():
        process = subprocess.Popen(argv, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        stop.deliver()
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            console.print(f"[red]{name} did not stop within 30 s; killed[/red]")
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_ready(http: httpx.Client, processes: dict[str, subprocess.Popen[bytes]], logs: Path) -> None:
    """Until the API answers and a group serves the model; a process that ends before that is an error."""
    give_up = time.monotonic() + START_TIMEOUT_S
    while True:
        for name, process in processes.items():
            if process.poll() is not None or time.monotonic() > give_up:
                tail = (logs / f"{name}.log").read_text(errors="replace")[-3000:]
                raise SystemExit(f"{name} did not get ready (exit code {process.poll()}); its log ends:\n{tail}")
        try:
            queues = http.get("/v1/queues").json()["queues"]
            if any(g["state"] == "ready" for q in queues if q["model"] == MODEL for g in q["groups"]):
                return
        except (httpx.HTTPError, KeyError, ValueError):
            pass
        time.sleep(0.1)


def send_with_celery(redis_url: str) -> str:
    """What any application with Celery can do: no hortator code, only the task's name and the queue."""
    app = celery.Celery(broker=redis_url, backend=redis_url)
    kwargs = {"model": MODEL, "prompt": CELERY_PROMPT, "sampling": {"max_tokens": 16}}
    return str(app.send_task("llm.generate", kwargs=kwargs, queue=MODEL).id)


def poll(http: httpx.Client, job_ids: list[str], progress: Progress) -> dict[str, dict[str, Any]]:
    """Every job's final status, by long polls."""
    task = progress.add_task("answers", total=len(job_ids))
    done: dict[str, dict[str, Any]] = {}
    for job_id in job_ids:
        while True:
            status = http.get(f"/v1/jobs/{job_id}", params={"wait_s": 20}).raise_for_status().json()
            if status["state"] not in ("queued", "running"):
                break
        done[job_id] = status
        progress.update(task, advance=1)
    return done


def stream(client: Client, job_id: str) -> None:
    """Print one job's text while it is generated."""
    console.print(f"[dim]streaming {job_id}:[/dim] ", end="")
    for chunk in client.job(job_id).stream():
        console.print(chunk.text, end="", style="green", markup=False, highlight=False)
    console.print()


def report(questions: dict[str, Question], done: dict[str, dict[str, Any]]) -> int:
    """The table; the number of wrong answers."""
    table = Table(title="every answer, once")
    for column in ("prompt", "answer", "", "tokens", "queued ms", "first token ms", "total ms"):
        table.add_column(column, justify="right" if "ms" in column or column == "tokens" else "left")
    wrong = 0
    for job_id, question in questions.items():
        status = done[job_id]
        times, result = status["timings"], status.get("result") or {}
        text = result.get("text", f"{status['state']}: {status.get('failure')}")
        right = text.strip() == question.answer
        wrong += not right
        start = times["enqueued_ms"]
        table.add_row(
            shorten(question.text),
            shorten(text),
            "[green]ok[/green]" if right else f"[red]not {question.answer!r}[/red]",
            str(result.get("usage", {}).get("completion_tokens", "-")),
            *(str(times[k] - start) if times.get(k) else "-" for k in ("claimed_ms", "first_token_ms", "finished_ms")),
        )
    console.print(table)
    return wrong


def shorten(text: str, width: int = 28) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def forget_settings() -> None:
    """Of the user's shell, which are for other fleets: this one's are all here."""
    for name in [name for name in os.environ if name.startswith("HORTATOR_")]:
        del os.environ[name]


def main() -> int:
    """Exit code 0 when every answer is right and nothing is left running."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts.jsonl")
    parser.add_argument("--tp", type=int, default=2, help="ranks of the model group")
    args = parser.parse_args()
    forget_settings()
    questions = read_questions(args.prompts)
    for number in Stop.SIGNALS:
        signal.signal(number, stop)

    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hortator-demo-")))
        redis = stack.enter_context(EmbeddedRedis())
        port = free_port()
        env = os.environ | {
            "HORTATOR_REDIS_URL": redis.url,
            "HORTATOR_MODEL": MODEL,
            "HORTATOR_MODEL_PATH": str(HERE / "model"),
            "HORTATOR_TENSOR_PARALLEL_SIZE": str(args.tp),
            "HORTATOR_DEVICE": "cpu",
        }
        worker_argv = [
            sys.executable,
            "-m",
            "celery",
            "-A",
            "hortator.workers",
            "worker",
            "-Q",
            MODEL,
            "-l",
            "INFO",
        ]
        serve_argv = [sys.executable, "-m", "hortator", "serve", "--port", str(port)]
        processes = {
            name: stack.enter_context(running(name, argv, env, logs / f"{name}.log"))
            for name, argv in {"worker": worker_argv, "api": serve_argv}.items()
        }
        http = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60))
        client = stack.enter_context(Client(redis.url))

        with console.status(f"starting a Celery worker with {args.tp} ranks, Redis and the API"):
            started = time.monotonic()
            wait_until_ready(http, processes, logs)
        console.print(f"ready after {time.monotonic() - started:.1f} s")

        handles = client.enqueue_many([question.job for question in questions])
        asked = {handle.id: question for handle, question in zip(handles, questions, strict=True)}
        celery_id = send_with_celery(redis.url)
        asked[celery_id] = Question(CELERY_PROMPT + " (send_task)", CELERY_ANSWER, questions[0].job)

        longest = max(asked, key=lambda job_id: len(asked[job_id].answer))
        stream(client, longest)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            done = poll(http, list(asked), progress)
        wrong = report(asked, done)
    console.print(f"{len(asked) - wrong} of {len(asked)} answers are right")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Queue overhead: a hortator leader (echo engine) against stock Celery threads and raw Redis Streams.

    make bench-queue            or    python benchmarks/bench_queue.py [--rounds 3] [--seconds 5] [--arms hortator]

Every arm gets the same messages from the same driver: 1 KB prompts by LPUSH (XADD for Streams), results awaited by
pub/sub, each job "generates" for 50 ms.  Closed loop: 256 jobs in flight, what is done a second and the CPU it takes.
Open loop: 400 jobs/s, how much longer than 50 ms a job takes.  Arms alternate; the table shows medians of the rounds.
"""

import argparse
import asyncio
import base64
import json
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import redis
import redis.asyncio
from celery import Celery

from hortator.producer.embedded import EmbeddedRedis

URL = os.environ.get("BENCH_REDIS_URL", "redis://127.0.0.1:6379/0")
QUEUE = "bench"
LATENCY_S = 0.05
IN_FLIGHT = 256
RATE = 400
PROMPT = "the quick brown fox jumps over the lazy dog. " * 23  # 1 KB
ANSWER_TOKENS = 16
ARMS = ("hortator", "stock", "streams")
NEEDED = {"jobs/s over stock": 3.0, "CPU of stock": 1 / 3, "p50 over streams, ms": 5.0, "p99 over streams, ms": 10.0}

# ---- the stock arm: `celery -A bench_queue worker`

app = Celery("bench_queue", broker=URL, backend=URL)
app.conf.update(
    task_acks_late=True,
    worker_prefetch_multiplier=1,
    broker_transport_options={"max_connections": 400},
    redis_max_connections=400,
    broker_pool_limit=300,
    worker_send_task_events=False,
)


@app.task(name="llm.generate")
def generate(prompt: str, max_tokens: int) -> dict[str, Any]:
    """A body that waits as one that waits for an engine would."""
    time.sleep(LATENCY_S)
    return {"text": prompt[:max_tokens], "token_ids": list(prompt[:max_tokens].encode())}


# ---- the floor: Redis Streams with asyncio, everything batched


async def streams_worker(url: str) -> None:
    client = redis.asyncio.Redis.from_url(url)
    await client.xgroup_create("stream", "g", id="0", mkstream=True)
    done: list[tuple[bytes, bytes, str]] = []
    wake = asyncio.Event()

    async def run(entry: bytes, fields: dict[bytes, bytes]) -> None:
        await asyncio.sleep(LATENCY_S)
        job = json.loads(fields[b"job"])
        text = job["prompt"][: job["max_tokens"]]
        result = {"status": "SUCCESS", "result": {"text": text, "token_ids": list(text.encode())}}
        done.append((entry, fields[b"id"], json.dumps(result)))
        wake.set()

    async def write() -> None:
        while True:
            await wake.wait()
            wake.clear()
            batch = done[:]
            done.clear()
            pipe = client.pipeline(transaction=False)
            for entry, job_id, result in batch:
                key = f"celery-task-meta-{job_id.decode()}"
                pipe.set(key, result, ex=86400)
                pipe.publish(key, result)
                pipe.xack("stream", "g", entry)
                pipe.xdel("stream", entry)
            await pipe.execute()

    tasks = {asyncio.create_task(write())}
    while True:
        reply = await client.xreadgroup("g", "c", {"stream": ">"}, count=IN_FLIGHT, block=1000)
        for _, entries in reply or ():
            for entry, fields in entries:
                task = asyncio.create_task(run(entry, fields))
                tasks.add(task)
                task.add_done_callback(tasks.discard)


# ---- the driver, the same for all arms


class Results:
    """A bare subscriber: redis-py's would cost the driver more than the worker under test."""

    PREFIX = b"celery-task-meta-"

    def __init__(self, url: str) -> None:
        where = redis.ConnectionPool.from_url(url).connection_kwargs
        self._socket = socket.create_connection((where["host"], where["port"]))
        self._socket.sendall(b"PSUBSCRIBE " + self.PREFIX + b"*\r\n")
        self._buffer = b""

    def read(self, timeout_s: float) -> Iterator[str]:
        """Ids whose result was published; waits up to `timeout_s` for the first.  A failure ends the benchmark."""
        if not select.select([self._socket], [], [], timeout_s)[0]:
            return
        self._buffer += self._socket.recv(1 << 20)
        while (message := self._message()) is not None:
            if message[0] == b"pmessage" and b'"STARTED"' not in message[3]:
                if b'"SUCCESS"' not in message[3]:
                    raise SystemExit(f"a job failed: {message[3][:300]!r}")
                yield message[2].removeprefix(self.PREFIX).decode()

    def _message(self) -> list[bytes] | None:
        parts: list[bytes] = []
        at, end = 0, self._buffer.find(b"\r\n")
        if end < 0:
            return None
        for _ in range(int(self._buffer[1:end])):
            at = end + 2
            end = self._buffer.find(b"\r\n", at)
            if end < 0:
                return None
            if self._buffer[at : at + 1] == b"$":
                start, end = end + 2, end + 2 + int(self._buffer[at + 1 : end])
                if end + 2 > len(self._buffer):
                    return None
                parts.append(self._buffer[start:end])
        self._buffer = self._buffer[end + 2 :]
        return parts


class Driver:
    """Pushes jobs and hears of their results."""

    def __init__(self, url: str, *, streams: bool) -> None:
        self._redis = redis.Redis.from_url(url)
        self._streams = streams
        self._message = _template()
        self.done = Results(url).read

    def push(self, count: int) -> list[str]:
        ids = [str(uuid.uuid4()) for _ in range(count)]
        if self._streams:
            pipe = self._redis.pipeline(transaction=False)
            job = json.dumps({"prompt": PROMPT, "max_tokens": ANSWER_TOKENS})
            for job_id in ids:
                pipe.xadd("stream", {"id": job_id, "job": job})
            pipe.execute()
        else:
            self._redis.lpush(QUEUE, *[self._message.replace("%ID%", job_id) for job_id in ids])
        return ids


def _template() -> str:
    embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    body = json.dumps([[], {"prompt": PROMPT, "max_tokens": ANSWER_TOKENS}, embed])
    headers = {
        "lang": "py", "task": "llm.generate", "id": "%ID%", "root_id": "%ID%", "parent_id": None, "group": None,
        "retries": 0, "eta": None, "expires": None, "timelimit": [None, None], "argsrepr": "()", "kwargsrepr": "{}",
        "origin": "bench", "ignore_result": False, "stamps": {},
    }  # fmt: skip
    properties = {
        "correlation_id": "%ID%", "reply_to": "bench", "delivery_mode": 2, "priority": 0, "body_encoding": "base64",
        "delivery_info": {"exchange": "", "routing_key": QUEUE}, "delivery_tag": "%ID%",
    }  # fmt: skip
    return json.dumps(
        {
            "body": base64.b64encode(body.encode()).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": headers,
            "properties": properties,
        }
    )


class Arm:
    """A worker under test with its own Redis."""

    def __init__(self, name: str, profile: str | None = None) -> None:
        self.name = name
        self.redis = EmbeddedRedis(appendonly=False).start()
        self._profile = profile
        self.process = self._start()
        self.driver = Driver(self.redis.url, streams=name == "streams")
        self.driver.push(8)
        self._drain(8)

    def _start(self) -> psutil.Process:
        celery = ["-m", "celery", "-A"]
        env = os.environ | {"BENCH_REDIS_URL": self.redis.url}
        if self.name == "streams":
            command = [__file__, "--streams-worker", self.redis.url]
        elif self.name == "stock":
            command = [
                *celery,
                "bench_queue",
                "worker",
                "-P",
                "threads",
                "-c",
                str(IN_FLIGHT),
                "-Q",
                QUEUE,
                "-l",
                "ERROR",
            ]
        else:
            command = [*celery, "hortator.workers", "worker", "-Q", QUEUE, "-l", "WARNING"]
            if self._profile:
                command = ["-m", "cProfile", "-o", self._profile, *command]
            env |= {
                "HORTATOR_REDIS_URL": self.redis.url, "HORTATOR_MODEL": QUEUE, "HORTATOR_ENGINE": "echo",
                "HORTATOR_ECHO_LATENCY_S": str(LATENCY_S), "HORTATOR_MAX_NUM_SEQS": str(IN_FLIGHT),
            }  # fmt: skip
        quiet = None if os.environ.get("BENCH_VERBOSE") else subprocess.DEVNULL
        popen = subprocess.Popen(
            [sys.executable, *command], env=env, cwd=Path(__file__).parent, stdout=quiet, stderr=quiet
        )
        return psutil.Process(popen.pid)

    def cpu_s(self) -> tuple[float, float, float]:
        """CPU of the worker (the front, for hortator), of its ranks, and of Redis."""
        children = self.process.children(recursive=True)
        return _cpu(self.process), sum(map(_cpu, children)), _cpu(psutil.Process(self.redis.pid))

    def closed_loop(self, seconds: float) -> dict[str, float]:
        driver, running, count = self.driver, 0, 0
        warm_until = time.monotonic() + 1.0
        measuring, started, cpu = False, 0.0, (0.0, 0.0, 0.0)
        driver.push(IN_FLIGHT)
        running = IN_FLIGHT
        while not measuring or time.monotonic() < started + seconds:
            back = sum(1 for _ in driver.done(1.0))
            if back:
                driver.push(back)
            count += back
            if not measuring and time.monotonic() > warm_until:
                measuring, started, cpu, count = True, time.monotonic(), self.cpu_s(), 0
        elapsed = time.monotonic() - started
        used = [(after - before) / count * 1e6 for after, before in zip(self.cpu_s(), cpu, strict=True)]
        self._drain(running)
        return {"jobs/s": count / elapsed} | dict(zip(("worker us", "ranks us", "redis us"), used, strict=True))

    def open_loop(self, seconds: float) -> dict[str, float]:
        sent: dict[str, float] = {}
        added: list[float] = []
        start = time.monotonic()
        total, pushed = int(RATE * seconds), 0
        while len(added) < total:
            now = time.monotonic()
            due = min(total, int((now - start) * RATE) + 1)
            if due > pushed:
                sent |= dict.fromkeys(self.driver.push(due - pushed), now)
                pushed = due
            next_at = start + pushed / RATE
            for job_id in self.driver.done(max(0.0, min(next_at - time.monotonic(), 0.01))):
                if job_id in sent:
                    added.append((time.monotonic() - sent.pop(job_id) - LATENCY_S) * 1000)
            if time.monotonic() > start + seconds + 20:
                raise SystemExit(f"{self.name}: {total - len(added)} jobs did not come back")
        added = sorted(added[total // 10 :])
        return {"p50 ms": statistics.median(added), "p99 ms": added[int(len(added) * 0.99)]}

    def idle_cpu(self, seconds: float) -> float:
        """Share of one core that the worker takes when nothing is to be done."""
        before = self.cpu_s()[0]
        time.sleep(seconds)
        return (self.cpu_s()[0] - before) / seconds

    def _drain(self, count: int) -> None:
        until = time.monotonic() + 30
        while count > 0:
            count -= sum(1 for _ in self.driver.done(0.2))
            if time.monotonic() > until:
                raise SystemExit(f"{self.name}: {count} jobs did not come back")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(15)
        except psutil.TimeoutExpired:
            self.process.kill()
        self.redis.stop()


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def run(arms: list[str], rounds: int, seconds: float, profile: str | None) -> dict[str, dict[str, float]]:
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in arms:
            arm = Arm(name, profile if name == "hortator" else None)
            try:
                row = arm.closed_loop(seconds) | arm.open_loop(seconds)
                if number == 0:
                    time.sleep(3)  # beyond the busy time of the idle poll
                    row["idle core %"] = 100 * arm.idle_cpu(4)
            finally:
                arm.stop()
            rows[name].append(row)
            print(f"  round {number + 1} {name}: " + ", ".join(f"{key} {value:.1f}" for key, value in row.items()))
    return {name: _medians(results) for name, results in rows.items()}


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows if key in row) for key in rows[0]}


def table(results: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(results.values())))
    print("| arm | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, row in results.items():
        print(f"| {name} | " + " | ".join(f"{row[column]:.1f}" for column in columns) + " |")


def verdict(results: dict[str, dict[str, float]]) -> bool:
    ours, stock, floor = (results[name] for name in ARMS)
    measured = {
        "jobs/s over stock": ours["jobs/s"] / stock["jobs/s"],
        "CPU of stock": ours["worker us"] / stock["worker us"],
        "p50 over streams, ms": ours["p50 ms"] - floor["p50 ms"],
        "p99 over streams, ms": ours["p99 ms"] - floor["p99 ms"],
    }
    good = True
    for name, value in measured.items():
        fine = value >= NEEDED[name] if name.startswith("jobs") else value <= NEEDED[name]
        good &= fine
        print(f"{'ok  ' if fine else 'MISS'} {name}: {value:.2f} (needed {NEEDED[name]:.2f})")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--profile", help="write a cProfile of the front here")
    parser.add_argument("--streams-worker", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.streams_worker:
        asyncio.run(streams_worker(options.streams_worker))
        return 0
    arms = options.arms.split(",")
    results = run(arms, options.rounds, options.seconds, options.profile)
    table(results)
    return 0 if set(arms) != set(ARMS) or verdict(results) else 1


if __name__ == "__main__":
    sys.exit(main())

"""What the store costs: enqueue and claim as the queue grows, memory per queued job, and enqueue against stock Celery.

    python benchmarks/bench_store.py [--million] [--json PATH]

A private redis-server, append-only file as in production.  The arms of a comparison are interleaved, medians are shown.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import celery
import redis
from rich.console import Console
from rich.table import Table

from hortator.producer import Client, Job
from hortator.producer.embedded import EmbeddedRedis, server_version
from hortator.producer.redis_store import RedisStore
from hortator.producer.rules import Rules
from hortator.producer.schema import Chunk, FinishReason, Result, State, Usage
from hortator.producer.store import Append, GroupBeat, Outcome

MODEL = "bench"
PROMPT = "x" * 1000
BATCH = 250
ROUNDS = 5
SINGLES = 400
MANY = 4000
console = Console()


def jobs(count: int) -> list[Job]:
    return [Job(model=MODEL, prompt=PROMPT) for _ in range(count)]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def fresh(url: str) -> tuple[RedisStore, Any]:
    """A store on an emptied Redis that knows the model, and a plain client."""
    client: Any = redis.Redis.from_url(url)
    client.flushall()
    store = RedisStore(url, rules=Rules(max_queued_per_model=10**7, max_queued_per_tenant=10**7), timeout_s=30)
    store.beat(GroupBeat("bench", MODEL, 0, 1, 1, "ready"))
    return store, client


def growth(url: str, depths: list[int]) -> list[dict[str, float]]:
    """Time per job of enqueue and claim at each depth, and memory per queued job."""
    store, client = fresh(url)
    empty, depth, rows = client.info("memory")["used_memory"], 0, []
    batch = jobs(BATCH)
    for wanted in depths:
        while depth < wanted - BATCH * ROUNDS:
            store.enqueue(batch)
            depth += BATCH
        settle(client)
        enqueue_s, single_s, claim_s, one_s = [], [], [], []
        for _ in range(ROUNDS):
            enqueue_s.append(seconds(lambda: store.enqueue(batch)) / BATCH)
            single_s.append(seconds(lambda: [store.enqueue(batch[:1]) for _ in range(50)]) / 50)
            depth += BATCH + 50
        per_job = (client.info("memory")["used_memory"] - empty) / depth
        for _ in range(ROUNDS):
            claim_s.append(seconds(lambda: claim(store, BATCH)) / BATCH)
            one_s.append(seconds(lambda: [claim(store, 1) for _ in range(50)]) / 50)
            depth -= BATCH + 50
        rows.append(
            {
                "queued": wanted,
                "enqueue us/job in 250s": 1e6 * statistics.median(enqueue_s),
                "enqueue us, single": 1e6 * statistics.median(single_s),
                "claim us/job in 250s": 1e6 * statistics.median(claim_s),
                "claim us, single": 1e6 * statistics.median(one_s),
                "bytes/queued job": per_job,
                "x payload": per_job / len(PROMPT),
            }
        )
    store.close()
    return rows


def settle(client: Any) -> None:
    """Redis rewrites its append-only file as it grows; on two cores that would be in the figures."""
    while client.info("persistence")["aof_rewrite_in_progress"]:
        time.sleep(0.2)


def claim(store: RedisStore, limit: int) -> None:
    got = store.claim(MODEL, owner="bench", limit=limit, lease_s=600, idle=True)
    assert len(got.jobs) == limit


def leading(url: str) -> dict[str, float]:
    """What one engine step and one job's end cost a leader with 256 jobs in flight, microseconds per job."""
    store, _ = fresh(url)
    store.enqueue(jobs(256))
    leases = [one.lease for one in store.claim(MODEL, owner="b", limit=256, lease_s=600, idle=True).jobs]
    append_s, renew_s, statuses_s = [], [], []
    for step in range(20):
        chunks = [Append(lease, Chunk(index=step, token_ids=(7,), text="a")) for lease in leases]
        append_s.append(seconds(lambda chunks=chunks: store.append(chunks)) / 256)
        renew_s.append(seconds(lambda: store.renew(leases, owner="b", lease_s=600)) / 256)
        statuses_s.append(seconds(lambda: store.statuses([lease.job_id for lease in leases])) / 256)
    usage = Usage(prompt_tokens=250, completion_tokens=100)
    result = Result(text="y" * 500, token_ids=tuple(range(100)), finish_reason=FinishReason.STOP, usage=usage)
    outcomes = [Outcome(lease, State.SUCCEEDED, result) for lease in leases]
    commit_s = seconds(lambda: store.commit(outcomes)) / 256
    store.close()
    return {
        "append": 1e6 * statistics.median(append_s),
        "renew": 1e6 * statistics.median(renew_s),
        "statuses": 1e6 * statistics.median(statuses_s),
        "commit": 1e6 * commit_s,
    }


def against_celery(url: str) -> dict[str, float]:
    """Jobs per second of one producer; arms interleaved.  Stock means a Redis backend is configured."""
    app = celery.Celery("stock", broker=url, backend=url, set_as_current=False)
    bare = celery.Celery("bare", broker=url, set_as_current=False)
    store, _ = fresh(url)
    with Client(url) as client:
        batch = jobs(MANY)
        arms: dict[str, tuple[int, Callable[[], object]]] = {
            "stock send_task, Redis backend": (SINGLES, lambda: send(app)),
            "stock send_task, no backend": (SINGLES, lambda: send(bare)),
            "Client.enqueue": (SINGLES, lambda: [client.enqueue(PROMPT, model=MODEL) for _ in range(SINGLES)]),
            "Client.enqueue_many": (MANY, lambda: client.enqueue_many(batch)),
        }
        rates: dict[str, list[float]] = {name: [] for name in arms}
        for _, work in arms.values():
            work()  # connections, script cache
        for _ in range(ROUNDS):
            for name, (count, work) in arms.items():
                rates[name].append(count / seconds(work))
    store.close()
    app.close()
    bare.close()
    return {name: statistics.median(values) for name, values in rates.items()}


def send(app: Any) -> None:
    for _ in range(SINGLES):
        app.send_task("llm.generate", kwargs={"prompt": PROMPT}, queue=f"stock-{MODEL}")


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{value:,.1f}" if isinstance(value, float) else f"{value}" for value in row.values()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--million", action="store_true", help="also with 1 M queued jobs (3 GB, a few minutes)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    depths = [1_000 + BATCH * ROUNDS, 100_000] + ([1_000_000] if options.million else [])
    with EmbeddedRedis() as server:
        version = ".".join(map(str, server_version(server.executable)))
        rates = against_celery(server.url)
        costs = leading(server.url)
        rows = growth(server.url, depths)
    stock = rates["stock send_task, Redis backend"]
    show(
        f"one producer, 1 KB prompts, Redis {version}, AOF everysec",
        [{"arm": name, "jobs/s": rate, "x stock": rate / stock} for name, rate in rates.items()],
    )
    show("a leader with 256 jobs in flight, one call for all: us per job", [costs])
    show("as the queue grows", rows)
    if options.json:
        options.json.write_text(json.dumps({"rates": rates, "leader": costs, "growth": rows}, indent=2))


if __name__ == "__main__":
    main()

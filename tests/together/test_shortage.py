"""Ranks that may have no more memory, through the whole line: Redis, a Celery worker, real allocations that fail."""

import os
import re
import resource
from pathlib import Path

import psutil
import pytest

from hortator.producer.schema import Job, Sampling, State
from hortator.workers.engine.step import Request, SamplingParams
from tests.together.fleet import Fleet, Worker
from tests.workers.engine.byte_tokenizer import write_tokenizer
from tests.workers.engine.checkpoints import make_checkpoint
from tests.workers.engine.cramped import (
    ENVIRONMENT,
    GIANT_REQUEST,
    MIB,
    NUM_TOKENS,
    ROOM_MIB,
    SIZES,
    WIDE,
    plain,
    prompt,
)
from tests.workers.engine.drive import run

MAX_TOKENS = 100
GIANT = GIANT_REQUEST.prompt
PROMPTS = [prompt(20 + n, n) for n in range(6)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint("llama", tmp_path_factory.mktemp("wide"), **WIDE).path
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def expected(wide: Path) -> list[tuple[int, ...]]:
    """What each prompt gets where there is memory, the giant's last."""
    sampling = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
    requests = [Request(n, tokens, sampling) for n, tokens in enumerate([*PROMPTS, GIANT])]
    outcome = run(plain(wide), requests)
    return [tuple(outcome.tokens[request.handle]) for request in requests]


def leader_of(fleet: Fleet, path: Path, ranks: int) -> Worker:
    """Each rank computes with one thread: two would wait for each other where other processes want the cores."""
    options = {**SIZES, "kv_cache_bytes": NUM_TOKENS * 1024 // ranks, "tensor_parallel_size": ranks}
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:ranks])
    try:
        leader = fleet.worker(
            engine="paged", model="wide", model_path=path, dtype="float32", environment=ENVIRONMENT, **options
        )
    finally:
        os.sched_setaffinity(0, cores)
    return leader.ready(timeout_s=90)


def enqueue(fleet: Fleet, *prompts: tuple[int, ...]) -> list[str]:
    sampling = Sampling(max_tokens=MAX_TOKENS, ignore_eos=True, temperature=0.0)
    jobs = [Job(model="wide", token_ids=tokens, sampling=sampling) for tokens in prompts]
    return [handle.id for handle in fleet.client.enqueue_many(jobs)]


def tokens_of(fleet: Fleet, job_ids: list[str]) -> list[tuple[int, ...]]:
    done = fleet.finished(job_ids)
    return [result.token_ids for job_id in job_ids if (result := done[job_id].result) is not None]


def confine(pid: int, mib: int | None) -> None:
    """Let a process have no more than so much beside what it has."""
    room = resource.RLIM_INFINITY if mib is None else psutil.Process(pid).memory_info().vms + mib * MIB
    resource.prlimit(pid, resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))


def test_one_rank_fails_the_job_that_is_too_large_alone_and_nobody_else(
    fleet: Fleet, wide: Path, expected: list[tuple[int, ...]]
) -> None:
    leader = leader_of(fleet, wide, ranks=1)
    [rank] = leader.ranks()
    confine(rank, ROOM_MIB)
    others = enqueue(fleet, *PROMPTS)
    fleet.progressed(others, 3)
    [giant] = enqueue(fleet, GIANT)
    failure = fleet.finished([giant])[giant].failure
    assert failure is not None
    assert failure.code == "out_of_memory"
    assert "shorten the prompt, or lower the group's max_num_batched_tokens" in failure.message
    assert tokens_of(fleet, others) == expected[:-1]
    assert {fleet.status(job_id).attempt for job_id in (giant, *others)} == {1}
    confine(rank, None)
    assert tokens_of(fleet, enqueue(fleet, GIANT)) == expected[-1:]
    assert leader.ranks() == [rank]


def test_one_of_two_ranks_ends_the_group_by_name_and_the_next_life_finishes_every_job(
    fleet: Fleet, wide: Path, expected: list[tuple[int, ...]]
) -> None:
    leader = leader_of(fleet, wide, ranks=2)
    confine(leader.ranks()[1], ROOM_MIB // 2)
    others = enqueue(fleet, *PROMPTS)
    fleet.progressed(others, 3)
    [giant] = enqueue(fleet, GIANT)
    assert tokens_of(fleet, [*others, giant]) == expected
    beat = leader.ready(after_epoch=1, timeout_s=90).beat()
    assert beat is not None
    reason = beat.info["last_failure"]
    assert reason.startswith("rank 1 (")
    assert re.search(
        r"out of memory for a step of \d rows and 120\d tokens \(\d+ bytes could not be allocated\)", reason
    )
    assert reason.endswith("lower max_num_batched_tokens, max_num_seqs, kv_cache_bytes or gpu_memory_utilization")
    done = fleet.finished([giant])[giant]
    assert (done.state, done.attempt) == (State.SUCCEEDED, 2)

"""Every way of sampling through the whole line: Redis, a Celery worker, two real ranks, and a crash in the middle."""

import os
import re
import signal
from typing import Any

from hortator.producer.schema import Job, Result, Sampling, State
from tests.together.fleet import REPOSITORY, Fleet

PATTERN = "[a-z]{3,5}(, [0-9]{1,3}){30,35}"
ANY = {"temperature": 5.0, "seed": 7}
WAYS: list[dict[str, Any]] = [
    {**ANY, "max_tokens": 300, "structure": {"type": "regex", "pattern": PATTERN}},
    {
        **ANY,
        "max_tokens": 60,
        "n": 3,
        "ignore_eos": True,
        "frequency_penalty": 1.0,
        "logprobs": True,
        "top_logprobs": 2,
    },
]


def job(sampling: dict[str, Any]) -> Job:
    return Job(model="demo", prompt="12+30=", sampling=Sampling.model_validate(sampling))


def results(fleet: Fleet, job_ids: list[str]) -> list[Result]:
    done = fleet.finished(job_ids, timeout_s=90)
    assert {status.state for status in done.values()} == {State.SUCCEEDED}, done
    return [result for job_id in job_ids if (result := done[job_id].result) is not None]


def test_structures_and_choices_are_the_same_with_and_without_a_crash(fleet: Fleet) -> None:
    leader = fleet.worker(
        "one", engine="paged", model="demo", model_path=REPOSITORY / "demo" / "model", max_model_len=512
    ).ready()
    [bad] = fleet.client.enqueue_many([job({"structure": {"type": "regex", "pattern": "(a"}})])
    jobs = [job(way) for way in WAYS]
    untouched = results(fleet, [handle.id for handle in fleet.client.enqueue_many(jobs)])
    structured, several = untouched
    assert re.fullmatch(PATTERN, structured.text)
    assert several.choices is not None
    assert len({choice.text for choice in several.choices}) == 3
    assert several.usage.completion_tokens == 180
    failure = fleet.finished([bad.id])[bad.id].failure
    assert failure is not None
    assert failure.code == "bad_request"
    assert "unclosed group" in failure.message
    assert leader.epoch() == 1, "a bad structure is nobody's crash"

    ids = [handle.id for handle in fleet.client.enqueue_many(jobs)]
    fleet.progressed(ids, 20)
    os.kill(leader.ranks()[1], signal.SIGKILL)
    again = results(fleet, ids)
    assert [result.text for result in again] == [result.text for result in untouched]
    assert again[1].choices is not None
    assert [choice.text for choice in again[1].choices] == [choice.text for choice in several.choices]
    assert {fleet.status(job_id).attempt for job_id in ids} == {2}
    streamed: dict[int | None, str] = {}
    for chunk in fleet.store.chunks(ids[1]):
        streamed[chunk.choice] = streamed.get(chunk.choice, "") + chunk.text
    assert streamed == {choice.index: choice.text for choice in several.choices}

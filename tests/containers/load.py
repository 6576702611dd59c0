"""Clients outside: they submit questions without pause, as a patient client does, and check every answer."""

import json
import threading
import time
import uuid
from dataclasses import dataclass, field
from itertools import cycle, islice
from types import TracebackType
from typing import Any, Self

import httpx

from tests.containers.stack import ROOT

MODEL = "demo"
BURST, PAUSE_S = 2, 0.5
MAX_ANSWER_CHARACTERS = 50  # a step takes long where two cores compute for two ranks and do much else
TERMINAL = {"succeeded", "failed", "cancelled", "expired"}
SUBMIT_PATIENCE_S = 60.0


@dataclass
class Outcome:
    """What became of the jobs: `wrong` has those that did not end with the right answer."""

    num_jobs: int = 0
    num_refusals: int = 0
    num_second_attempts: int = 0
    wrong: list[str] = field(default_factory=list)


class Load:
    """A thread that submits bursts of jobs while the `with` lasts."""

    def __init__(self, base_url: str) -> None:
        self._http = httpx.Client(base_url=base_url, timeout=10)
        self._questions = cycle(questions())
        self._answers: dict[str, str] = {}
        self._refusals = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._submit_all, name="load")
        self._problem: Exception | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def outcome(self, *, timeout_s: float) -> Outcome:
        """When every job is terminal."""
        if self._problem is not None:
            raise self._problem
        statuses = self._settled(timeout_s)
        self._http.close()
        result = Outcome(len(self._answers), self._refusals)
        for job_id, answer in self._answers.items():
            status = statuses[job_id]
            said = (status.get("result") or {}).get("text")
            result.num_second_attempts += status.get("attempt", 1) > 1
            if status["state"] != "succeeded" or said != answer:
                result.wrong.append(f"{job_id}: {status['state']} {status.get('failure')} {said!r}, not {answer!r}")
        return result

    def _submit_all(self) -> None:
        try:
            while not self._stop.wait(PAUSE_S):
                for body in map(dict, islice(self._questions, BURST)):
                    answer = body.pop("answer")
                    self._answers[self._accepted(body)] = answer
        except Exception as problem:
            self._problem = problem

    def _accepted(self, body: dict[str, Any]) -> str:
        """The id; refused or unheard submits are repeated under the same key."""
        key = {"idempotency-key": uuid.uuid4().hex}
        until = time.monotonic() + SUBMIT_PATIENCE_S
        while True:
            try:
                reply = self._http.post("/v1/jobs", json=body, headers=key)
                if reply.status_code == 202:
                    return str(reply.json()["id"])
                assert reply.status_code == 503, reply.text
            except httpx.TransportError:
                pass
            assert time.monotonic() < until, "no job was accepted for a minute"
            self._refusals += 1
            time.sleep(0.2)

    def _settled(self, timeout_s: float) -> dict[str, dict[str, Any]]:
        until = time.monotonic() + timeout_s
        while True:
            statuses = self._statuses()
            open_jobs = [i for i in self._answers if statuses.get(i, {}).get("state") not in TERMINAL]
            if not open_jobs:
                return statuses
            assert time.monotonic() < until, f"{len(open_jobs)} jobs have not ended, such as {open_jobs[0]}"
            time.sleep(0.3)

    def _statuses(self) -> dict[str, dict[str, Any]]:
        ids = list(self._answers)
        found: dict[str, dict[str, Any]] = {}
        for start in range(0, len(ids), 500):
            try:
                reply = self._http.post("/v1/jobs:status", json={"ids": ids[start : start + 500]})
            except httpx.TransportError:
                continue
            if reply.status_code == 200:
                found |= {job["id"]: job for job in reply.json()["jobs"] if job}
        return found


def questions() -> list[dict[str, Any]]:
    """The demo's with short answers, as bodies of a submit, each with its `answer`."""
    lines = (ROOT / "demo" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) | {"model": MODEL, "sampling": {"max_tokens": 100}} for line in lines]
    return [question for question in found if len(question["answer"]) <= MAX_ANSWER_CHARACTERS]

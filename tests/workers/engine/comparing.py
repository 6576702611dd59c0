"""Holds what every layout said of a workload against what the reference did."""

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers

from hortator.workers.engine.sampler import Draw, Sampler
from hortator.workers.engine.step import Request
from tests.workers.engine.checkpoints import EOS
from tests.workers.engine.playing import Log, handle_of_return, holds
from tests.workers.engine.workloads import Entry, workload

SHAPES = {"2x1": (2, 1), "1x2": (1, 2), "2x2": (2, 2)}
"""Tensor x pipeline parallel sizes."""
NOISE = 1e-5  # of the largest logit: a few times what two layouts differ by
LOGPROB_TOLERANCE = 2e-3

Problem = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Finding:
    """Something that should not be."""

    seed: int
    who: str
    what: str
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass
class Tally:
    """What was seen on the way."""

    seeds: int = 0
    requests: int = 0
    tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    returns: int = 0  # of cancelled requests with their journals
    faults: int = 0  # of requests that can never run
    ties: int = 0


def file_of(root: Path, name: str, rank: int, seed: int) -> Path:
    """Where a rank leaves what it has to say: its logs, or its crash."""
    return root / f"{name}.{rank}.{seed}.json"


def read(root: Path, name: str, rank: int, seed: int) -> list[Log] | str:
    """Or why there is nothing."""
    file = file_of(root, name, rank, seed)
    if not file.exists():
        return "it said nothing: killed, hung, or ended by another's crash"
    raw = json.loads(file.read_text())
    return str(raw["crash"]) if "crash" in raw else [_log(log) for log in raw["logs"]]


def _log(raw: dict[str, Any]) -> Log:
    by_handle = ("tokens", "logprobs", "finished", "faults")
    return Log(**raw | {name: {int(handle): value for handle, value in raw[name].items()} for name in by_handle})


class Comparison:
    """One seed, everybody against the reference."""

    def __init__(self, root: Path, seed: int, tally: Tally, judge: "Judge") -> None:
        self._root, self._seed, self._work = root, seed, workload(seed)
        self._tally, self._judge = tally, judge

    def run(self, alone: Sequence[str], shapes: Sequence[str]) -> Iterator[Finding]:
        self._tally.seeds += 1
        expected = self._read("reference")
        if isinstance(expected, str):
            yield self._finding("reference", expected)
            return
        for name in (*alone, *shapes):
            if name != "fused" or file_of(self._root, name, 0, self._seed).exists():
                yield from self._leader(name, expected)
        for shape in shapes:
            yield from self._peers(shape)
        if "2x1" in shapes and not self._work.structured:
            yield from self._digests()

    def _read(self, name: str, rank: int = 0) -> list[Log] | str:
        return read(self._root, name, rank, self._seed)

    def _finding(self, who: str, what: str, **detail: Any) -> Finding:
        return Finding(self._seed, who, what, detail)

    def _leader(self, name: str, expected: list[Log]) -> Iterator[Finding]:
        logs = self._read(name)
        if isinstance(logs, str):
            yield self._finding(name, logs)
            return
        self._tally.preemptions += sum(log.preemptions for log in logs)
        self._tally.steps += sum(len(log.digests) for log in logs)
        for number, (log, after) in enumerate(pairwise([*logs, None])):
            assert log is not None
            for entry in self._work.phases[number]:
                for what, detail in self._request(entry, log, after, expected[number]):
                    yield self._finding(name, what, request=repr(entry), **detail)

    def _request(self, entry: Entry, log: Log, after: Log | None, expected: Log) -> Iterator[Problem]:
        """`after`: of the next phase, in which those who were cancelled may come back."""
        handle = entry.request.handle
        wanted, got = expected.tokens.get(handle, []), log.tokens.get(handle, [])
        last, at = log, handle
        if after is not None and entry.resumed and not log.ended(handle):
            last, at = after, handle_of_return(handle)
            got = got + after.tokens.get(at, [])
            self._tally.returns += 1
        self._tally.requests += 1
        self._tally.tokens += len(got)
        self._tally.faults += at in last.faults
        whole = last.ended(at)
        if got != (wanted if whole else wanted[: len(got)]):
            if self._judge.is_tie(self._work.architecture, entry.request, got, wanted):
                self._tally.ties += 1
            else:
                yield "other tokens", {"got": got, "wanted": wanted}
            return
        if whole and last.end(at) != expected.end(handle):
            yield "another end", {"got": last.end(at), "wanted": expected.end(handle)}
        if not whole and not entry.leaves:
            yield "it never ended", {"got": got}
        if not whole and entry.stop and not holds(got, entry.stop):
            yield "it was stopped before its stop", {"got": got}
        yield from self._logprobs(log.logprobs.get(handle, []), expected.logprobs.get(handle, []))

    def _logprobs(self, got: list[float], wanted: list[float]) -> Iterator[Problem]:
        if any(abs(a - b) > LOGPROB_TOLERANCE for a, b in zip(got, wanted, strict=False)):
            yield "other log-probabilities", {"got": got, "wanted": wanted}

    def _peers(self, shape: str) -> Iterator[Finding]:
        leader = self._read(shape)
        tp_size, pp_size = SHAPES[shape]
        for rank in range(1, tp_size * pp_size):
            logs = self._read(shape, rank)
            if isinstance(logs, str):
                yield self._finding(f"{shape} rank {rank}", logs)
            elif [log.seen_by_all for log in logs] != [log.seen_by_all for log in leader if isinstance(log, Log)]:
                yield self._finding(f"{shape} rank {rank}", "it says something else than the leader")

    def _digests(self) -> Iterator[Finding]:
        one, two = self._read("alone"), self._read("2x1")
        if not isinstance(one, str) and not isinstance(two, str):
            for number, (a, b) in enumerate(zip(one, two, strict=True)):
                if a.digests != b.digests:
                    yield self._finding("2x1", "other digests than one rank with the same plans", phase=number)


class Judge:
    """Whether two tokens are so close that float32's rounding decides between them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._models: dict[str, Any] = {}

    def is_tie(self, architecture: str, request: Request, got: list[int], wanted: list[int]) -> bool:
        """Of rows with a structure, nothing is said to be one."""
        at = next((i for i, pair in enumerate(zip(got, wanted, strict=False)) if pair[0] != pair[1]), None)
        if at is None or request.sampling.structure is not None:
            return False
        return {got[at], wanted[at]} <= self._choices(architecture, request, wanted[:at])

    @torch.inference_mode()
    def _choices(self, architecture: str, request: Request, before: list[int], *, count: int = 300) -> set[int]:
        """What is chosen after `before` from transformers' logits with noise."""
        tokens = array("i", [*request.prompt, *before])
        logits = self._model(architecture)(torch.tensor([tokens.tolist()])).logits[0, -1].float()
        noise = torch.randn(count, len(logits)) * NOISE * float(logits.abs().max())
        sampling = request.sampling
        stops = frozenset(sampling.stop_token_ids).union(() if sampling.ignore_eos else (EOS,))
        draws = [Draw(sampling, len(before), handle, tokens, len(request.prompt), stops) for handle in range(count)]
        return set(Sampler().choose(logits + noise, draws).tolist())

    def _model(self, architecture: str) -> Any:
        if architecture not in self._models:
            path = self._root / architecture
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            self._models[architecture] = model.eval()
        return self._models[architecture]

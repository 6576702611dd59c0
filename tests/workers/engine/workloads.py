"""Random workloads from a seed: what arrives at an engine, when, what it asks for, and what becomes of it meanwhile.

A workload has phases, with an idle engine between them; its limits are so tight that prompts come in chunks and
requests are preempted.  Requests are of every kind that there is, some of which can never run.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from hortator.workers.engine.engine import Limits
from hortator.workers.engine.step import Request, SamplingParams, Structure, StructureKind
from tests.workers.engine.checkpoints import ARCHITECTURES, EOS, MAX_MODEL_LEN, VOCAB
from tests.workers.engine.ways import JSON, REGEX

LONGEST_PROMPT = 200
PER_PHASE = 1000  # handles of a phase begin at its number times this
RESUMED = 500  # and those of requests that come back by so much later

STRUCTURES = (
    JSON,
    REGEX,
    Structure(StructureKind.REGEX, "(é|ß|日本){1,4}!"),
    Structure(StructureKind.LARK, 'start: word (" " word)*\nword: /[a-c]{1,3}/'),
    Structure(StructureKind.CHOICE, json.dumps(["yes", "no", "nor", "日本語"])),
    Structure(StructureKind.JSON_SCHEMA, json.dumps({"type": "array", "items": {"type": "boolean"}, "maxItems": 3})),
)
IMPOSSIBLE = (
    Structure(StructureKind.JSON_SCHEMA, json.dumps({"type": "strin"})),
    Structure(StructureKind.REGEX, "[a-"),
    Structure(StructureKind.LARK, "start: nothing"),
)


@dataclass(frozen=True)
class Entry:
    """A request, and what its client does."""

    request: Request
    arrives: int  # step of its phase
    cancelled_at: int | None = None  # step
    cancelled_after: int | None = None  # tokens
    stop: tuple[int, ...] = ()  # once it has generated these in a row it is cancelled, as for a stop string
    resumed: bool = False  # if it was cancelled, the next phase goes on from its tokens

    @property
    def leaves(self) -> bool:
        """It may be cancelled."""
        return bool(self.stop) or self.cancelled_at is not None or self.cancelled_after is not None


@dataclass(frozen=True)
class Workload:
    """Everything that a seed decides."""

    seed: int
    architecture: str
    limits: Limits
    others: Limits  # of another schedule, with the same max_model_len
    phases: tuple[tuple[Entry, ...], ...] = field(repr=False)

    @property
    def structured(self) -> bool:
        """When structures are compiled decides about steps, so these are not the same each time."""
        return any(entry.request.sampling.structure for phase in self.phases for entry in phase)


def workload(seed: int, *, num_phases: int = 2, per_phase: int = 14) -> Workload:
    rng = random.Random(seed)
    limits = _limits(rng)
    bases = [_tokens(rng, LONGEST_PROMPT) for _ in range(3)]
    structured = seed % 3 > 0
    return Workload(
        seed,
        ARCHITECTURES[seed % len(ARCHITECTURES)],
        limits,
        _limits(rng, max_model_len=limits.max_model_len),
        tuple(
            tuple(_entries(rng, phase * PER_PHASE, per_phase, bases, limits, structured=structured))
            for phase in range(num_phases)
        ),
    )


def _limits(rng: random.Random, *, max_model_len: int = 0) -> Limits:
    """A pool that holds hardly more than the longest sequence: of `max_model_len`, or of whatever length."""
    max_model_len = max_model_len or rng.choice((40, 64, 100, 150, 230, MAX_MODEL_LEN))
    block_size = rng.choice((1, 1, 2, 4, 4, 8, 16))
    return Limits(
        num_blocks=-(-max_model_len // block_size) + rng.choice((0, 0, 1, 5, 20)),
        block_size=block_size,
        max_num_seqs=rng.choice((1, 4, 16, 64, 64, 64)),
        max_model_len=max_model_len,
        max_num_batched_tokens=rng.choice((1, 3, 8, 24, 40, 100, 512)),
        prefix_cache=rng.random() < 0.75,
    )


def _tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(VOCAB) for _ in range(count))


def _entries(
    rng: random.Random, handle: int, count: int, bases: list[tuple[int, ...]], limits: Limits, *, structured: bool
) -> Iterator[Entry]:
    arrives = 0
    end = handle + count
    while handle < end:
        arrives += rng.choice((0, 0, 0, 0, 0, 1, 3, 15))
        request = Request(
            handle,
            _prompt(rng, bases, limits),
            _sampling(rng, structured=structured),
            priority=rng.randrange(3),
            deadline_ms=rng.choice((0, 0, rng.randrange(1, 10_000))),
            salt=rng.choice((0, 0, 1)),
        )
        if rng.random() < 0.08:
            request = _impossible(rng, request, limits, structured=structured)
        for answer in range(rng.choice((1, 1, 1, 2, 4))):  # n
            sampling = replace(request.sampling, seed=request.sampling.seed + answer)
            yield _entry(rng, replace(request, handle=handle, sampling=sampling), arrives)
            handle += 1


def _entry(rng: random.Random, request: Request, arrives: int) -> Entry:
    fate = rng.random()
    resumed = rng.random() < 0.8
    if fate < 0.15:
        return Entry(request, arrives, cancelled_at=arrives + rng.choice((0, 1, 2, 5, 12, 30)), resumed=resumed)
    if fate < 0.35:
        return Entry(request, arrives, cancelled_after=rng.randint(1, 12), resumed=resumed)
    if fate < 0.45:
        return Entry(request, arrives, stop=_tokens(rng, 1), resumed=False)
    return Entry(request, arrives)


def _prompt(rng: random.Random, bases: list[tuple[int, ...]], limits: Limits) -> tuple[int, ...]:
    longest = min(LONGEST_PROMPT, limits.max_model_len - 1)
    count = rng.choice((1, 2, rng.randint(1, 20), rng.randint(1, 40), rng.randint(1, longest), longest))
    if rng.random() < 0.3:
        return _tokens(rng, min(count, longest))
    shared = rng.choice(bases)[: min(count, longest)]
    return shared[: rng.randint(0, len(shared))] + _tokens(rng, 1) if rng.random() < 0.5 else shared


def _sampling(rng: random.Random, *, structured: bool) -> SamplingParams:
    def maybe(probability: float, name: str, value: Any) -> dict[str, Any]:
        return {name: value} if rng.random() < probability else {}

    logprobs = rng.random() < 0.2
    options: dict[str, Any] = {
        "max_tokens": rng.choice((1, 2, rng.randint(1, 25), rng.randint(10, 60), rng.choice((8, 30, 10_000)))),
        "seed": rng.getrandbits(63),
        **maybe(0.6, "temperature", rng.choice((1e-6, 2e-5, 0.4, 0.8, 1.0, 1.0, 1.7, 20.0))),
        **maybe(0.25, "top_k", rng.choice((1, 2, 7, 40, VOCAB, 10_000))),
        **maybe(0.25, "top_p", rng.choice((1e-9, 0.1, 0.5, 0.9, 0.999))),
        **maybe(0.2, "min_p", rng.choice((0.01, 0.2, 1.0))),
        **maybe(0.25, "repetition_penalty", rng.choice((0.01, 0.7, 1.3, 100.0))),
        **maybe(0.25, "presence_penalty", rng.choice((-2.0, 0.7, 2.0))),
        **maybe(0.25, "frequency_penalty", rng.choice((-2.0, 0.4, 2.0))),
        **maybe(0.2, "logit_bias", _biases(rng)),
        **maybe(0.2, "min_tokens", rng.choice((1, 5, 30, 10_000))),
        **maybe(0.2, "stop_token_ids", tuple(rng.sample(range(VOCAB), rng.choice((1, 3, 20))))),
        **maybe(0.3, "ignore_eos", True),
        **({"logprobs": True, "top_logprobs": rng.choice((0, 1, 5, 20))} if logprobs else {}),
        **maybe(0.35 if structured else 0.0, "structure", rng.choice(STRUCTURES)),
    }
    return SamplingParams(**options)


def _biases(rng: random.Random) -> tuple[tuple[int, float], ...]:
    ids = rng.sample(range(VOCAB), rng.choice((1, 3, 50, VOCAB)))
    if rng.random() < 0.3:
        ids = sorted({EOS, *ids})
    return tuple((token_id, rng.choice((-100.0, -3.0, 0.5, 5.0, 100.0))) for token_id in ids)


def _impossible(rng: random.Random, request: Request, limits: Limits, *, structured: bool) -> Request:
    """It fails, and nobody else."""
    sampling = request.sampling
    wrong = [
        replace(request, prompt=()),
        replace(request, prompt=(*request.prompt, VOCAB)),
        replace(request, prompt=(-1,)),
        replace(request, prompt=(5,) * limits.max_model_len),
        replace(request, sampling=replace(sampling, max_tokens=0)),
        replace(request, sampling=replace(sampling, top_p=0.0)),
        replace(request, sampling=replace(sampling, logit_bias=((VOCAB, 1.0),))),
        replace(request, sampling=replace(sampling, stop_token_ids=(VOCAB,))),
        replace(request, sampling=replace(sampling, stop_token_ids=tuple(range(VOCAB)), min_tokens=2)),
        *(replace(request, sampling=replace(sampling, structure=s)) for s in IMPOSSIBLE if structured),
    ]
    return rng.choice(wrong)

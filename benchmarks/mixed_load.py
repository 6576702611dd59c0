"""The mixed workload of bench_engine.py: requests of many lengths, all there at once, until the last one has ended.

Arms, in turn on the same weights:
- hortator: all requests in one plan.
- generate: transformers' static batches, padded on the left, in the order of arrival.  A batch runs until its longest
  output is done; tokens beyond a request's own length are made and not counted.  Several batch sizes, for a large batch
  pads and waits more and a small one fills the processor less.
- continuous batching: transformers' own, each request with its own length; with its own limits and with fewer requests
  at a time, for its mask is as wide as all requests together.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from hortator.workers.engine.engine import PagedEngine
from hortator.workers.engine.step import Request, SamplingParams, StepPlan

PAD = 0


@dataclass(frozen=True, slots=True)
class Wanted:
    """One request."""

    prompt: list[int]
    output: int


Answers = list[list[int]]
Arm = Callable[[Sequence[Wanted]], Answers]


def draw(
    seed: int, *, count: int, vocabulary: int, prompts: tuple[int, int] = (8, 256), outputs: tuple[int, int] = (8, 128)
) -> list[Wanted]:
    """Uniform lengths, both ends included."""
    rng = random.Random(seed)
    return [
        Wanted([rng.randrange(1, vocabulary) for _ in range(rng.randint(*prompts))], rng.randint(*outputs))
        for _ in range(count)
    ]


def hortator(engine: PagedEngine, wanted: Sequence[Wanted]) -> Answers:
    answers: Answers = [[] for _ in wanted]
    admit = tuple(
        Request(handle, tuple(one.prompt), SamplingParams(max_tokens=one.output, ignore_eos=True))
        for handle, one in enumerate(wanted)
    )
    engine.apply(StepPlan(0, admit))
    while True:
        for token in engine.execute().tokens:
            answers[token.handle].append(token.token_id)
        if engine.idle:
            return answers
        engine.apply(StepPlan(0))


def generate(model: transformers.PreTrainedModel, batch: int, wanted: Sequence[Wanted]) -> Answers:
    answers: Answers = []
    for first in range(0, len(wanted), batch):
        answers += _generate_batch(model, wanted[first : first + batch])
    return answers


def _generate_batch(model: transformers.PreTrainedModel, wanted: Sequence[Wanted]) -> Answers:
    width = max(len(one.prompt) for one in wanted)
    longest = max(one.output for one in wanted)
    padding = [width - len(one.prompt) for one in wanted]
    rows = torch.tensor([[PAD] * pad + one.prompt for pad, one in zip(padding, wanted, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding])
    with torch.inference_mode():
        made = model.generate(
            rows, attention_mask=mask, max_new_tokens=longest, do_sample=False, eos_token_id=None, pad_token_id=PAD
        )
    return [row[: one.output] for row, one in zip(made[:, width:].tolist(), wanted, strict=True)]


class Continuous:
    """transformers' continuous batching, started beforehand: its start-up does not count."""

    def __init__(self, model: transformers.PreTrainedModel, *, requests_at_a_time: int | None = None) -> None:
        self._model = model
        self._config = transformers.ContinuousBatchingConfig(max_requests_per_batch=requests_at_a_time)
        self.seconds = 0.0

    def __call__(self, wanted: Sequence[Wanted]) -> Answers:
        generation = transformers.GenerationConfig(
            max_new_tokens=max(one.output for one in wanted), do_sample=False, eos_token_id=-1, pad_token_id=PAD
        )
        opened = self._model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=self._config, timeout=5
        )
        with opened as manager:
            began = time.perf_counter()
            names = [manager.add_request(one.prompt, max_new_tokens=one.output, eos_token_id=-1) for one in wanted]
            found: dict[str, list[int]] = {}
            while len(found) < len(wanted):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    found[result.request_id] = result.generated_tokens
                elif result is None and not manager.is_running():
                    raise RuntimeError("transformers' continuous batching has ended before its requests")
            self.seconds = time.perf_counter() - began
        return [found[name] for name in names]


def measure_mix(
    engine: PagedEngine,
    model: transformers.PreTrainedModel,
    *,
    rounds: int,
    static_batches: Sequence[int],
    load: Callable[[int], list[Wanted]],
) -> list[dict[str, Any]]:
    """One row an arm.  Each round has a load of its own, for what was asked before is in the prefix cache."""
    arms: dict[str, Arm] = {"hortator": partial(hortator, engine)}
    for batch in static_batches:
        arms[f"generate(), batches of {batch}"] = partial(generate, model, batch)
    arms["continuous batching"] = Continuous(model)
    arms["continuous batching, 16 at a time"] = Continuous(model, requests_at_a_time=16)
    arms["hortator"](load(-1))  # warm-up, as of each other arm
    for arm in list(arms.values())[1:]:
        arm(load(-1)[:4])
    rates: dict[str, list[float]] = {name: [] for name in arms}
    alike: dict[str, list[int]] = {name: [0, 0] for name in arms}
    for round_ in range(rounds):
        wanted = load(round_)
        for name, seconds, answers in _round(arms, wanted):
            if name == "hortator":
                ours = answers
            rates[name].append(sum(map(len, answers)) / seconds)
            alike[name][0] += sum(a == b for a, b in zip(ours, answers, strict=True))
            alike[name][1] += len(answers)
    return [
        {
            "arm": name,
            "tokens_per_s": statistics.median(found),
            "lowest": min(found),
            "highest": max(found),
            "hortator_faster_by": statistics.median(o / t for o, t in zip(rates["hortator"], found, strict=True)),
            "same_answers": alike[name],
        }
        for name, found in rates.items()
    ]


def _round(arms: dict[str, Arm], wanted: Sequence[Wanted]) -> Iterator[tuple[str, float, Answers]]:
    for name, arm in arms.items():
        began = time.perf_counter()
        answers = arm(wanted)
        seconds = time.perf_counter() - began
        assert [len(answer) for answer in answers] == [one.output for one in wanted], name
        yield name, arm.seconds if isinstance(arm, Continuous) else seconds, answers


def print_mix(rows: Sequence[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    for column in ("arm", "output tokens/s", "lowest", "highest", "hortator faster by", "same answers as hortator"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for row in rows:
        same, count = row["same_answers"]
        table.add_row(
            str(row["arm"]),
            *(f"{row[name]:,.0f}" for name in ("tokens_per_s", "lowest", "highest")),
            f"{row['hortator_faster_by']:.2f}x",
            f"{same} of {count}",
        )
    Console(width=120).print(table)

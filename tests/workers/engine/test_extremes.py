"""Requests at the edges of what may be asked for, in one batch: each gets what makes sense, and nobody else notices.

What can never run is in test_engine.py.
"""

import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from hortator.workers.engine.step import Finish, Request, SamplingParams, Structure, StructureKind
from tests.workers.engine.checkpoints import EOS, MAX_MODEL_LEN, VOCAB
from tests.workers.engine.drive import Outcome, build, run

PROMPT = tuple(range(10, 30))
INNOCENT = Request(99, PROMPT, SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.9, seed=5))
ABC = Structure(StructureKind.REGEX, "[a-c]{3}")
LETTERS = tuple(ord(letter) + 2 for letter in "abc")
EVERY_TOKEN = tuple(range(VOCAB))
AGAINST_ALL = tuple((token, -100.0) for token in EVERY_TOKEN)

# What it asks for; then its text, the number of its tokens, and why it ended.
EXTREMES: dict[str, tuple[dict[str, Any], str, int, Finish]] = {
    "a structure biased against": (
        {"structure": ABC, "logit_bias": tuple((token, -100.0) for token in LETTERS)}, "[a-c]{3}", 4, Finish.STOP,
    ),
    "a structure with every token biased against": (
        {"structure": ABC, "logit_bias": AGAINST_ALL}, "[a-c]{3}", 4, Finish.STOP,
    ),
    "a structure whose end is biased against": (
        {"structure": ABC, "logit_bias": ((EOS, -100.0),)}, "[a-c]{3}", 4, Finish.STOP,
    ),
    "a structure of stop tokens": ({"structure": ABC, "stop_token_ids": LETTERS}, "[a-c]", 1, Finish.STOP),
    "a structure around a stop token": (
        {"structure": ABC, "stop_token_ids": LETTERS[:1], "min_tokens": 3}, "[bc]{3}", 4, Finish.STOP,
    ),
    "a structure shorter than min_tokens": ({"structure": ABC, "min_tokens": 9}, "[a-c]{3}", 4, Finish.STOP),
    "a structure longer than max_tokens": ({"structure": ABC, "max_tokens": 2}, "[a-c]{2}", 2, Finish.LENGTH),
    "a structure that may not end": ({"structure": ABC, "ignore_eos": True}, "[a-c]{3}", 12, Finish.LENGTH),
    "every filter at its limit": (
        {"structure": ABC, "temperature": 20.0, "top_k": 2**31 - 1, "top_p": 1e-9, "min_p": 1.0,
         "repetition_penalty": 100.0}, "[a-c]{3}", 4, Finish.STOP,
    ),
    "min_tokens beyond max_tokens": ({"min_tokens": 99}, ".*", 12, Finish.LENGTH),
    "all but a few tokens as stop tokens": (
        {"min_tokens": 99, "stop_token_ids": EVERY_TOKEN[:250]}, ".*", 12, Finish.LENGTH,
    ),
    "every token biased against": ({"logit_bias": AGAINST_ALL, "ignore_eos": True}, ".*", 12, Finish.LENGTH),
    "max_tokens beyond the context": (
        {"max_tokens": 1_000_000, "ignore_eos": True}, ".*", MAX_MODEL_LEN - len(PROMPT), Finish.LENGTH,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcome(speaking: Path) -> Outcome:
    sampling = (SamplingParams(**{"max_tokens": 12, **options}) for options, *_ in EXTREMES.values())
    requests = [Request(handle, PROMPT, asked) for handle, asked in enumerate(sampling)]
    full = Request(98, (5,) * (MAX_MODEL_LEN - 1), SamplingParams(max_tokens=5, ignore_eos=True))
    return run(build(speaking), [*requests, full, INNOCENT])


@pytest.mark.parametrize("name", EXTREMES)
def test_what_is_asked_to_excess_is_done_as_far_as_it_can_be(name: str, outcome: Outcome, speaking: Path) -> None:
    handle, (_, pattern, num_tokens, finish) = list(EXTREMES).index(name), EXTREMES[name]
    tokens = outcome.tokens[handle]
    text = Tokenizer.from_file(str(speaking / "tokenizer.json")).decode(tokens)
    assert re.fullmatch(pattern, text, re.DOTALL)
    assert (len(tokens), outcome.finished[handle]) == (num_tokens, finish)


def test_a_prompt_that_leaves_room_for_one_token_gets_one(outcome: Outcome) -> None:
    assert (len(outcome.tokens[98]), outcome.finished[98]) == (1, Finish.LENGTH)


def test_nobody_notices_those_who_ask_for_too_much(outcome: Outcome, speaking: Path) -> None:
    assert outcome.faults == {}
    assert outcome.tokens[99] == run(build(speaking), [INNOCENT]).tokens[99]

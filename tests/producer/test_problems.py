"""What is wrong with an object is said by field, without pydantic's words and without the values."""

import pytest
from pydantic import ValidationError

from hortator.producer.problems import listed
from hortator.producer.schema import Job


def problems_of(**fields: object) -> str:
    with pytest.raises(ValidationError) as refusal:
        Job.model_validate({"model": "m", "prompt": "SECRET"} | fields)
    return listed(refusal.value.errors())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"priority": "SECRET"}, "priority: Input should be 'interactive', 'standard' or 'batch'"),
        ({"prompt": None}, "give exactly one of prompt, token_ids, messages; got none"),
        (
            {"messages": [{"role": "x", "content": "SECRET"}], "prompt": None},
            "messages.0.role: Input should be 'system', 'user' or 'assistant'",
        ),
        ({"token_ids": []}, "token_ids: Tuple should have at least 1 item after validation, not 0"),
        ({"sampling": {"top_logprobs": 2}}, "sampling: top_logprobs needs logprobs: true"),
        ({"metadata": {"k" * 99: "v"}}, f"metadata.{'k' * 64}.[key]: String should have at most 64 characters"),
        ({"prompt": "SECRET\ud800"}, "prompt: half of a surrogate pair, which is no text"),
        ({"metadata": {"ä": 1}}, "metadata.\\xe4: Input should be a valid string"),
    ],
)
def test_a_problem_is_its_field_and_what_is_wrong_with_it(fields: dict[str, object], said: str) -> None:
    assert problems_of(**fields) == said


def test_of_many_problems_eight_are_named() -> None:
    said = problems_of(sampling={"stop": [1] * 20})
    assert said.count("sampling.stop.") == 8
    assert said.endswith("; and 12 more")


def test_of_wrong_token_ids_the_first_is_named_for_there_may_be_a_million() -> None:
    assert problems_of(token_ids=[1, -1, -2], prompt=None).startswith("token_ids.1: ")
    assert problems_of(token_ids=[1, -1, -2], prompt=None).count("token_ids") == 1


def test_what_may_be_shown_of_a_value_is_for_the_caller_to_say() -> None:
    with pytest.raises(ValidationError) as refusal:
        Job.model_validate({"model": "m", "prompt": "x", "deadline_s": -1})
    said = listed(refusal.value.errors(), got=lambda problem: f" (got {problem['input']})")
    assert said == "deadline_s: Input should be greater than 0 (got -1)"

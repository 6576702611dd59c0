"""The sampling parameters on the wire: what is taken, what is refused, and that nothing changes for who uses none."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from hortator.producer.journal import decode_chunk, encode_chunk, from_token
from hortator.producer.schema import MAX_STRUCTURE_CHARS, Chunk, Sampling

EVERYTHING: dict[str, Any] = {
    "max_tokens": 20,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.05,
    "seed": 1,
    "stop": ["END"],
    "stop_token_ids": [7],
    "logprobs": True,
    "top_logprobs": 20,
    "repetition_penalty": 1.2,
    "presence_penalty": -2.0,
    "frequency_penalty": 2.0,
    "logit_bias": {"5": -100, "6": 2.5},
    "min_tokens": 3,
    "structure": {"type": "regex", "pattern": "a+"},
}
STRUCTURES: list[dict[str, Any]] = [
    {"type": "json"},
    {"type": "json_schema", "json_schema": {"type": "object", "properties": {"b": {}, "a": {}}}},
    {"type": "regex", "pattern": "[a-z]+"},
    {"type": "grammar", "grammar": 'start: "a"'},
    {"type": "choice", "choices": ["yes", "no"]},
]


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def test_every_parameter_survives_the_wire() -> None:
    sampling = Sampling.model_validate(EVERYTHING)
    assert sampling.logit_bias == {5: -100.0, 6: 2.5}
    assert (
        Sampling.model_validate(json.loads(json.dumps(sampling.model_dump(mode="json", exclude_none=True)))) == sampling
    )


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda structure: structure["type"])
def test_every_structure_survives_the_wire_in_its_order(structure: dict[str, Any]) -> None:
    sampling = Sampling.model_validate({"structure": structure})
    assert json.dumps(sampling.model_dump(mode="json", exclude_none=True)["structure"]) == json.dumps(structure)
    assert Sampling.model_validate_json(json.dumps(sampling.model_dump(mode="json", exclude_none=True))) == sampling


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"repetition_penalty": 0}, "greater than or equal to 0.01"),
        ({"repetition_penalty": 1e-38}, "greater than or equal to 0.01"),
        ({"presence_penalty": 2.1}, "less than or equal to 2"),
        ({"frequency_penalty": "NaN"}, "finite"),
        ({"logit_bias": {"-1": 1}}, "greater than or equal to 0"),
        ({"logit_bias": {"1": 100.5}}, "less than or equal to 100"),
        ({"logit_bias": {"x": 1}}, "valid integer"),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, "at most 1024"),
        ({"min_tokens": 300}, "more than max_tokens"),
        ({"logprobs": True, "top_logprobs": 21}, "less than or equal to 20"),
        ({"top_logprobs": 1}, "needs logprobs"),
        ({"structure": {"type": "xml"}}, "'json', 'json_schema', 'regex', 'grammar', 'choice'"),
        ({"structure": {"type": "regex", "pattern": ""}}, "at least 1 character"),
        ({"structure": {"type": "choice", "choices": []}}, "at least 1 item"),
        ({"structure": {"type": "regex", "pattern": "x" * MAX_STRUCTURE_CHARS}}, f"limit is {MAX_STRUCTURE_CHARS}"),
        ({"structure": {"type": "json_schema", "json_schema": nested(5000)}}, "nested too deeply"),
        ({"structure": {"type": "json_schema", "json_schema": {"const": 1e999}}}, "a number that JSON does not have"),
        ({"structure": {"type": "json_schema", "json_schema": {"const": "\ud800"}}}, "surrogate pair .U.D800"),
        ({"structure": {"type": "json_schema", "json_schema": {"properties": {"\ud800": {}}}}}, "surrogate pair"),
        ({"structure": {"type": "json_schema", "json_schema": {"const": object()}}}, "is no JSON"),
    ],
)
def test_what_cannot_be_is_refused_and_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Sampling.model_validate(wrong)


def test_a_journal_entry_is_as_before_unless_the_likeliest_tokens_were_asked_for() -> None:
    plain = Chunk(index=3, token_ids=(1, 2), text="ab", logprobs=(-0.5, -1.0))
    assert encode_chunk(plain) == b'[3,[1,2],"ab",[-0.5,-1.0]]'
    asked = plain.model_copy(update={"top_logprobs": (((1, -0.5), (9, -2.0)), ())})
    for chunk in (plain, asked):
        assert decode_chunk(encode_chunk(chunk)) == chunk
    assert from_token([asked], 4)[0].top_logprobs == ((),)

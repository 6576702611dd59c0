"""The sampling parameters on the wire: what is taken, what is refused, and that nothing changes for who uses none."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from hortator.producer.journal import encode_chunk, from_token, read_chunk
from hortator.producer.schema import MAX_STRUCTURE_CHARS, Chunk, Job, Message, Regex, Sampling

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
        assert read_chunk(encode_chunk(chunk)) == chunk
    assert from_token([asked], 4)[0].top_logprobs == ((),)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Sampling(temprature=0.7), "Sampling has no field temprature: did you mean temperature?"),
        (lambda: Job(model="m", prompt="x", samplin={}), "Job has no field samplin: did you mean sampling?"),
        (lambda: Job(model="m", prompt="x", sampling={"topk": 1}), r"Sampling has no field topk: did you mean top_k\?"),
        (lambda: Message(role="user", content="x", zzz=1), "Message has no field zzz: there are role, content"),
        (lambda: Regex(**{"pattrn": "a"}), "Regex has no field pattrn: did you mean pattern?"),
    ],
)
def test_a_mistyped_keyword_is_refused_by_name_with_the_field_that_is_meant(
    make: Callable[[], object], said: str
) -> None:
    with pytest.raises(ValidationError, match=said) as refusal:
        make()
    assert "0.7" not in str(refusal.value)  # what was given may be a prompt


def test_an_unknown_field_from_the_wire_is_ignored_at_any_depth() -> None:
    """A newer minor may have sent it."""
    newer = {"newer": 1}
    structure = {"type": "regex", "pattern": "a", **newer}
    job = {"model": "m", "prompt": "x", "sampling": {"temperature": 0.5, "structure": structure, **newer}, **newer}
    plain = Job(model="m", prompt="x", sampling=Sampling(temperature=0.5, structure=Regex(pattern="a")))
    assert Job.model_validate(job) == Job.model_validate_json(json.dumps(job)) == plain
    chat = {"model": "m", "messages": [{"role": "user", "content": "x", **newer}]}
    assert Job.model_validate(chat).messages == (Message(role="user", content="x"),)

"""Requests that sample in every way there is, structures that cannot be among them."""

import json
from dataclasses import replace
from typing import Any

from hortator.workers.engine.step import Request, SamplingParams, Structure, StructureKind

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
JSON = Structure(StructureKind.JSON_SCHEMA, json.dumps(SCHEMA))
REGEX = Structure(StructureKind.REGEX, "[a-z]{2,6}-[0-9]{3}")
IMPOSSIBLE = Structure(StructureKind.JSON_SCHEMA, json.dumps({"type": "strin"}))
WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"repetition_penalty": 1.5},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"logit_bias": ((5, 8.0), (17, -100.0)), "min_tokens": 20},
    {"structure": JSON, "max_tokens": 100},
    {"structure": REGEX, "repetition_penalty": 1.2, "logit_bias": ((ord("b") + 2, 3.0),)},
    {"structure": IMPOSSIBLE},
    {"structure": JSON, "temperature": 1.0, "top_p": 0.9, "frequency_penalty": 0.3, "max_tokens": 100},
    {"logprobs": True, "top_logprobs": 3, "presence_penalty": 2.0},
]


def ways_of_sampling(*, greedy: bool = False) -> list[Request]:
    """Two requests of each, with prompts of different lengths; `greedy` leaves the temperature out."""
    requests = []
    for handle, way in enumerate(WAYS * 2):
        sampling = SamplingParams(**{"max_tokens": 30, "seed": handle, **way})
        prompt = tuple(2 + (7 * handle + at) % 200 for at in range(3 + 4 * (handle % 9)))
        requests.append(Request(handle, prompt, replace(sampling, temperature=0.0) if greedy else sampling))
    return requests

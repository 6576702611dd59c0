"""How many values a job may have, counted before anybody looks at them.

pydantic makes an error of each wrong one: a million of them hold up for ten seconds whoever reads the job, and for a
leader that is longer than its lease.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from .problems import field_name
from .schema import MAX_TOKENS

MAX_VALUES = 32_768  # beside token ids; the largest structure has some 22,000
MAX_VALUES_OF_ALL = MAX_TOKENS + MAX_VALUES


def too_many(fields: Mapping[str, Any]) -> str | None:
    """What to say of a job, as decoded from JSON, that has more values than any job can have."""
    left = MAX_VALUES
    for name, value in fields.items():
        if name == "token_ids" and isinstance(value, list):
            if len(value) > MAX_TOKENS:
                return f"token_ids: {len(value)} values; the limit is {MAX_TOKENS}"
            continue
        for size in sizes(value):
            left -= size
            if left < 0:
                return f"{field_name([name])}: too many values; the limit beside token_ids is {MAX_VALUES}"
    return None


def sizes(value: Any) -> Iterator[int]:
    """Of each object and array, the outer ones first, and none is looked into before its size is told."""
    waiting = [value]
    while waiting:
        outer = waiting.pop()
        if isinstance(outer, dict | list):
            yield len(outer)
            inner = outer.values() if isinstance(outer, dict) else outer
            waiting += [one for one in inner if isinstance(one, dict | list)]

"""The arguments of a client's calls, looked at before anything is done with them: BadRequest names the one that is of
no use, what was given (never its text, which may be a prompt) and what is wanted.
"""

import inspect
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from .errors import BadRequest
from .problems import Problem, listed
from .schema import Tenant

MAX_SECONDS = 1e9  # what is longer is for ever

T = TypeVar("T")

_TENANT: TypeAdapter[str] = TypeAdapter(Tenant)


def unwanted(name: str, got: object, wanted: str) -> BadRequest:
    return BadRequest(f"{name}: wanted is {wanted}, got {shown(got)}")


def shown(value: object) -> str:
    """A number as it is, of all else only the type."""
    return repr(value)[:20] if type(value) in (int, float) else type(value).__name__


def got_type(problem: Problem) -> str:
    """Behind what pydantic says of a value of the wrong type: which type that is."""
    of_type = problem["type"].endswith("_type") or problem["type"] in ("enum", "literal_error")
    return f" (got {type(problem['input']).__name__})" if of_type and not isinstance(problem["input"], str) else ""


def seconds(name: str, value: object) -> float:
    if isinstance(value, int | float) and value >= 0:  # which NaN is not
        return float(min(value, MAX_SECONDS))
    raise unwanted(name, value, "a number of seconds that is not negative")


def count(name: str, value: object) -> int:
    if isinstance(value, int) and value >= 0:
        return int(value)
    raise unwanted(name, value, "a whole number that is not negative")


def text(name: str, value: object) -> str:
    if isinstance(value, str):
        return value
    raise unwanted(name, value, "a str")


def tenant(value: object) -> str:
    try:
        return _TENANT.validate_python(value)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        raise BadRequest(f"tenant: {listed(problems, got=got_type)}") from None


def several(name: str, values: object, kind: type[T], wanted: str) -> list[T]:
    """The elements of an iterable, each of that kind."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise unwanted(name, values, f"a list or another iterable, each element {wanted}")
    found = list(values)
    for place, value in enumerate(found):
        if not isinstance(value, kind):
            raise unwanted(f"{name}[{place}]", value, wanted)
    return found


def job_ids(values: object) -> list[str]:
    return several("job_ids", values, str, "an id (a str, as `handle.id`)")


def store(value: Any, *, for_asyncio: bool) -> Any:
    """What has the calls of a store, and these are coroutines or are not."""
    if not all(callable(getattr(value, call, None)) for call in ("enqueue", "statuses", "ended", "issued")):
        raise unwanted("where", value, "a Redis URL, a store, or None for the environment's")
    if inspect.iscoroutinefunction(value.enqueue) is not for_asyncio:
        raise unwanted("where", value, "a store for asyncio, or Client" if for_asyncio else "a store, or AsyncClient")
    return value

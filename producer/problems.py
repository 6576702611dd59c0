"""What pydantic found wrong, in words for people: which field, and what.

The words never hold the value, which may be a prompt or a password; who knows that it is neither may add it.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

MAX_NAMED = 8
MAX_NAME_CHARS = 64
NO_TEXT = "half of a surrogate pair, which is no text"

Problem = Mapping[str, Any]
"""pydantic_core.ErrorDetails, or what FastAPI has made of one."""


def nothing(_: Problem) -> str:
    return ""


def listed(problems: Iterable[Problem], *, got: Callable[[Problem], str] = nothing) -> str:
    """One line for all, at most eight by name; `got` says what may be shown of a value."""
    lines = [worded(problem) + got(problem) for problem in first_causes(list(problems))]
    more = len(lines) - MAX_NAMED
    return "; ".join(lines[:MAX_NAMED]) + (f"; and {more} more" if more > 0 else "")


def first_causes(problems: Sequence[Problem]) -> Iterator[Problem]:
    """Without the tuples that pydantic finds too short only because their elements are wrong."""
    inside = {problem["loc"][:-depth] for problem in problems for depth in range(1, len(problem["loc"]))}
    return (problem for problem in problems if problem["type"] != "too_short" or problem["loc"] not in inside)


def worded(problem: Problem) -> str:
    """`sampling.max_tokens: Input should be ...`; what is wrong with the whole stands alone."""
    name = field_name(problem["loc"])
    return f"{name}: {text_of(problem)}" if name else text_of(problem)


def field_name(location: Iterable[str | int]) -> str:
    """sampling.stop.0; keys that somebody chose are shortened and escaped."""
    return ".".join(str(part)[:MAX_NAME_CHARS].encode("unicode_escape").decode() for part in location)


def text_of(problem: Problem) -> str:
    """What is wrong, without pydantic's own word before our ValueErrors."""
    if problem["type"] == "string_unicode":
        return NO_TEXT
    return str(problem["msg"]).removeprefix("Value error, ")


def meant(name: str, known: Iterable[str]) -> str:
    """What whoever wrote a name that there is not will have meant."""
    names = list(known)
    nearest = difflib.get_close_matches(name[:MAX_NAME_CHARS], names, n=1)
    return f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(names)}"

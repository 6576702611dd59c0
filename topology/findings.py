"""What an examination says: one finding a check, with what to do.  Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

NAMED_HOSTS = 4


class Grade(StrEnum):
    """A warning does not stop anybody; a failure does."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: `text` says what is so, `advice` what to do about it, `hosts` whom it concerns."""

    check: str
    grade: Grade
    text: str
    advice: str = ""
    hosts: tuple[str, ...] = ()


def fine(check: str, text: str) -> Finding:
    return Finding(check, Grade.OK, text)


def wrong(check: str, text: str, advice: str, hosts: Iterable[str] = ()) -> Finding:
    return Finding(check, Grade.FAIL, text, advice, tuple(hosts))


def doubtful(check: str, text: str, advice: str, hosts: Iterable[str] = ()) -> Finding:
    return Finding(check, Grade.WARN, text, advice, tuple(hosts))


def named(hosts: Sequence[str]) -> str:
    """The hosts of a list, as many as one reads."""
    more = len(hosts) - NAMED_HOSTS
    return ", ".join(hosts[:NAMED_HOSTS]) + (f" and {more} more" if more > 0 else "")

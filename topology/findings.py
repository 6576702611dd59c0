"""What an examination says: one finding a check, with what to do.  Pure."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
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


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def named(hosts: Sequence[str]) -> str:
    """The hosts of a list, as many as one reads."""
    more = len(hosts) - NAMED_HOSTS
    return ", ".join(hosts[:NAMED_HOSTS]) + (f" and {more} more" if more > 0 else "")


def grouped(values: Mapping[str, object]) -> dict[str, list[str]]:
    """Hosts by what they share, the commonest first."""
    by_value: defaultdict[str, list[str]] = defaultdict(list)
    for host, value in values.items():
        by_value[str(value)].append(host)
    order = Counter({value: len(hosts) for value, hosts in by_value.items()})
    return {value: by_value[value] for value, _ in order.most_common()}

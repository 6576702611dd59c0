"""The hostfile: which hosts there are, and how many GPUs each has.  Pure, but for `read_hostfile`.

    # a comment
    worker-0 slots=8      DeepSpeed's grammar (of 0.19.8)
    10.0.0.2 8            the short form
    [2001:db8::1] 8       with brackets, as filters want them, or without

Order is kept: it decides who is first.  What DeepSpeed reads, this reads alike, except where DeepSpeed would go on with
something that nobody meant: text after the number of slots (`slots=2abc` is 2 there), no slots at all, one host under
two spellings, and names that ssh would take for something else.  These are refused here.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .address import address_problem, canonical, shown, unbracketed
from .errors import BadHostfile

MAX_SLOTS = 1024
MAX_HOSTS = 16_384
MAX_TOTAL_SLOTS = 131_072  # a plan of more takes longer than people wait
MAX_HOSTFILE_CHARS = 8 << 20

_LINE = re.compile(r"(?P<host>\S+)\s+(?:slots=)?(?P<slots>[0-9]+)(?:\s+#.*)?")
_BEGINS_WELL = re.compile(r"\S+\s+(?:slots=)?[0-9]+(?P<rest>.+)")


@dataclass(frozen=True, slots=True)
class Host:
    """One line: `slots` GPUs (or processes, without GPUs) numbered from 0."""

    address: str
    slots: int


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The hosts of this file.  Raises BadHostfile."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_HOSTFILE_CHARS + 1)
    except OSError as error:
        raise BadHostfile(f"cannot read the hostfile {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadHostfile(f"{path} is not UTF-8 at byte {error.start}: save it as UTF-8 text") from error
    return parse_hostfile(text, source=str(path))


def parse_hostfile(text: str, *, source: str = "hostfile") -> tuple[Host, ...]:
    """The hosts in the order of their lines.  Raises BadHostfile, naming `source` and the line."""
    if len(text) > MAX_HOSTFILE_CHARS:
        raise BadHostfile(
            f"{source}: more than {MAX_HOSTFILE_CHARS} characters are no hostfile: is this the right file?"
        )
    hosts: list[Host] = []
    lines_of: dict[str, int] = {}
    for number, line in _entries(text):
        where = f"{source}, line {number}"
        host = _parse_line(line, where)
        first = lines_of.setdefault(canonical(host.address), number)
        if first != number:
            raise BadHostfile(
                f"{where}: host {host.address} stands in line {first} already: "
                f"give each host one line, with all of its slots"
            )
        hosts.append(host)
    if not hosts:
        raise BadHostfile(f"{source} lists no host: write one a line, as 'ADDRESS slots=NUMBER_OF_GPUS'")
    if len(hosts) > MAX_HOSTS:
        raise BadHostfile(f"{source} lists {len(hosts)} hosts: the limit is {MAX_HOSTS}; use several fleets")
    if (total := sum(host.slots for host in hosts)) > MAX_TOTAL_SLOTS:
        raise BadHostfile(f"{source} lists {total} slots: the limit is {MAX_TOTAL_SLOTS}; use several fleets")
    return tuple(hosts)


def _entries(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines that say something.  Lines end as in a text file: str.splitlines knows further ends."""
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), start=1):
        entry = line.strip()
        if entry and not entry.startswith("#"):
            yield number, entry


def _parse_line(line: str, where: str) -> Host:
    match = _LINE.fullmatch(line)
    if match is None:
        raise BadHostfile(f"{where}: {_line_problem(line)}")
    address = unbracketed(match["host"])
    if problem := address_problem(address):
        raise BadHostfile(f"{where}: {problem}")
    digits = match["slots"].lstrip("0")
    if not digits:
        raise BadHostfile(f"{where}: host {address} has no slots: give the number of its GPUs, or remove the line")
    if len(digits) > len(str(MAX_SLOTS)) or int(digits) > MAX_SLOTS:
        raise BadHostfile(f"{where}: {shown(digits)} slots on one host: the limit is {MAX_SLOTS}")
    return Host(address, int(digits))


def _line_problem(line: str) -> str:
    meant = "write 'ADDRESS slots=NUMBER_OF_GPUS'"
    if match := _BEGINS_WELL.fullmatch(line):
        return f"{shown(match['rest'].strip())} after the number of slots means nothing: remove it, or {meant}"
    if len(line.split()) == 1:
        return f"{shown(line)} has no number of slots: {meant}"
    return f"{shown(line)} is no host with its slots: {meant}"

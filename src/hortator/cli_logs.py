"""What leaders of several hosts have logged, as one stream in the order of time."""

import heapq
import re
import subprocess
from collections.abc import Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING

import typer

from hortator.cli_errors import printable
from hortator.cli_leader import TAIL_ENDS

if TYPE_CHECKING:
    from hortator.cli_hosts import FleetOnHosts, FoundLeader

_TIME = re.compile(r"^\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3})")


def print_logs(fleet: "FleetOnHosts", leaders: "Sequence[FoundLeader]", num_lines: int, *, follow: bool) -> None:
    """The last lines of all, merged; with `follow` also what comes, until Ctrl-C."""
    from hortator.topology.launch import read_lines

    processes = [
        subprocess.Popen(
            fleet.command(one.host), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for one in leaders
    ]
    merge = Merge(leaders)
    try:
        for one, process in zip(leaders, processes, strict=True):
            assert process.stdin is not None
            order = fleet.order(do="log", group=one.leader.group, lines=num_lines, follow=follow)
            process.stdin.write(order + b"\n")
            process.stdin.flush()
        outputs = {number: process.stdout for number, process in enumerate(processes) if process.stdout is not None}
        read_lines(outputs, merge.take)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
        merge.finish()


class Merge:
    """Keeps the last lines of each leader until all have sent theirs; prints later ones as they come."""

    def __init__(self, leaders: "Sequence[FoundLeader]") -> None:
        self._leaders = leaders
        self._tails: list[list[str]] = [[] for _ in leaders]
        self._waits = set(range(len(leaders)))

    def take(self, number: int, text: str) -> None:
        if text == TAIL_ENDS:
            self._waits.discard(number)
            if not self._waits:
                self.finish()
        elif self._waits:
            self._tails[number].append(text)
        else:
            self._print(number, text)

    def finish(self) -> None:
        """Print what has been kept."""
        tails, self._tails = self._tails, [[] for _ in self._leaders]
        self._waits = set()
        for number, text in merged(tails):
            self._print(number, text)

    def _print(self, number: int, text: str) -> None:
        from hortator.topology.loglines import labelled

        one = self._leaders[number]
        if text.strip():
            typer.echo(printable(labelled(text, one.leader.group, one.hosts_of_ranks)))


def merged(tails: Sequence[Sequence[str]]) -> Iterator[tuple[int, str]]:
    """Lines with the number of their list, by the time at their beginning; one without goes with the line before it."""
    for _, number, _, text in heapq.merge(*(_timed(number, tail) for number, tail in enumerate(tails))):
        yield number, text


def _timed(number: int, lines: Sequence[str]) -> Iterator[tuple[str, int, int, str]]:
    time, order = "", count()
    for text in lines:
        if match := _TIME.match(text):
            time = max(time, match[1])
        yield time, number, next(order), text

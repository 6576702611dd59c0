"""Lines of a leader's log, each with group, rank and host in front.  Pure."""

import re
from collections.abc import Sequence

_RANK = re.compile(r"^(?P<before>.{0,120}?)\[rank (?P<rank>[0-9]{1,5})\] (?P<text>.*)$", re.DOTALL)


def labelled(line: str, group: str, hosts: Sequence[str]) -> str:
    """`hosts` are those of the ranks, in order; the leader itself is on the first.

    Ranks print into the leader's log as `[rank i] ...`; all other lines are the leader's own.
    """
    match = _RANK.match(line)
    if match is None:
        return f"{group} leader {hosts[0] if hosts else '?'} | {line}"
    rank = int(match["rank"])
    host = hosts[rank] if rank < len(hosts) else "?"
    return f"{group} rank {rank} {host} | {match['before']}{match['text']}"

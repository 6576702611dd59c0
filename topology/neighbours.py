"""Leaders of other fleets on this host: what a fleet was before its Redis, namespace or name was changed, too."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from .leaders import OWNER, Neighbour, StateDirectory


def neighbours(directory: Path) -> Iterator[Neighbour]:
    """Those that are known to the directories beside this one."""
    ours = directory.expanduser()
    for owner in sorted(ours.parent.glob(f"*/{OWNER}")):
        if owner.parent == ours:
            continue
        with contextlib.suppress(OSError, UnicodeDecodeError):
            fleet = owner.read_text()
            living = (one for one in StateDirectory(owner.parent, fleet).leaders() if one.pid is not None)
            yield from (Neighbour(fleet=fleet, leader=leader) for leader in living)

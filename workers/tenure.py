"""The right to a group's name: one leader has it at a time, whoever else was started under it."""

import os
import socket
import uuid
from collections.abc import Callable

from hortator.producer.store import Holder, Store
from hortator.topology.leaders import birth

from .link import Link

KEEP_EVERY_S = 1.0


class Tenure:
    """Takes the name, keeps it alive, and knows when somebody else has it.

    A name that is held is asked for again until its holder has renewed it, and so lives, or until it runs out, which it
    does within the time in which a beat grows old.  A holder of this very place is looked for among the processes, so
    that a leader that was killed can be started again at once.
    """

    def __init__(self, store: Store, link: Link, group: str, *, clock: Callable[[], float]) -> None:
        self.holder = this_process(group)
        self.held = False
        self.refusal: str | None = None  # why this leader must end
        self._store = store
        self._link = link
        self._clock = clock
        self._keep_at = clock()
        self._seen: Holder | None = None

    def keep(self) -> bool:
        """True while the name is ours.  Asks when it is time to; raises StoreUnavailable."""
        now = self._clock()
        if now >= self._keep_at and self.refusal is None:
            self._keep_at = now + KEEP_EVERY_S
            other = self._link.call(self._store.hold, self.holder)
            if other is not None and is_over(other, self.holder):
                other = self._link.call(self._store.hold, self.holder, replacing=other.life)
            self._note(other)
        return self.held

    def leave(self) -> None:
        """Another leader may have the name at once."""
        if self.held:
            self.held = False
            self._link.call(self._store.let_go, self.holder)

    def _note(self, other: Holder | None) -> None:
        seen, self._seen = self._seen, other
        if other is None:
            self.held = True
        elif self.held:
            self.held = False
            self.refusal = f"group {other.group} was taken over by {_named(other)} while this leader was silent"
        elif seen is not None and seen.life == other.life and seen.renewals != other.renewals:
            self.refusal = (
                f"group {other.group} is led by {_named(other)} already: end that one first, or choose another name"
            )


def this_process(group: str) -> Holder:
    """What others may know of it."""
    host, pid = socket.gethostname(), os.getpid()
    born = birth(pid)
    place = f"{host} {born.partition(':')[0]} {os.readlink('/proc/self/ns/pid')}"
    return Holder(group=group, host=host, pid=pid, place=place, born=born, life=uuid.uuid4().hex)


def is_over(other: Holder, ours: Holder) -> bool:
    """Certain only where we see the same processes.  A leader that starts itself anew keeps its process."""
    if other.place != ours.place:
        return False
    return other.born == ours.born or birth(other.pid) != other.born


def _named(holder: Holder) -> str:
    return f"pid {holder.pid} on {holder.host}"

"""Asks leaders (commands.py) over Celery's remote control, and waits until they have done what they were told."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from hortator.producer.errors import GroupFailed, HortatorError, StoreUnavailable
from hortator.producer.groups import ENDING, POLL_S, SILENCE_S, by_name, grace_s
from hortator.producer.redis_url import kombu_url
from hortator.producer.store import GroupBeat, Store
from hortator.topology.identity import redis_place

REPLY_TIMEOUT_S = 5.0
"""A leader answers between two turns; a call to a stalled Redis may hold it up for two seconds."""

UP = "`hortator up FLEET` starts one that is not"
LAST_WORDS_S = 10.0
"""Beyond the grace: what a leader needs to tell the store, to end its ranks, and to be seen to be gone."""


class NoSuchGroup(HortatorError):
    """A name that no living group has."""

    code = "no_such_group"


@dataclass(frozen=True, slots=True)
class Leader:
    """What a leader said of itself.  `life` is another one after it has started again."""

    group: str
    model: str
    host: str
    pid: int
    life: str
    state: str
    running: int
    grace_s: float
    start_timeout_s: float
    ranks: tuple[tuple[int, int], ...]  # rank and its pid, on the rank's own host
    last_failure: str | None
    obeys: bool


class FleetControl:
    """One for each Redis and namespace; `store` is the same Redis."""

    def __init__(self, redis_url: str, namespace: str, store: Store) -> None:
        options = {"global_keyprefix": namespace, "socket_timeout": REPLY_TIMEOUT_S, "socket_connect_timeout": 2.0}
        self._app = Celery("hortator-control", broker=kombu_url(redis_url), set_as_current=False)
        self._app.conf.update(broker_transport_options=options, accept_content=["json"])
        self._store = store
        self._place = f"{redis_place(redis_url)}, {f'namespace {namespace!r}' if namespace else 'no namespace'}"

    def close(self) -> None:
        self._app.close()

    def alive(self, *, patience_s: float = 0.0) -> dict[str, GroupBeat]:
        """Groups by name, as they last said of themselves."""
        return by_name(self._store.queues, patience_s=patience_s)

    def chosen(self, groups: Sequence[str], *, everything: bool = False) -> list[str]:
        """The groups that are meant, all alive.  Raises NoSuchGroup, also if everything is nothing."""
        alive = self.alive()
        if everything and not alive:
            raise NoSuchGroup(f"no group is alive in {self._place}: nothing to do")
        if unknown := [group for group in groups if group not in alive]:
            there = ", ".join(sorted(alive)) or "none"
            raise NoSuchGroup(f"no group {', '.join(unknown)} is alive in {self._place}; alive: {there}; {UP}")
        return sorted(alive) if everything else list(dict.fromkeys(groups))

    def tell(self, command: str, groups: Sequence[str]) -> dict[str, Leader]:
        """Give a command (`drain`, `resume`, `stop`, `restart`, `look`) to these groups; all of them have answered, or
        GroupFailed names those that have not, or that hear nothing because they stop."""
        self._await_restarts(groups)
        if gone := self._stopping(groups):
            raise GroupFailed(
                f"{', '.join(gone)} was told to stop, and hears nothing more: `hortator up FLEET` starts"
                " it when it has ended"
            )
        heard: dict[str, Leader] = {}
        until = time.monotonic() + REPLY_TIMEOUT_S
        while (missing := [group for group in groups if group not in heard]) and time.monotonic() < until:
            heard |= self._ask(command, missing)
        if missing:
            raise GroupFailed(
                f"{', '.join(missing)} did not answer within {REPLY_TIMEOUT_S:g} s: the leader is stuck, or cut off"
                " from Redis; hortator logs FLEET shows what it says, hortator down --fleet FLEET ends it on its host"
            )
        return heard

    def _ask(self, command: str, groups: Sequence[str]) -> dict[str, Leader]:
        try:
            replies = self._app.control.broadcast(
                f"group_{command}",
                arguments={"groups": list(groups)},
                reply=True,
                timeout=REPLY_TIMEOUT_S / 2,
                limit=max(len(self.alive()), 1),
            )
        except (OperationalError, RedisError, OSError) as error:
            raise StoreUnavailable(
                f"leaders cannot be asked over Redis: {error}; `hortator down --fleet FLEET` ends them without it"
            ) from error
        told = [said for reply in replies or () for said in reply.values()]
        leaders = [leader for said in told if (leader := read_leader(said)) is not None]
        return {leader.group: leader for leader in leaders if leader.obeys}

    def drain(self, groups: Sequence[str], *, on_done: Callable[[str], None]) -> None:
        """Until none of them runs a job.  Raises GroupFailed if one does not get there."""
        leaders = self.tell("drain", groups)
        until = time.monotonic() + max(leader.grace_s for leader in leaders.values()) + LAST_WORDS_S
        self._wait(groups, until, self._is_drained, on_done, "still runs jobs")

    def stop(self, groups: Sequence[str], *, on_done: Callable[[str], None]) -> None:
        """Until all of them are gone."""
        told = self._stopping(groups)
        leaders = self.tell("stop", [group for group in groups if group not in told])
        graces = [*(leader.grace_s for leader in leaders.values()), *map(grace_s, told.values())]
        until = time.monotonic() + max(graces, default=0.0) + LAST_WORDS_S
        self._wait(groups, until, lambda group, alive: group not in alive, on_done, "is still there")

    def restart(self, group: str) -> float:
        """Drain, start again, wait until it is ready; the seconds that took.

        An answer may be lost with a Redis that is away for a moment, so what counts is what the leader becomes."""
        began = time.monotonic()
        before = self.tell("look", [group])[group]
        self._try("restart", group)
        drained_by = began + before.grace_s + LAST_WORDS_S
        well = drained_by  # when it was last seen on its way
        while time.monotonic() < min(drained_by + before.start_timeout_s, well + SILENCE_S):
            time.sleep(POLL_S)
            now = self.alive(patience_s=well + SILENCE_S - time.monotonic()).get(group)
            ending = now is not None and now.state in (*ENDING, "draining") and time.monotonic() < drained_by
            if now is not None and (ending or now.state == "starting"):
                well = max(well, time.monotonic())
            elif now is not None:
                after = self._try("look", group)
                if after is not None and after.life == before.life:  # who has heard of it answers no more
                    self._try("restart", group)
                elif after is not None and after.state == "ready":
                    return time.monotonic() - began
        now = self.alive().get(group)
        why = f"it is {now.state}: {now.info.get('last_failure')}" if now else "its leader is gone: see its log"
        raise GroupFailed(f"{group} did not come back within {time.monotonic() - began:.0f} s: {why}")

    def _stopping(self, groups: Sequence[str]) -> dict[str, GroupBeat]:
        return {group: beat for group, beat in self.alive().items() if group in groups and beat.state == "stopping"}

    def _await_restarts(self, groups: Sequence[str]) -> None:
        """Who starts anew is heard of again, and hears again, when it has done so."""
        again = {g: beat for g, beat in self.alive().items() if g in groups and beat.state == "restarting"}
        until = time.monotonic() + max(map(grace_s, again.values()), default=0.0) + LAST_WORDS_S + SILENCE_S
        while again and time.monotonic() < until:
            time.sleep(POLL_S)
            alive = self.alive(patience_s=SILENCE_S)
            again = {g: beat for g, beat in again.items() if g not in alive or alive[g].state == "restarting"}

    def _try(self, command: str, group: str) -> Leader | None:
        """The leader's answer, if one comes."""
        with contextlib.suppress(StoreUnavailable):
            return self._ask(command, [group]).get(group)
        return None

    def _is_drained(self, group: str, alive: dict[str, GroupBeat]) -> bool:
        if group not in alive:
            raise GroupFailed(f"{group} is gone: its leader has ended, and what it ran goes to other groups")
        return alive[group].state == "draining" and alive[group].running == 0

    def _wait(
        self,
        groups: Sequence[str],
        until: float,
        done: Callable[[str, dict[str, GroupBeat]], bool],
        on_done: Callable[[str], None],
        otherwise: str,
    ) -> None:
        left = list(groups)
        while left:
            alive = self.alive(patience_s=until - time.monotonic())
            for group in [group for group in left if done(group, alive)]:
                left.remove(group)
                on_done(group)
            if left and time.monotonic() > until:
                raise GroupFailed(f"{', '.join(left)} {otherwise} although its grace is over: see its log")
            time.sleep(POLL_S if left else 0)


def read_leader(said: Any) -> Leader | None:
    """A leader's reply; None if it is another worker's."""
    if not isinstance(said, dict) or not said.keys() >= set(Leader.__slots__):
        return None
    ranks = tuple((int(rank), int(pid)) for rank, pid in said["ranks"])
    return Leader(**{name: said[name] for name in Leader.__slots__} | {"ranks": ranks})

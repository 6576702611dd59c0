"""Waiting until started groups are ready, and saying meanwhile what for."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import typer

from hortator.cli_errors import EXIT_FAILED, fail_line, printable
from hortator.cli_hosts import LAST_WORDS_S, over_redis
from hortator.cli_store import operator

if TYPE_CHECKING:
    from hortator.cli_hosts import FleetOnHosts, FoundLeader, Inventory
    from hortator.producer.store import GroupBeat

POLL_S = 0.5
LOOK_EVERY_S = 4.0
SAY_EVERY_S = 10.0
START_S = 30.0  # beyond its ranks' start: what a leader itself needs


def wait_for_ends(fleet: "FleetOnHosts", names: Sequence[str], inventory: "Inventory") -> "tuple[Inventory, list[str]]":
    """What runs once those of these groups that were told to stop have ended, or have started anew, as a restart does;
    and those that still stop when the time that their settings give them is over."""
    from hortator.producer.groups import ENDING, grace_s

    alive = fleet.alive()
    ending = {name for name in names if name in alive and alive[name].state in ENDING}
    limit_s = max((grace_s(alive[name]) for name in ending), default=0.0) + LAST_WORDS_S
    until = time.monotonic() + limit_s
    said = ""
    while still := [name for name in names if name in ending and ends(inventory.living.get(name), alive.get(name))]:
        if said != (said := ", ".join(still)):
            typer.echo(f"{said} still stops, or starts anew: waiting for its end, at most {limit_s:.0f} s", err=True)
        if time.monotonic() > until:
            break
        time.sleep(2 * POLL_S)
        inventory, alive = fleet.inventory(), fleet.alive()
    return inventory, still


def ends(found: "FoundLeader | None", beat: "GroupBeat | None") -> bool:
    """The process is there, and has told of its end, or has taken its leave already."""
    from hortator.producer.groups import ENDING

    return found is not None and (beat is None or (beat.state in ENDING and is_of(beat, found)))


def wait_ready(fleet: "FleetOnHosts", started: "Mapping[str, FoundLeader]") -> bool:
    """Until all are ready, or have failed, or the time for starting is over.  A Redis that is away for a moment is
    waited for, as the groups do; StoreUnavailable if it stays away."""
    from hortator.producer.groups import SILENCE_S, by_name

    limit_s = max(spec.start_timeout_s for spec in fleet.fleet.models) + START_S
    until = time.monotonic() + limit_s
    awaited = Awaited(fleet, dict(started))
    with operator(fleet.fleet.redis_url, fleet.fleet.namespace) as talk:
        while awaited.left and time.monotonic() < until:
            awaited.look(by_name(talk.queues, patience_s=SILENCE_S, on_away=awaited.tell_away))
            time.sleep(POLL_S if awaited.left else 0)
    if awaited.left:
        fail_line(f"not ready after {limit_s:.0f} s: {', '.join(awaited.left)}; see hortator logs", EXIT_FAILED)
    return not awaited.left and not awaited.failed


@dataclass
class Awaited:
    """Groups that are to become ready.  One that goes down says why and is waited for, because it tries again; one
    whose leader has ended, or that has given up, has failed.  Only the leaders that were started count: what another
    process says under the same name is not theirs."""

    fleet: "FleetOnHosts"
    left: "dict[str, FoundLeader]"
    failed: bool = False
    look_at: float = field(default_factory=lambda: time.monotonic() + LOOK_EVERY_S)
    say_at: float = field(default_factory=lambda: time.monotonic() + SAY_EVERY_S)
    told: dict[str, str] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)

    def look(self, beats: "Mapping[str, GroupBeat]") -> None:
        """What the groups say, and now and then what their hosts say of them."""
        for name in self.left.keys() & beats.keys():
            if is_of(beats[name], self.left[name]):
                self._note(name, beats[name])
            else:
                self._tell(name, f"{name} is another process's: {where(beats[name])} has this name")
        if self.left and time.monotonic() > self.look_at:
            self.look_at = time.monotonic() + LOOK_EVERY_S
            self._ask_hosts()

    def _note(self, name: str, beat: "GroupBeat") -> None:
        self.states[name] = beat.state
        failure = printable(str(beat.info.get("last_failure")))
        if beat.state == "ready":
            del self.left[name]
            typer.echo(f"{name} is ready")
        elif beat.state == "draining":
            back = over_redis(self.fleet.fleet, "resume", name)
            self._fail(name, f"{name} was told to drain and takes nothing: {back} lets it take jobs again")
        elif beat.state in ("stopping", "restarting"):
            self._tell(name, f"{name} was told to {'stop' if beat.state == 'stopping' else 'start anew'}")
        elif beat.info.get("given_up"):
            self._fail(name, f"{name} is down and will not be tried again: {failure}")
        elif beat.info.get("last_failure"):
            self._tell(name, f"{name} is {beat.state}: {failure}")

    def tell_away(self, problem: str) -> None:
        self._tell("", f"{printable(problem)}; waiting for it")

    def _tell(self, name: str, text: str) -> None:
        if self.told.get(name) != text:
            self.told[name] = text
            typer.echo(text, err=True)

    def _fail(self, name: str, text: str) -> None:
        del self.left[name]
        self.failed = bool(fail_line(text, EXIT_FAILED))

    def _ask_hosts(self) -> None:
        inventory = self.fleet.inventory(dict.fromkeys(one.host for one in self.left.values()))
        say = time.monotonic() > self.say_at
        for name, found in inventory.latest.items():
            ours = self.left.get(name)
            if ours is None or ours.host in inventory.unreached:
                continue
            if found.leader.born != ours.leader.born or found.leader.pid is None:
                self._fail(name, f"{name} has ended: {found.leader.last_words}")
            elif say:
                state = self.states.get(name, "silent")
                typer.echo(printable(f"waiting for {name} ({found}), {state}: {found.leader.last_words}"), err=True)
        for host, problem in inventory.unreached.items():
            self._tell(host, f"{host} does not answer: {printable(problem)}")
        if say:
            self.say_at = time.monotonic() + SAY_EVERY_S


def is_of(beat: "GroupBeat", found: "FoundLeader") -> bool:
    """Said by this very process.  Leaders of versions that do not say which they are are taken at their name."""
    return bool(beat.info.get("born", found.leader.born) == found.leader.born)


def where(beat: "GroupBeat") -> str:
    return f"pid {beat.info.get('pid', '?')} on {beat.info.get('host', '?')}"

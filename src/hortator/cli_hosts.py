"""A fleet on its hosts, as the commands that reach them over ssh see it: what runs where, and the way to change it."""

import json
import os
import shlex
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hortator.cli_errors import EXIT_FAILED, fail_line, printable
from hortator.cli_store import operator, redacted, store_settings

if TYPE_CHECKING:
    from hortator.producer.store import GroupBeat
    from hortator.topology.errand import Answer
    from hortator.topology.fleet import Fleet
    from hortator.topology.hostfilter import HostSlots
    from hortator.topology.leaders import Leader, Neighbour
    from hortator.topology.plan import Plan, PlannedGroup, Seats
    from hortator.topology.road import Road

OWN_PREFIX = "HORTATOR_"
STATE = Path("~/.local/state/hortator")
ANSWER_S = 30.0
LAST_WORDS_S = 15.0  # beyond its grace: what a leader needs to tell the store and to end its ranks

Directory = Annotated[
    Path | None,
    typer.Option("--dir", help=f"on every leader's host: logs and pids; default: {STATE}/, a name of the fleet's own"),
]
SshProgram = Annotated[str | None, typer.Option("--ssh", help="the ssh client; default: ssh")]


@dataclass(frozen=True)
class FoundLeader:
    """A leader, living or not, as the fleet's directory on `host` knows it."""

    host: str
    leader: "Leader"

    @property
    def seats(self) -> "tuple[Seats, ...]":
        from hortator.topology.plan import Seats

        return tuple(Seats(host=seat.host, devices=seat.devices) for seat in self.leader.seats)

    @property
    def hosts_of_ranks(self) -> tuple[str, ...]:
        """Rank i is on the i-th; of a leader that an older version started only its own host is known."""
        return tuple(seat.host for seat in self.leader.seats for _ in seat.devices) or (self.host,)

    def __str__(self) -> str:
        return f"pid {self.leader.pid} on {self.host}"


@dataclass(frozen=True)
class Inventory:
    """What the hosts know of the fleet's leaders.  `unreached`: why a host did not say."""

    found: tuple[FoundLeader, ...]
    unreached: Mapping[str, str] = field(default_factory=dict)
    neighbours: "tuple[Neighbour, ...]" = ()
    """Living leaders of other fleets."""

    @cached_property
    def living(self) -> dict[str, FoundLeader]:
        return {one.leader.group: one for one in self.found if one.leader.pid is not None}

    @cached_property
    def latest(self) -> dict[str, FoundLeader]:
        """Of each group: the leader that lives, else the one that was started last."""
        in_order = sorted(self.found, key=lambda one: (one.leader.pid is not None, one.leader.started))
        return {one.leader.group: one for one in in_order}

    @property
    def running(self) -> "dict[str, tuple[Seats, ...]]":
        return {group: one.seats for group, one in self.living.items()}


@dataclass(frozen=True)
class FleetOnHosts:
    """A fleet file, the hosts that may be used, and the way to them."""

    file: Path
    fleet: "Fleet"
    hosts: "tuple[HostSlots, ...]"
    python: Path
    directory: Path
    identity: str
    ssh: str
    options: str = ""
    """That reach the same hosts and directories, as one types them."""

    @classmethod
    def read(
        cls,
        fleet_file: Path,
        hostfile: Path | None = None,
        *,
        directory: Path | None = None,
        ssh: str | None = None,
        **filters: Any,
    ) -> "FleetOnHosts":
        """`filters`: as `topology.hostfilter` has them; without them all hosts of the hostfile."""
        from hortator.cli_fleet_file import checked_fleet
        from hortator.cli_plan import hosts_of
        from hortator.topology.identity import identity_of, state_name

        fleet = checked_fleet(fleet_file)
        hosts = hosts_of(fleet, hostfile or fleet.hostfile, **filters)
        identity = identity_of(fleet)
        return cls(
            file=fleet_file,
            fleet=fleet,
            hosts=hosts,
            python=fleet.python or Path(sys.executable),
            directory=directory or STATE / state_name(fleet_file.stem, identity),
            identity=identity,
            ssh=ssh or "ssh",
            options="".join(
                f" --{name} {shlex.quote(str(value))}"
                for name, value in (("hostfile", hostfile), ("dir", directory), ("ssh", ssh))
                if value is not None
            ),
        )

    @cached_property
    def road(self) -> "Road":
        """Found when it is wanted first: it asks the resolver for every host."""
        from hortator.topology.road import road

        return road(self.fleet.ssh, (host.address for host in self.hosts), program=self.ssh)

    @cached_property
    def names(self) -> dict[str, str]:
        """The groups that the file has, each with its model."""
        return {spec.group(replica): spec.name for spec in self.fleet.models for replica in range(spec.replicas)}

    def chosen(self, names: Sequence[str], also: Iterable[str] = ()) -> list[str]:
        """The groups of these names, each once; all of the file if there are none.  `also`: further ones that exist."""
        known = dict.fromkeys((*self.names, *also))
        if strange := [name for name in names if name not in known]:
            raise typer.BadParameter(f"the fleet has no group {strange[0]}; it has {', '.join(known)}")
        return list(dict.fromkeys(names)) or list(self.names)

    def plan(self, running: "Mapping[str, tuple[Seats, ...]] | None" = None) -> "Plan":
        """Where groups go; those that run stay where they are."""
        from hortator.cli_plan import read_shapes
        from hortator.topology.pinning import plan_around

        return plan_around(self.fleet, self.hosts, read_shapes(self.fleet), running or {})

    def alive(self) -> "dict[str, GroupBeat]":
        """Groups that the fleet's Redis knows alive."""
        from hortator.producer.groups import by_name

        with operator(self.fleet.redis_url, self.fleet.namespace) as talk:
            return by_name(talk.queues)

    def tell_ignored_variables(self) -> None:
        """Where the shell names another Redis, which commands without a fleet file would ask.  Never its value."""
        for name, said in (("redis_url", self.fleet.redis_url), ("namespace", self.fleet.namespace)):
            variable = f"{OWN_PREFIX}{name.upper()}"
            if os.environ.get(variable, said) == said:
                continue
            source = "says" if name in self.fleet.model_fields_set else "has by default"
            shown = redacted(said) if name == "redis_url" else repr(said)
            typer.echo(f"warning: {variable} is ignored: {self.file} {source} {name} = {printable(shown)}", err=True)

    # ---- what hosts are asked

    def inventory(self, hosts: Iterable[str] | None = None) -> Inventory:
        """Of these hosts; of all that may be used."""
        from hortator.topology.errand import read_answer
        from hortator.topology.leaders import Leaders

        asked = list(hosts) if hosts is not None else [host.address for host in self.hosts]
        found, unreached = [], {}
        neighbours: list[Neighbour] = []
        for answer in self.ask((host, host, {"do": "list"}) for host in asked):
            said = read_answer(answer, Leaders)
            if isinstance(said, str):
                unreached[answer.host] = said.removeprefix("error: ")
            else:
                found += [FoundLeader(place_of(leader, answer.host, asked), leader) for leader in said.leaders]
                neighbours += said.neighbours
        return Inventory(tuple(found), unreached, tuple(neighbours))

    def start(self, groups: "Sequence[PlannedGroup]", launcher: str) -> dict[str, FoundLeader]:
        """Start leaders, say what became of each; those that run."""
        from hortator.topology.errand import read_answer
        from hortator.topology.leaders import Leader
        from hortator.topology.orders import leader_order

        orders = {group: leader_order(self.fleet, group, python=self.python, launcher=launcher) for group in groups}
        errands = [
            (group.name, group.hosts[0].host, {"do": "start", "order": order.model_dump(mode="json")})
            for group, order in orders.items()
        ]
        run = {}
        for (name, host, _), answer in zip(errands, self.ask(errands), strict=True):
            found = read_answer(answer, Leader)
            if isinstance(found, str):
                fail_line(f"{name} on {host}: {found.removeprefix('error: ')}", EXIT_FAILED)
            else:
                run[name] = FoundLeader(host, found)
                said = "starts" if found.fresh else "runs already"
                typer.echo(printable(f"{name} {said}: {run[name]}, {found.log}"))
        return run

    def obstacles(self, hosts: Iterable[str]) -> dict[str, str]:
        """Why no leader could be recorded on these hosts, by host."""
        answers = self.ask((host, host, {"do": "check"}) for host in hosts)
        return {answer.host: answer.problem.removeprefix("error: ") for answer in answers if not answer.ok}

    def differs(self, group: "PlannedGroup", found: FoundLeader, launcher: str) -> bool:
        """Whether it would be started with other settings today."""
        from hortator.topology.errors import CannotStart
        from hortator.topology.orders import leader_order

        try:
            order = leader_order(self.fleet, group, python=self.python, launcher=launcher)
        except CannotStart:
            return True
        return found.leader.settings not in ("", order.settings)

    def end(self, leaders: Sequence[FoundLeader]) -> "Iterator[Answer]":
        """End leaders that Redis did not reach; one answer for each, named by its group."""
        specs = {spec.name: spec for spec in self.fleet.models}
        patience_s = {
            one.leader.group: (specs[one.leader.model].grace_s if one.leader.model in specs else 0) + LAST_WORDS_S
            for one in leaders
        }
        orders = (
            (one.leader.group, one.host, {"do": "stop", "group": one.leader.group, "born": one.leader.born})
            for one in leaders
        )
        yield from self.ask(
            ((group, host, {**order, "patience_s": patience_s[group]}) for group, host, order in orders),
            timeout_s=ANSWER_S + max(patience_s.values(), default=0),
        )

    def left(self, pids: Mapping[str, Sequence[int]]) -> "Iterator[Answer]":
        """Which of these processes, by host, still are ranks of some group."""
        yield from self.ask((host, host, {"do": "left", "pids": some}) for host, some in pids.items())

    def ask(
        self, orders: Iterable[tuple[str, str, Mapping[str, Any]]], *, timeout_s: float = ANSWER_S
    ) -> "list[Answer]":
        """Tell hosts, all at once.  An order: what its answer is named, the host, what to do there."""
        from hortator.topology.errand import Errand, run_errands

        errands = [Errand(name, self.command(host), self.order(**order) + b"\n") for name, host, order in orders]
        return run_errands(errands, timeout_s=timeout_s)

    def command(self, host: str) -> tuple[str, ...]:
        return self.road.argv(host, (str(self.python), "-m", "hortator", "leader"))

    def order(self, **order: Any) -> bytes:
        return json.dumps({"directory": str(self.directory), "fleet": self.identity, **order}).encode()


def place_of(leader: "Leader", host: str, asked: Collection[str]) -> str:
    """Hosts with one home directory know of each other's leaders; that one lives is seen on its own host only."""
    first = leader.seats[0].host if leader.seats else host
    return first if first in asked else host


def leftovers(fleet: FleetOnHosts, inventory: Inventory, alive: "Mapping[str, GroupBeat]") -> Iterator[str]:
    """A line for each living group that the file lacks: the fleet's own, and others that serve its models."""
    models = set(fleet.names.values())
    strange = {name: str(one) for name, one in inventory.living.items() if name not in fleet.names}
    for name, beat in alive.items():
        if name not in fleet.names and beat.model in models:
            strange.setdefault(name, f"pid {beat.info.get('pid', '?')} on {beat.info.get('host', '?')}")
    for name, where in sorted(strange.items()):
        yield f"{name} runs too ({where}), but {fleet.file} has no such group: " + end_with(fleet, name)


def over_redis(fleet: "Fleet", command: str, *groups: str) -> str:
    """A command that steers these groups, as one types it in this shell."""
    here, there = store_settings(None, None), {"redis_url": fleet.redis_url, "namespace": fleet.namespace}
    other = {name: said for name, said in there.items() if getattr(here, name) != said}
    options = (f" --{name.replace('_', '-')} {shlex.quote(redacted(said))}" for name, said in other.items())
    return f"`hortator {command} {' '.join(groups)}{''.join(options)}`"


def end_with(fleet: FleetOnHosts, *groups: str) -> str:
    return f"`{command_of(fleet, 'down', *groups)}` ends {'it' if len(groups) == 1 else 'them'}"


def command_of(fleet: FleetOnHosts, command: str, *groups: str) -> str:
    """As one types it for these groups of this fleet."""
    return f"hortator {command} --fleet {shlex.quote(str(fleet.file))}{fleet.options} {' '.join(groups)}"

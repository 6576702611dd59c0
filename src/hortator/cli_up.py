"""`hortator up` and `hortator logs`: a fleet is started on its hosts, and read."""

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hortator.cli_aftermath import tell_unreached, tell_what_runs, told_when_interrupted
from hortator.cli_errors import EXIT_FAILED, EXIT_OK, fail_line, printable
from hortator.cli_hosts import (
    Directory,
    FleetOnHosts,
    FoundLeader,
    Inventory,
    SshProgram,
    command_of,
    end_with,
    leftovers,
)
from hortator.cli_logs import print_logs
from hortator.cli_plan import Exclude, FleetFile, Hostfile, Include, NumGpus, NumNodes
from hortator.cli_waiting import wait_for_ends, wait_ready, where

if TYPE_CHECKING:
    from hortator.producer.store import GroupBeat
    from hortator.topology.plan import Plan, PlannedGroup

STRANGER_S = 8.0  # a group that has just died passes for alive for five
LAUNCHERS = ("ssh", "deepspeed", "external")


def register(app: typer.Typer) -> None:
    app.command()(up)
    app.command()(logs)


def up(
    fleet_file: FleetFile,
    *,
    group: Annotated[
        list[str] | None, typer.Option("--group", help="only this one; may be given several times")
    ] = None,
    hostfile: Hostfile = None,
    include: Include = "",
    exclude: Exclude = "",
    num_nodes: NumNodes = None,
    num_gpus: NumGpus = None,
    launcher: Annotated[
        str, typer.Option(help="ssh | deepspeed | external: print what others need to start it")
    ] = "ssh",
    style: Annotated[
        str | None, typer.Option("--for", help="with external: torchrun (default) | slurm | kubernetes")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="with external: write a file for each into this directory")
    ] = None,
    wait: Annotated[bool, typer.Option(help="until every group is ready")] = True,
    directory: Directory = None,
    ssh_program: SshProgram = None,
) -> int:
    """Start the groups of a fleet that do not run yet, each leader on its group's first host."""
    check_launcher(launcher)
    if style is not None and launcher != "external":
        raise typer.BadParameter(f"--for {style} goes with --launcher external, and this is --launcher {launcher}")
    if out is not None and launcher != "external":
        raise typer.BadParameter(f"--out goes with --launcher external, and this is --launcher {launcher}")
    filters = {"include": include, "exclude": exclude, "num_nodes": num_nodes, "num_gpus": num_gpus}
    fleet = FleetOnHosts.read(fleet_file, hostfile, directory=directory, ssh=ssh_program, **filters)
    fleet.tell_ignored_variables()
    names = fleet.chosen(group or ())
    if launcher == "external":
        print_recipes(fleet, names, style or "torchrun", out)
        return EXIT_OK
    with told_when_interrupted(fleet, names):
        return start_fleet(fleet, names, launcher, wait=wait)


def logs(
    fleet_file: FleetFile,
    groups: Annotated[list[str] | None, typer.Argument(metavar="[GROUP...]", help="default: all")] = None,
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="stay, until Ctrl-C")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, max=100_000, help="of each group")] = 50,
    hostfile: Hostfile = None,
    directory: Directory = None,
    ssh_program: SshProgram = None,
) -> int:
    """Print what all ranks of all groups say, each line with group, rank and host."""
    fleet = FleetOnHosts.read(fleet_file, hostfile, directory=directory, ssh=ssh_program)
    inventory = fleet.inventory()
    found = inventory.latest
    names = list(dict.fromkeys((*fleet.chosen(groups or (), found), *(() if groups else found))))
    print_logs(fleet, [found[name] for name in names if name in found], lines, follow=follow)
    lost = [name for name in names if name not in found]
    if lost:
        fail_line(
            f"{', '.join(lost)}: no log in {fleet.directory} on any of the hosts: was it started with another --dir, or"
            " never by `hortator up`? What others start (torchrun, Slurm, Kubernetes, systemd) logs where they say",
            EXIT_FAILED,
        )
    return EXIT_FAILED if lost or tell_unreached(inventory) else EXIT_OK


def check_launcher(launcher: str, allowed: Sequence[str] = LAUNCHERS) -> None:
    if launcher not in allowed:
        raise typer.BadParameter(f"--launcher {launcher}: {', '.join(allowed[:-1])} or {allowed[-1]}")


def print_recipes(fleet: FleetOnHosts, names: Sequence[str], style: str, out: Path | None) -> None:
    from hortator.cli_recipes import show_recipes

    plan = fleet.plan()
    wanted = [group for group in plan.groups if group.name in names]
    show_recipes(style, fleet.fleet, plan, wanted, python=fleet.python, out=out)


def start_fleet(fleet: FleetOnHosts, names: Sequence[str], launcher: str, *, wait: bool) -> int:
    """Nothing is started before every host of a leader has answered."""
    from hortator.producer.errors import HortatorError
    from hortator.topology.identity import check_redis_is_reached
    from hortator.topology.reach import ssh_advice

    check_redis_is_reached(fleet.fleet, leaders_hosts(fleet.plan(), names), here=fleet.road.here)
    inventory, stopping = wait_for_ends(fleet, names, fleet.inventory())
    for name in stopping:
        one = inventory.living[name]
        fail_line(
            f"{name} ({one}) still stops after its grace: see {one.leader.log}; {end_with(fleet, name)}", EXIT_FAILED
        )
    names = [name for name in names if name not in stopping]
    plan = fleet.plan(inventory.running)
    hosts = leaders_hosts(plan, [name for name in names if name not in inventory.living])
    if lost := {host: inventory.unreached[host] for host in hosts if host in inventory.unreached}:
        for host, problem in lost.items():
            fail_line(f"{host}: {problem}; {ssh_advice(problem, host)}", EXIT_FAILED)
        return fail_line("nothing was started: each leader's host must answer first", EXIT_FAILED)
    strangers = alive_elsewhere(fleet, names, inventory)
    for name, beat in strangers.items():
        fail_line(stranger(fleet, name, beat, plan), EXIT_FAILED)
    groups = [one for one in plan.groups if one.name in names and one.name not in strangers]
    blocked = {one.name: busy for one in groups if one.name not in inventory.living and (busy := taken(one, inventory))}
    for name, others in blocked.items():
        there = f"{', '.join(others)} {'runs' if len(others) == 1 else 'run'} where the plan has room for it"
        fail_line(f"{name} is not started: {there}; {end_with(fleet, *others)}", EXIT_FAILED)
    for line in crowded(fleet, [one for one in groups if one.name not in inventory.living], inventory):
        typer.echo(printable(f"warning: {line}"), err=True)
    started = run_groups(fleet, [one for one in groups if one.name not in blocked], inventory, launcher)
    well = len(started) == len(names) and not stopping
    try:
        if wait and started:
            well = wait_ready(fleet, started) and well
        for line in leftovers(fleet, inventory, fleet.alive()):
            typer.echo(f"note: {printable(line)}", err=True)
    except HortatorError as problem:  # Redis is away: what was started must not be left in silence
        well = not fail_line(problem.message, EXIT_FAILED)
    if not well:
        tell_what_runs(fleet, started, dict.fromkeys(one.host for one in started.values()))
    return EXIT_OK if well else EXIT_FAILED


def leaders_hosts(plan: "Plan", names: Iterable[str]) -> list[str]:
    wanted = set(names)
    return list(dict.fromkeys(group.hosts[0].host for group in plan.groups if group.name in wanted))


def taken(group: "PlannedGroup", inventory: Inventory) -> list[str]:
    """Which running groups have the slots that this one would get."""
    from hortator.topology.pinning import overlaps

    return overlaps(group, inventory.running)


def crowded(fleet: FleetOnHosts, groups: "Sequence[PlannedGroup]", inventory: Inventory) -> Iterator[str]:
    """A line for each leader of another fleet on GPUs that these groups would get."""
    from hortator.topology.pinning import slots_of

    for group in (one for one in groups if one.device != "cpu"):
        for other in inventory.neighbours:
            if slots_of(group.hosts) & slots_of(other.leader.seats):
                name, log = other.leader.group, other.leader.log
                yield (
                    f"{name} of another fleet ({other.fleet}) has GPUs of {group.name}: pid {other.leader.pid}, {log};"
                    f" if it is what this one was before {fleet.file} named another Redis or namespace, end it by"
                    " hortator down with the file as it was"
                )


def run_groups(
    fleet: FleetOnHosts, groups: "Sequence[PlannedGroup]", inventory: Inventory, launcher: str
) -> dict[str, FoundLeader]:
    """Those of these groups that run now, started or found."""
    living = inventory.living
    for group in groups:
        if group.name in living:
            found = living[group.name]
            typer.echo(f"{group.name} runs already: {found}, {found.leader.log}")
            if fleet.differs(group, found, launcher):
                with_them = command_of(fleet, "restart", group.name)
                typer.echo(f"note: {fleet.file} has other settings for it now: `{with_them}` takes them", err=True)
    started = fleet.start([group for group in groups if group.name not in living], launcher)
    return {
        group.name: living.get(group.name) or started[group.name]
        for group in groups
        if group.name in {**living, **started}
    }


def alive_elsewhere(fleet: FleetOnHosts, names: Sequence[str], inventory: Inventory) -> "dict[str, GroupBeat]":
    """Groups that are alive although no host knows their leader.

    A leader that has just died passes for alive a while longer: that is waited for, unless its host knows it dead."""
    dead = {one.leader.born for one in inventory.latest.values() if one.leader.pid is None}
    until = time.monotonic() + STRANGER_S
    while True:
        alive = fleet.alive()
        strange = {
            name: alive[name]
            for name in names
            if name in alive and name not in inventory.living and alive[name].info.get("born") not in dead
        }
        if not strange or time.monotonic() > until:
            return strange
        time.sleep(1.0)


def stranger(fleet: FleetOnHosts, name: str, beat: "GroupBeat", plan: "Plan") -> str:
    [planned] = [group.hosts[0].host for group in plan.groups if group.name == name]
    return (
        f"{name} is alive ({where(beat)}), but {fleet.directory} on {planned}, where the plan has it, knows nothing of"
        " it: it was started with another --dir, by somebody else (by hand, systemd, Slurm, Kubernetes), or on a host"
        f" that these options leave out, or that directory was removed; {end_with(fleet, name)}"
    )

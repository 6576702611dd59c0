"""Restarting and ending groups of a fleet file: over Redis first, then on their hosts."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import typer

from hortator.cli_aftermath import tell_unreached, tell_what_runs, told_when_interrupted
from hortator.cli_errors import EXIT_FAILED, EXIT_OK, fail_line, printable
from hortator.cli_fleet import fleet_control
from hortator.cli_hosts import FleetOnHosts, Inventory, leftovers
from hortator.cli_up import crowded, leaders_hosts, stranger, taken
from hortator.cli_waiting import wait_ready

if TYPE_CHECKING:
    from hortator.producer.store import GroupBeat
    from hortator.topology.plan import Plan, PlannedGroup


def restart_fleet(fleet: FleetOnHosts, names: Sequence[str], *, launcher: str) -> int:
    """One group after the other: stop it over Redis, start it over ssh, with the file's settings of today."""
    chosen = fleet.chosen(names)
    with told_when_interrupted(fleet, chosen):
        return restart_each(fleet, chosen, launcher)


def restart_each(fleet: FleetOnHosts, chosen: Sequence[str], launcher: str) -> int:
    from hortator.topology.identity import check_redis_is_reached

    inventory = fleet.inventory()
    check_redis_is_reached(fleet.fleet, leaders_hosts(fleet.plan(), chosen), here=fleet.road.here)
    if tell_unreached(inventory):
        return fail_line("nothing was restarted: each host must answer first", EXIT_FAILED)
    for name in chosen:
        if not restart_one(fleet, name, inventory, launcher):
            if rest := chosen[chosen.index(name) + 1 :]:
                typer.echo(f"note: {', '.join(rest)} {'was' if len(rest) == 1 else 'were'} left as before", err=True)
            return EXIT_FAILED
        inventory = fleet.inventory()
    return EXIT_OK


def restart_one(fleet: FleetOnHosts, name: str, inventory: Inventory, launcher: str) -> bool:
    """Nothing is stopped that could not be started again."""
    beat, plan = fleet.alive().get(name), plan_again(fleet, name, inventory)
    [group] = [one for one in plan.groups if one.name == name]
    if problem := hindrance(fleet, group, beat, inventory, plan):
        return not fail_line(problem, EXIT_FAILED)
    if beat is not None:
        with fleet_control(fleet.fleet.redis_url, fleet.fleet.namespace) as control:
            control.stop([name], on_done=lambda group: typer.echo(f"{group} is down"))
    for answer in fleet.end([inventory.living[name]] if name in inventory.living else []):
        if not answer.ok:
            return not fail_line(f"{name}: {answer.problem}", EXIT_FAILED)
    for line in crowded(fleet, [group], inventory):
        typer.echo(printable(f"warning: {line}"), err=True)
    started = fleet.start([group], launcher)
    if not started:
        typer.echo(f"note: {name} is down, and was not started again: mend that, then hortator up", err=True)
    elif not wait_ready(fleet, started):
        tell_what_runs(fleet, started, [one.host for one in started.values()])
        return False
    return bool(started)


def hindrance(
    fleet: FleetOnHosts, group: "PlannedGroup", beat: "GroupBeat | None", inventory: Inventory, plan: "Plan"
) -> str | None:
    """Why the group cannot be started anew; its own former place is none."""
    name, host = group.name, group.hosts[0].host
    if beat is not None and name not in inventory.living:
        return stranger(fleet, name, beat, plan)
    if others := taken(group, inventory):
        return f"{name}: {', '.join(others)} would be in its way: it was left as it is"
    if problem := fleet.obstacles([host]).get(host):
        return f"{name} was left as it is, for {host} could not start it again: {problem}"
    return None


def plan_again(fleet: FleetOnHosts, name: str, inventory: Inventory) -> "Plan":
    """The group is where it was started last if that will do, whatever filters that start had."""
    others = {group: seats for group, seats in inventory.running.items() if group != name}
    slots = {(host.address, slot) for host in fleet.hosts for slot in host.slots}
    seats = inventory.latest[name].seats if name in inventory.latest else ()
    if seats and all((seat.host, device) in slots for seat in seats for device in seat.devices):
        plan = fleet.plan(others | {name: seats})
        if any(group.name == name and group.hosts == seats for group in plan.groups):
            return plan
    return fleet.plan(others)


def down_fleet(fleet: FleetOnHosts, names: Sequence[str]) -> int:
    """Over Redis first, which lets jobs finish; then over ssh, so that nothing is left."""
    inventory = fleet.inventory()
    alive = alive_or_warning(fleet)
    models = set(fleet.names.values())
    chosen = fleet.chosen(names, (*inventory.latest, *(one.group for one in alive.values() if one.model in models)))
    with told_when_interrupted(fleet, chosen):
        failed = end_all(fleet, chosen, inventory, alive)
    if not failed and not any(name in alive or name in inventory.living for name in chosen):
        what = ", ".join(chosen) if names else str(fleet.file)
        typer.echo(printable(f"nothing of {what} was found running"))
    if not names:
        still = {name: beat for name, beat in alive.items() if name not in chosen}
        others = tuple(one for one in inventory.found if one.leader.group not in chosen)
        for line in leftovers(fleet, Inventory(others), still):
            typer.echo(f"note: {printable(line)}", err=True)
    return EXIT_FAILED if failed else EXIT_OK


def end_all(fleet: FleetOnHosts, chosen: Sequence[str], inventory: Inventory, alive: "Mapping[str, GroupBeat]") -> bool:
    """True if something went wrong."""
    from hortator.topology.errand import read_answer
    from hortator.topology.leaders import Ended, Left

    ranks = stop_over_redis(fleet, [name for name in chosen if name in alive])
    failed = tell_unreached(inventory)
    for answer in fleet.end([one for name, one in inventory.living.items() if name in chosen]):
        ended = read_answer(answer, Ended)
        if isinstance(ended, str):
            failed = bool(fail_line(f"{answer.host}: {ended}", EXIT_FAILED))
        elif ended.ended:
            typer.echo(f"{answer.host} is ended on its host")
    for answer in fleet.left(pids_by_host(inventory, ranks)):
        left = read_answer(answer, Left)
        if isinstance(left, str):
            failed = bool(fail_line(f"{answer.host} cannot be asked whether ranks are left: {left}", EXIT_FAILED))
        elif left.left:
            listed = ", ".join(map(str, left.left))
            failed = bool(fail_line(f"{answer.host}: ranks are left: pid {listed}; kill them", EXIT_FAILED))
    return failed


def alive_or_warning(fleet: FleetOnHosts) -> "dict[str, GroupBeat]":
    """What Redis knows alive; without it hosts can still be asked."""
    from hortator.producer.errors import StoreUnavailable

    try:
        return fleet.alive()
    except StoreUnavailable as problem:
        typer.echo(f"warning: {printable(problem.message)}; going on over ssh", err=True)
        return {}


def stop_over_redis(fleet: FleetOnHosts, groups: Sequence[str]) -> dict[str, tuple[tuple[int, int], ...]]:
    """Rank and pid of each rank of these groups, which are told to stop."""
    from hortator.producer.errors import HortatorError
    from hortator.producer.groups import ending

    ranks: dict[str, tuple[tuple[int, int], ...]] = {}
    if not groups:
        return ranks
    try:
        with fleet_control(fleet.fleet.redis_url, fleet.fleet.namespace) as control:
            deaf = ending(control.alive())
            heard = control.tell("look", [group for group in groups if group not in deaf])
            ranks = {leader.group: leader.ranks for leader in heard.values()}
            control.stop(groups, on_done=lambda group: typer.echo(f"{group} is down"))
    except HortatorError as problem:
        typer.echo(f"warning: {printable(problem.message)}; going on over ssh", err=True)
    return ranks


def pids_by_host(inventory: Inventory, ranks: Mapping[str, Sequence[tuple[int, int]]]) -> dict[str, list[int]]:
    """Of groups whose seats are known."""
    pids: dict[str, list[int]] = {}
    for group, some in ranks.items():
        hosts = inventory.latest[group].hosts_of_ranks if group in inventory.latest else ()
        for rank, pid in some:
            if rank < len(hosts):
                pids.setdefault(hosts[rank], []).append(pid)
    return pids

"""What a command leaves behind that fails or is interrupted: groups are detached and run on, and that is said."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import typer

from hortator.cli_errors import EXIT_FAILED, fail_line, printable
from hortator.cli_hosts import end_with

if TYPE_CHECKING:
    from hortator.cli_hosts import FleetOnHosts, Inventory


@contextmanager
def told_when_interrupted(fleet: "FleetOnHosts", names: Collection[str]) -> Iterator[None]:
    """Ctrl-C ends the command, not the groups: what runs then, and how to end it.  A second one ends the asking."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted: asking what runs now (Ctrl-C again leaves at once)", err=True)
        if not tell_what_runs(fleet, names):
            typer.echo(f"note: none of these was found running: {', '.join(names)}", err=True)
        raise


@contextmanager
def goes_on(groups: Collection[str], does: str) -> Iterator[None]:
    """Ctrl-C ends the command, not what it told groups: those that are in `groups` then."""
    try:
        yield
    except KeyboardInterrupt:
        if groups:
            typer.echo(f"interrupted: {', '.join(groups)} {does}; hortator status shows it", err=True)
        raise


def tell_what_runs(fleet: "FleetOnHosts", names: Collection[str], hosts: Iterable[str] | None = None) -> bool:
    """Which of these groups run on these hosts (default: all), and how to end them; True if any does."""
    inventory, states = fleet.inventory(hosts), states_of(fleet)
    tell_unreached(inventory)
    still = {name: one for name, one in inventory.living.items() if name in names}
    if still:
        listed = ", ".join(f"{name} ({one}, {states.get(name, 'silent')})" for name, one in still.items())
        end = end_with(fleet, *still)
        typer.echo(printable(f"note: these run: {listed}; {end}, hortator logs says more"), err=True)
    return bool(still)


def states_of(fleet: "FleetOnHosts") -> dict[str, str]:
    """As the groups say; nothing while Redis is away."""
    from hortator.producer.errors import HortatorError

    with suppress(HortatorError):
        return {name: beat.state for name, beat in fleet.alive().items()}
    return {}


def tell_unreached(inventory: "Inventory") -> bool:
    """Say which hosts did not answer; True if there were any."""
    for host, problem in inventory.unreached.items():
        fail_line(f"{host} cannot be asked what runs there: {problem}", EXIT_FAILED)
    return bool(inventory.unreached)

"""What `hortator up --launcher external` prints, or writes: what somebody else needs to start groups."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from hortator.topology.fleet import Fleet
    from hortator.topology.plan import Plan, PlannedGroup


def show_recipes(
    style: str, fleet: "Fleet", plan: "Plan", groups: "Sequence[PlannedGroup]", *, python: Path, out: Path | None
) -> None:
    """Print all in one text; with `out` write a file for each into that directory, and say which."""
    from hortator.cli_plan import write
    from hortator.topology.external import joined, recipes

    found = recipes(style, fleet, plan.groups, groups, python=python)
    if out is None:
        typer.echo(joined(found), nl=False)
        return
    make_directory(out)
    for one in found:
        write(out / one.file, one.text)
        typer.echo(str(out / one.file))


def make_directory(out: Path) -> None:
    from hortator.producer.errors import ConfigError

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the directory {out}: {error.strerror}: give another one with --out") from error

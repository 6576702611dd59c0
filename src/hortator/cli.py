"""The command line: every command by name, and what happens when one fails.

Exit codes: 0 fine; 1 the job failed, is not there or was not taken, or a server cannot be reached; 2 the command, a
setting or the job itself is wrong; 74 its output cannot be written; 75 the job is not done yet; 130 Ctrl-C.
Commands import what they need when they run, so `--help` is quick and a producer needs no torch.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from hortator import (
    __version__,
    cli_doctor,
    cli_fleet,
    cli_jobs,
    cli_leader,
    cli_letters,
    cli_plan,
    cli_servers,
    cli_up,
)
from hortator.cli_errors import EXIT_FAILED, EXIT_OK, EXIT_OUTPUT, EXIT_USAGE, explain, fail_line
from hortator.cli_output import OutputLost, give_up, say
from hortator.interrupts import EXIT_INTERRUPTED, interrupts

app = typer.Typer(
    name="hortator",
    help="Serve large language models from a Redis queue, without losing a job.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 120},
)
keys = typer.Typer(help="API keys.")

for room in (cli_servers, cli_jobs, cli_plan, cli_up, cli_leader, cli_fleet, cli_doctor, cli_letters):
    room.register(app)
app.add_typer(keys, name="keys")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


@keys.command("new")
def new_key(
    tenant: Annotated[str, typer.Argument(help="whose jobs the key may see")],
    operator: Annotated[bool, typer.Option("--operator", help="may also see dead letters and metrics")] = False,
) -> None:
    """Make an API key: stdout has the line for the key file, stderr the key, which is shown only now."""
    from hortator.producer.api.keys import new_key as make

    key, line = make(tenant, operator=operator)
    typer.echo(f"key (shown once): {key}", err=True)
    typer.echo(line)


def run(arguments: Sequence[str]) -> int:
    """The exit code of one command line.  Only bugs come out as exceptions."""
    try:
        code = app(args=list(arguments) or ["--help"], prog_name="hortator", standalone_mode=False)
        sys.stdout.flush()
    except typer.TyperException as wrong_usage:
        return fail_line(wrong_usage.format_message(), EXIT_USAGE)
    except OutputLost as lost:
        give_up()
        return EXIT_FAILED if lost.reader_left else fail_line(str(lost), EXIT_OUTPUT)
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    except BaseException as error:
        code = EXIT_INTERRUPTED if interrupts.came else ending(error)
    if code == EXIT_INTERRUPTED:
        say("interrupted")
    return code if isinstance(code, int) else EXIT_OK


def ending(error: BaseException) -> int:
    """The exit code of an error that is expected; raised again if it is a bug."""
    code = explain(error) if isinstance(error, Exception) else None
    if code is None:
        raise error
    return code

"""Commands about groups: status, drain, resume, restart, down."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hortator.cli_aftermath import goes_on
from hortator.cli_errors import EXIT_OK, printable
from hortator.cli_hosts import Directory, FleetOnHosts, SshProgram
from hortator.cli_store import AsJson, Namespace, RedisUrl, operator, store_settings

if TYPE_CHECKING:
    from hortator.producer.client import Client
    from hortator.producer.store import GroupBeat, QueueInfo
    from hortator.workers.fleet_control import FleetControl

WithFleetHostfile = Annotated[
    Path | None, typer.Option("--hostfile", "-H", help="with --fleet; default: the fleet file's")
]
FLEET_SUFFIXES = (".toml", ".yaml", ".yml")
MAX_FAILURE_CHARS = 160

Groups = Annotated[list[str] | None, typer.Argument(metavar="[GROUP...]", help="as `hortator status` names them")]
All = Annotated[bool, typer.Option("--all", help="every group that is alive")]


def register(app: typer.Typer) -> None:
    for command in (status, drain, resume, restart, down):
        app.command()(command)


def status(
    *,
    watch: Annotated[bool, typer.Option("--watch", help="stay, and show changes until Ctrl-C")] = False,
    every_s: Annotated[float, typer.Option("--every-s", min=0.2, help="with --watch")] = 1.0,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    namespace: Namespace = None,
) -> int:
    """Print queues, why their jobs wait, and the groups that are alive."""
    with operator(redis_url, namespace) as talk:
        if as_json:
            from hortator.producer.hindrance import queue_facts

            for queue in talk.queues():
                typer.echo(json.dumps(queue_facts(queue)))
            if num_letters := talk.store.count_dead_letters():
                typer.echo(json.dumps({"dead_letters": num_letters}))
        elif watch:
            watch_pages(lambda: page_of(talk), every_s)
        else:
            typer.echo(page_of(talk))
    return EXIT_OK


def drain(
    groups: Groups = None,
    everything: All = False,
    redis_url: RedisUrl = None,
    namespace: Namespace = None,
) -> int:
    """Let groups finish what they run and take nothing more.  They stay up, idle, until resume, restart or down."""
    with (
        steered(groups, everything, redis_url, namespace) as (control, chosen),
        goes_on(chosen, "may have been told to drain, which goes on until hortator resume"),
    ):
        control.drain(chosen, on_done=lambda group: typer.echo(f"{group} is drained"))
    return EXIT_OK


def resume(
    groups: Groups = None,
    everything: All = False,
    redis_url: RedisUrl = None,
    namespace: Namespace = None,
) -> int:
    """Let drained groups take jobs again."""
    with steered(groups, everything, redis_url, namespace) as (control, chosen):
        for group in control.tell("resume", chosen):
            typer.echo(f"{group} takes jobs again")
    return EXIT_OK


def restart(
    groups: Groups = None,
    *,
    everything: All = False,
    fleet_file: Annotated[
        Path | None, typer.Option("--fleet", help="take its settings; without it groups keep those that they have")
    ] = None,
    hostfile: WithFleetHostfile = None,
    directory: Directory = None,
    launcher: Annotated[str | None, typer.Option(help="with --fleet: ssh (default) | deepspeed")] = None,
    ssh_program: SshProgram = None,
    redis_url: RedisUrl = None,
    namespace: Namespace = None,
) -> int:
    """Drain groups and start them again, one after the other, each when the one before is ready."""
    only_with_fleet(fleet_file, hostfile=hostfile, dir=directory, launcher=launcher, ssh=ssh_program)
    only_without_fleet(fleet_file, all=everything or None, redis_url=redis_url, namespace=namespace)
    if fleet_file is not None:
        from hortator.cli_steering import restart_fleet
        from hortator.cli_up import check_launcher

        check_launcher(launcher or "ssh", ("ssh", "deepspeed"))
        fleet = FleetOnHosts.read(fleet_file, hostfile, directory=directory, ssh=ssh_program)
        fleet.tell_ignored_variables()
        return restart_fleet(fleet, groups or (), launcher=launcher or "ssh")
    with steered(groups, everything, redis_url, namespace, by_file="restart") as (control, chosen):
        for number, group in enumerate(chosen):
            if number and group not in control.alive():
                typer.echo(f"{group} is gone: left out", err=True)
                continue
            with goes_on([group], "may have been told to restart, which goes on"):
                typer.echo(f"{group} is ready again after {control.restart(group):.1f} s")
    return EXIT_OK


def down(
    groups: Groups = None,
    *,
    everything: All = False,
    fleet_file: Annotated[
        Path | None,
        typer.Option("--fleet", help="its groups; ends also what Redis does not reach, and looks for orphans"),
    ] = None,
    hostfile: WithFleetHostfile = None,
    directory: Directory = None,
    ssh_program: SshProgram = None,
    redis_url: RedisUrl = None,
    namespace: Namespace = None,
) -> int:
    """Stop groups, all at once: they finish what runs within their grace and hand the rest back."""
    only_with_fleet(fleet_file, hostfile=hostfile, dir=directory, ssh=ssh_program)
    only_without_fleet(fleet_file, all=everything or None, redis_url=redis_url, namespace=namespace)
    if fleet_file is not None:
        from hortator.cli_steering import down_fleet

        fleet = FleetOnHosts.read(fleet_file, hostfile, directory=directory, ssh=ssh_program)
        fleet.tell_ignored_variables()
        return down_fleet(fleet, groups or ())
    with (
        steered(groups, everything, redis_url, namespace, by_file="down") as (control, chosen),
        goes_on(chosen, "may have been told to stop, which goes on"),
    ):
        control.stop(list(chosen), on_done=lambda group: said_down(group, chosen))
    return EXIT_OK


def said_down(group: str, left: list[str]) -> None:
    left.remove(group)
    typer.echo(f"{group} is down")


@contextmanager
def steered(
    groups: Sequence[str] | None, everything: bool, redis_url: str | None, namespace: str | None, *, by_file: str = ""
) -> "Iterator[tuple[FleetControl, list[str]]]":
    """The control of a Redis, and the groups that are meant, all alive.  `by_file`: one that takes --fleet, too."""
    check_choice(groups or (), everything, by_file)
    with fleet_control(redis_url, namespace) as control:
        yield control, control.chosen(groups or (), everything=everything)


def check_choice(groups: Sequence[str], everything: bool, by_file: str) -> None:
    if groups and everything:
        raise typer.BadParameter(f"--all is every group, and {', '.join(groups)} was named too: leave one of them out")
    if files := [name for name in groups if "/" in name or Path(name).suffix in FLEET_SUFFIXES]:
        instead = f": hortator {by_file} --fleet {files[0]}" if by_file else "; hortator status lists those that live"
        raise typer.BadParameter(f"{files[0]} looks like a fleet file, and names of groups are wanted here{instead}")
    if not groups and not everything:
        meant = ", or give --fleet FILE for those of a fleet file" if by_file else ""
        raise typer.BadParameter(f"which groups? Name them as `hortator status` does, or say --all{meant}")


def only_with_fleet(fleet_file: Path | None, **options: object) -> None:
    for name in (name for name, value in options.items() if value is not None and fleet_file is None):
        raise typer.BadParameter(f"--{name} goes with --fleet: without it groups are reached over Redis alone")


def only_without_fleet(fleet_file: Path | None, **options: object) -> None:
    for name in (name for name, value in options.items() if value is not None and fleet_file is not None):
        why = "its groups are meant, unless you name some" if name == "all" else "the fleet file says which Redis it is"
        raise typer.BadParameter(f"--{name.replace('_', '-')} and --fleet: {why}: leave --{name.replace('_', '-')} out")


@contextmanager
def fleet_control(redis_url: str | None, namespace: str | None) -> Iterator["FleetControl"]:
    import celery  # noqa: F401  # a missing extra is said before anything else

    from hortator.workers.fleet_control import FleetControl

    where = store_settings(redis_url, namespace)
    with operator(redis_url, namespace) as talk:
        control = FleetControl(where.redis_url, where.namespace, talk.store)
        try:
            yield control
        finally:
            control.close()


# ---- what status shows


def page_of(talk: "Client") -> str:
    return page(talk.queues(), num_letters=talk.store.count_dead_letters())


def page(queues: Sequence["QueueInfo"], *, num_letters: int = 0) -> str:
    """Two tables, as wide as they need to be: they may go into a pipe."""
    return "\n\n".join([*tables(queues), *letter_lines(num_letters)])


def letter_lines(num_letters: int) -> Iterator[str]:
    from hortator.producer.hindrance import counted

    if num_letters:
        yield f"{counted(num_letters, 'dead letter')}: hortator dead-letters list"


def tables(queues: Sequence["QueueInfo"]) -> Iterator[str]:
    from hortator.cli_jobs import columns

    if not queues:
        yield "no model is known yet: start a worker"
        return
    lines = columns(queue_rows(queues))
    waits = [f"{queue.model}: {text}" for queue in queues if (text := why(queue))]
    groups = list(group_rows(queues))
    yield "\n".join(lines)
    yield "\n".join(columns(groups)) if len(groups) > 1 else "no group is alive"
    if remarks := [*waits, *failure_lines(queues)]:
        yield "\n".join(map(printable, remarks))


def watch_pages(look: Callable[[], str], every_s: float) -> None:
    """Redraws a terminal, else prints page after page, until Ctrl-C; a Redis that is away is said and waited for."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    if not sys.stdout.isatty():
        while True:
            typer.echo(watched(look) + "\n")
            time.sleep(every_s)
    with Live(console=Console(), screen=True, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            live.update(Text(watched(look), no_wrap=True), refresh=True)
            time.sleep(every_s)


def watched(look: Callable[[], str]) -> str:
    from hortator.producer.errors import StoreUnavailable

    try:
        return look()
    except StoreUnavailable as problem:
        return f"{printable(problem.message)}; trying again"


def queue_rows(queues: Sequence["QueueInfo"]) -> Iterator[tuple[str, ...]]:
    yield "MODEL", "QUEUED", "OLDEST", "RUNNING", "SUSPECT", "GROUPS"
    for q in queues:
        oldest = "-" if q.oldest_age_s is None else f"{q.oldest_age_s:.1f} s"
        yield q.model, str(q.depth), oldest, str(q.running), str(q.suspects), str(len(q.groups))


def group_rows(queues: Sequence["QueueInfo"]) -> Iterator[tuple[str, ...]]:
    yield "GROUP", "MODEL", "STATE", "RANKS", "EPOCH", "RUNNING", "WAITING", "STEPS/S", "TOKENS/S", "KV", "HOST"
    for beat in (beat for queue in queues for beat in queue.groups):
        yield (
            beat.group,
            beat.model,
            state_of(beat),
            ranks_of(beat),
            str(beat.epoch),
            f"{beat.running}/{beat.capacity}",
            told(beat, "waiting"),
            told(beat, "steps_per_s"),
            told(beat, "tokens_per_s"),
            f"{beat.info['kv_use']:.0%}" if isinstance(beat.info.get("kv_use"), int | float) else "-",
            printable(str(beat.info.get("host", "-"))),
        )


def state_of(beat: "GroupBeat") -> str:
    return "drained" if beat.state == "draining" and not beat.running else beat.state


def ranks_of(beat: "GroupBeat") -> str:
    """Ranks that run; those on other hosts count where the group says so."""
    pids = beat.info.get("pids")
    return str(beat.info.get("ranks", len(pids) if isinstance(pids, list) else "-"))


def told(beat: "GroupBeat", name: str) -> str:
    """A figure of the group's own; groups of other versions may not give it."""
    value = beat.info.get(name)
    return f"{value:g}" if isinstance(value, int | float) else "-"


def failure_lines(queues: Sequence["QueueInfo"]) -> Iterator[str]:
    """What took each group down, when, and while it is down why it does not rise."""
    for beat in (beat for queue in queues for beat in queue.groups):
        failure, outage = beat.info.get("last_failure"), beat.info.get("outage")
        first = outage if isinstance(outage, dict) else {}
        reason = str(first.get("reason", failure))[:MAX_FAILURE_CHARS]
        if first:
            at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(first.get("at", 0))))
            yield f"{beat.group}: went down {at} (epoch {first.get('epoch')}): {reason}"
        elif failure:
            yield f"{beat.group}: last failure: {reason}"
        if first and failure != first.get("reason") and beat.state != "ready":
            yield f"{beat.group}: and since then: {str(failure)[:MAX_FAILURE_CHARS]}"
        if beat.info.get("given_up"):
            yield f"{beat.group}: it will not be tried again: mend the cause and restart it"


def why(queue: "QueueInfo") -> str | None:
    """Said when something waits, or when nobody would take anything."""
    from hortator.producer.hindrance import Why, hindrance

    found = hindrance(queue)
    if found is None or (not queue.depth and found.why not in (Why.NO_GROUP, Why.NOT_READY, Why.DRAINING)):
        return None
    some_wait = queue.depth or (queue.running and not queue.groups)
    return f"jobs {'wait' if some_wait else 'would wait'}: {found.text}"

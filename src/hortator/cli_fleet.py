"""Commands about groups: status, drain, resume, restart, down."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hortator.cli_errors import EXIT_FAILED, EXIT_OK, fail_line, printable
from hortator.cli_store import AsJson, Namespace, RedisUrl, client, store_settings

if TYPE_CHECKING:
    from hortator.cli_up import Commanded
    from hortator.producer.store import GroupBeat, QueueInfo
    from hortator.workers.fleet_control import FleetControl

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
    with client(redis_url, namespace) as talk:
        if as_json:
            for queue in talk.queues():
                typer.echo(json.dumps(queue_json(queue)))
        elif watch:
            watch_queues(talk.queues, every_s)
        else:
            typer.echo(page(talk.queues()))
    return EXIT_OK


def drain(
    groups: Groups = None,
    everything: All = False,
    redis_url: RedisUrl = None,
    namespace: Namespace = None,
) -> int:
    """Let groups finish what they run and take nothing more.  They stay up, idle, until resume, restart or down."""
    with fleet_control(redis_url, namespace) as control:
        chosen = chosen_groups(control, groups, everything)
        control.drain(chosen, on_done=lambda group: typer.echo(f"{group} is drained"))
    return EXIT_OK


def resume(
    groups: Groups = None,
    everything: All = False,
    redis_url: RedisUrl = None,
    namespace: Namespace = None,
) -> int:
    """Let drained groups take jobs again."""
    with fleet_control(redis_url, namespace) as control:
        for group in control.tell("resume", chosen_groups(control, groups, everything)):
            typer.echo(f"{group} takes jobs again")
    return EXIT_OK


def restart(
    groups: Groups = None,
    *,
    everything: All = False,
    fleet_file: Annotated[
        Path | None, typer.Option("--fleet", help="take its settings; without it groups keep those that they have")
    ] = None,
    directory: Annotated[Path | None, typer.Option("--dir", help="as `hortator up` was told")] = None,
    launcher: Annotated[str, typer.Option(help="with --fleet: ssh | deepspeed")] = "ssh",
    ssh_program: Annotated[str, typer.Option("--ssh", help="the ssh client")] = "ssh",
    redis_url: RedisUrl = None,
    namespace: Namespace = None,
) -> int:
    """Drain groups and start them again, one after the other, each when the one before is ready."""
    if fleet_file is not None:
        from hortator.cli_up import Commanded

        fleet = Commanded.read(fleet_file, None, directory=directory, ssh=ssh_program)
        if bool(groups) == everything:
            raise typer.BadParameter("name groups, or say --all, and not both")
        return restart_fleet(fleet, groups or (), launcher=launcher)
    with fleet_control(redis_url, namespace) as control:
        chosen = chosen_groups(control, groups, everything)
        for number, group in enumerate(chosen):
            if number and group not in control.alive():
                typer.echo(f"{group} is gone: left out", err=True)
                continue
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
    directory: Annotated[Path | None, typer.Option("--dir", help="as `hortator up` was told")] = None,
    ssh_program: Annotated[str, typer.Option("--ssh", help="the ssh client")] = "ssh",
    redis_url: RedisUrl = None,
    namespace: Namespace = None,
) -> int:
    """Stop groups, all at once: they finish what runs within their grace and hand the rest back."""
    if fleet_file is not None:
        from hortator.cli_up import Commanded

        return down_fleet(Commanded.read(fleet_file, None, directory=directory, ssh=ssh_program), groups or ())
    with fleet_control(redis_url, namespace) as control:
        chosen = chosen_groups(control, groups, everything)
        if chosen:
            control.stop(chosen, on_done=lambda group: typer.echo(f"{group} is down"))
    return EXIT_OK


def restart_fleet(fleet: "Commanded", names: Sequence[str], *, launcher: str) -> int:
    """One group after the other: stop it over Redis, start it over ssh with the fleet file's settings of today."""
    from hortator.cli_up import wait_ready

    for group in fleet.chosen(names):
        with fleet_control(fleet.fleet.redis_url, fleet.fleet.namespace) as control:
            if group.name in control.alive():
                control.stop([group.name], on_done=lambda name: typer.echo(f"{name} is down"))
        ended = list(fleet.end([group]))
        if not all(answer.ok for answer in ended):
            return fail_line(f"{group.name}: {ended[0].problem}; the other groups were left as they are", EXIT_FAILED)
        if not (fleet.start([group], launcher) and wait_ready(fleet, [group])):
            return EXIT_FAILED
    return EXIT_OK


def down_fleet(fleet: "Commanded", names: Sequence[str]) -> int:
    """Over Redis first, which lets jobs finish; then over ssh, so that nothing is left."""
    from hortator.cli_up import last_json
    from hortator.producer.errors import HortatorError

    groups = fleet.chosen(names)
    ranks: dict[str, tuple[tuple[int, int], ...]] = {}
    try:
        with fleet_control(fleet.fleet.redis_url, fleet.fleet.namespace) as control:
            alive = control.alive()
            chosen = [group.name for group in groups if group.name in alive]
            if chosen:
                ranks = {leader.group: leader.ranks for leader in control.tell("look", chosen).values()}
                control.stop(chosen, on_done=lambda group: typer.echo(f"{group} is down"))
    except HortatorError as problem:
        typer.echo(f"warning: {printable(problem.message)}; going on over ssh", err=True)
    failed = False
    for answer in fleet.end(groups):
        if not answer.ok:
            failed = bool(fail_line(f"{answer.host}: {answer.problem}", EXIT_FAILED))
        elif last_json(answer)["ended"]:
            typer.echo(f"{answer.host} is ended on its host")
    for host, pids in fleet.left(ranks).items():
        failed = bool(fail_line(f"{host}: ranks are left: pid {', '.join(map(str, pids))}; kill them", EXIT_FAILED))
    return EXIT_FAILED if failed else EXIT_OK


@contextmanager
def fleet_control(redis_url: str | None, namespace: str | None) -> Iterator["FleetControl"]:
    import celery  # noqa: F401  # a missing extra is said before anything else

    from hortator.workers.fleet_control import FleetControl

    where = store_settings(redis_url, namespace)
    with client(redis_url, namespace) as talk:
        control = FleetControl(where.redis_url, where.namespace, talk.store)
        try:
            yield control
        finally:
            control.close()


def chosen_groups(control: "FleetControl", groups: Sequence[str] | None, everything: bool) -> list[str]:
    if bool(groups) == everything:
        raise typer.BadParameter("name groups, or say --all, and not both")
    return control.chosen(groups or (), everything=everything)


# ---- what status shows


def page(queues: Sequence["QueueInfo"]) -> str:
    """Two tables, as wide as they need to be: they may go into a pipe."""
    from hortator.cli_jobs import columns

    if not queues:
        return "no model is known yet: start a worker"
    lines = columns(queue_rows(queues))
    waits = [f"{queue.model}: {text}" for queue in queues if (text := why(queue))]
    groups = list(group_rows(queues))
    lines += ["", *columns(groups)] if len(groups) > 1 else ["", "no group is alive"]
    failures = list(failure_lines(queues))
    return "\n".join([*lines, *([""] if waits or failures else []), *map(printable, [*waits, *failures])])


def watch_queues(look: Any, every_s: float) -> None:
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


def watched(look: Any) -> str:
    from hortator.producer.errors import StoreUnavailable

    try:
        return page(look())
    except StoreUnavailable as problem:
        return f"{printable(problem.message)}; trying again"


def queue_rows(queues: Sequence["QueueInfo"]) -> Iterator[tuple[str, ...]]:
    yield "MODEL", "QUEUED", "OLDEST", "RUNNING", "SUSPECT", "GROUPS"
    for q in queues:
        oldest = "-" if q.oldest_age_s is None else f"{q.oldest_age_s:.1f} s"
        yield q.model, str(q.depth), oldest, str(q.running), str(q.suspects), str(len(q.groups))


def group_rows(queues: Sequence["QueueInfo"]) -> Iterator[tuple[str, ...]]:
    yield "GROUP", "MODEL", "STATE", "RANKS", "EPOCH", "RUNNING", "WAITING", "STEPS/S", "TOKENS/S", "KV"
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
    for beat in (beat for queue in queues for beat in queue.groups):
        if failure := beat.info.get("last_failure"):
            yield f"{beat.group}: last failure: {str(failure)[:MAX_FAILURE_CHARS]}"


def why(queue: "QueueInfo") -> str | None:
    """Said when something waits, or when nobody would take anything."""
    from hortator.producer.hindrance import Why, hindrance

    found = hindrance(queue)
    if found is None or (not queue.depth and found.why not in (Why.NO_GROUP, Why.NOT_READY, Why.DRAINING)):
        return None
    return f"jobs {'wait' if queue.depth else 'would wait'}: {found.text}"


def queue_json(queue: "QueueInfo") -> dict[str, Any]:
    from hortator.producer.hindrance import hindrance

    found = hindrance(queue)
    return asdict(queue) | {"hindrance": asdict(found) if found else None}

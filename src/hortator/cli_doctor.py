"""`hortator doctor`: is a fleet's set of hosts fit to run it?  And `hortator probe`, which it runs on each of them."""

import json
import signal
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from hortator.cli_errors import EXIT_FAILED, EXIT_OK, printable
from hortator.cli_fleet_file import checked_fleet
from hortator.cli_plan import Exclude, Hostfile, Include, NumGpus, NumNodes, hosts_of, plan_of
from hortator.cli_store import AsJson, operator

if TYPE_CHECKING:
    from hortator.topology.doctor import Demand
    from hortator.topology.errand import Answer
    from hortator.topology.findings import Finding
    from hortator.topology.fleet import Fleet
    from hortator.topology.hostfilter import HostSlots
    from hortator.topology.probe import Address, HostReport, ProbeRequest
    from hortator.topology.road import Road
    from hortator.topology.survey import Team

MAX_TEAM = 64  # hosts without a plan, or a group of that many, have too many links to measure them in a minute
PROBE_LIMIT_S = 60  # a probe that hangs (a dead network file system) ends by itself
MARKS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL"}


def register(app: typer.Typer) -> None:
    app.command()(doctor)
    app.command(hidden=True)(probe)


def doctor(
    fleet_file: Annotated[Path | None, typer.Argument(metavar="[FLEET]", help="fleet file (TOML or YAML)")] = None,
    *,
    hostfile: Hostfile = None,
    include: Include = "",
    exclude: Exclude = "",
    num_nodes: NumNodes = None,
    num_gpus: NumGpus = None,
    model: Annotated[list[Path] | None, typer.Option("--model", help="also check this model directory")] = None,
    port: Annotated[
        list[int] | None, typer.Option("--port", min=1, max=65535, help="must be free on every host")
    ] = None,
    device: Annotated[str, typer.Option(help="auto | cpu | cuda; default: what the fleet's models say")] = "",
    python: Annotated[Path | None, typer.Option("--python", help="interpreter on the hosts; default: this one")] = None,
    ssh_program: Annotated[str, typer.Option("--ssh", help="the ssh client")] = "ssh",
    timeout_s: Annotated[float, typer.Option("--timeout-s", min=1, help="for the whole answer of one host")] = 30.0,
    links: Annotated[bool, typer.Option(help="measure the network between the ranks of each group")] = True,
    as_json: AsJson = False,
) -> int:
    """Look at every host of a fleet and say what would go wrong.  Exit 1 when a check fails."""
    from hortator.topology.doctor import examine, suggested_environment
    from hortator.topology.survey import survey

    filters = {"include": include, "exclude": exclude, "num_nodes": num_nodes, "num_gpus": num_gpus}
    fleet, used = wanted_hosts(fleet_file, hostfile, **filters)
    teams, planned = teams_of(fleet, used)
    hosts = {host.address: host.slots for host in used}
    ward = Ward.of(
        fleet,
        hosts,
        leaders={team.hosts[0] for team in teams},
        models=model or (),
        ports=port or (),
        device=device,
        python=python,
        ssh=ssh_program,
    )
    began = time.monotonic()
    reports, problems, skews = ward.look(timeout_s)
    findings = [*planned, *examine(ward.demand, reports, problems, skews), *redis_itself(fleet)]
    environments = suggested_environment(reports.values())
    if links:
        whole = [on_devices(team, reports) for team in teams if reports.keys() >= set(team.hosts)]
        findings += survey(
            [team for team in whole if len(team.hosts) <= MAX_TEAM],
            ward.road,
            ward.measuring,
            {host: {**environments.get(host, {}), **rank_environment(fleet)} for host in hosts},
        )
    if as_json:
        for finding in findings:
            typer.echo(json.dumps(asdict(finding)))
    else:
        for finding in findings:
            typer.echo(line(finding))
        for text in suggestions(environments):
            typer.echo(text)
        typer.echo(verdict(findings, len(hosts), time.monotonic() - began))
    return EXIT_FAILED if any(finding.grade == "fail" for finding in findings) else EXIT_OK


def probe() -> int:
    """Describe this host: a request as JSON on stdin, the report as JSON on stdout."""
    from hortator.topology.probe import ProbeRequest
    from hortator.topology.probe import probe as look

    signal.alarm(PROBE_LIMIT_S)
    request = ProbeRequest.model_validate_json(sys.stdin.buffer.read())
    typer.echo(look(request, checksum=checksum).model_dump_json())
    return EXIT_OK


def checksum(model: Path) -> Mapping[str, str]:
    """What the ranks will compare as well when they start."""
    from hortator.workers.engine.fingerprint import fingerprint

    facts = fingerprint(model, dtype="")
    return {name: facts[name] for name in ("config", "weights", "tokenizer")}


def wanted_hosts(
    fleet_file: Path | None, hostfile: Path | None, **filters: Any
) -> "tuple[Fleet | None, tuple[HostSlots, ...]]":
    """The fleet file, if one is given, and the hosts that are used, as `hortator plan` would have them."""
    from hortator.topology.hostfile import read_hostfile
    from hortator.topology.hostfilter import filter_hosts

    if fleet_file is not None:
        fleet = checked_fleet(fleet_file)
        return fleet, hosts_of(fleet, hostfile or fleet.hostfile, **filters)
    if hostfile is None:
        raise typer.BadParameter("give a FLEET file or --hostfile")
    return None, filter_hosts(read_hostfile(hostfile), **filters)


def teams_of(fleet: "Fleet | None", hosts: "Sequence[HostSlots]") -> "tuple[tuple[Team, ...], tuple[Finding, ...]]":
    """Who will work together: the planned groups; without a fleet file all hosts.  And what the plan says of itself."""
    from hortator.producer.hindrance import counted
    from hortator.topology.errors import PlanError
    from hortator.topology.findings import fine, wrong
    from hortator.topology.survey import Team

    if fleet is None:
        return (Team("all", tuple((host.address, slot) for host in hosts for slot in host.slots), "auto"),), ()
    try:
        plan = plan_of(fleet, hosts)
    except PlanError as error:
        return (), (wrong("plan", str(error), "change the fleet file, or find more hosts"),)
    teams = tuple(
        Team(
            group.name,
            tuple((seats.host, device) for seats in group.hosts for device in seats.devices),
            fleet.model_named(group.model).device,
        )
        for group in plan.groups
    )
    groups, on = counted(len(teams), "group"), counted(len(hosts), "host")
    return teams, (fine("plan", f"{groups} on {on}, {counted(plan.num_free, 'slot')} free"),)


def rank_environment(fleet: "Fleet | None") -> dict[str, str]:
    """What the fleet file tells all ranks: links are measured over the interfaces that it names."""
    return {name: fleet.environment[name] for name in fleet.rank_variables} if fleet else {}


def on_devices(team: "Team", reports: Mapping[str, "HostReport"]) -> "Team":
    """On GPUs where all of its hosts have them, unless the fleet file says that its ranks run on CPUs."""
    from hortator.topology.survey import Team

    on_gpus = all(reports[host].gpus for host in team.hosts)
    return Team(team.name, team.seats, "cuda" if on_gpus and team.device != "cpu" else "cpu")


@dataclass(frozen=True)
class Ward:
    """The hosts under examination: how to get there, and what to ask."""

    demand: "Demand"
    road: "Road"
    python: Path
    requests: Mapping[str, "ProbeRequest"]

    @classmethod
    def of(
        cls,
        fleet: "Fleet | None",
        hosts: Mapping[str, tuple[int, ...]],
        *,
        leaders: Collection[str],
        models: Iterable[Path],
        ports: Iterable[int],
        device: str,
        python: Path | None,
        ssh: str,
    ) -> "Ward":
        from hortator.topology.doctor import Demand
        from hortator.topology.fleet import Ssh
        from hortator.topology.probe import ProbeRequest
        from hortator.topology.road import road

        specs = fleet.models if fleet else ()
        paths = dict.fromkeys([*(path.absolute() for path in models), *(s.path for s in specs if s.path)])
        devices = {spec.device for spec in specs} or {"auto"}
        reach = redis_of(fleet) if leaders else ()
        interpreter = python or (fleet.python if fleet else None) or Path(sys.executable)
        return cls(
            demand=Demand(
                hosts,
                device or ("cpu" if devices == {"cpu"} else "cuda" if "cuda" in devices else "auto"),
                ports=tuple(ports),
                reach=tuple(f"{address.host}:{address.port}" for address in reach),
            ),
            road=road(fleet.ssh if fleet else Ssh(), hosts, program=ssh),
            python=interpreter,
            requests={
                host: ProbeRequest(
                    address=host,
                    ports=tuple(ports),
                    models=tuple(paths),
                    reach=reach if host in leaders else (),
                )
                for host in hosts
            },
        )

    @property
    def measuring(self) -> tuple[str, ...]:
        return (str(self.python), "-m", "hortator.topology.links")

    def look(self, timeout_s: float) -> tuple[dict[str, "HostReport"], dict[str, str], dict[str, float]]:
        """Reports, problems and clock skews by host."""
        from hortator.topology.errand import Errand, run_errands

        command = (str(self.python), "-m", "hortator", "probe")
        errands = [
            Errand(host, self.road.argv(host, command), request.model_dump_json().encode())
            for host, request in self.requests.items()
        ]
        reports, problems, skews = {}, {}, {}
        for answer in run_errands(errands, timeout_s=timeout_s):
            report = read_report(answer)
            if isinstance(report, str):
                problems[answer.host] = report
            else:
                reports[answer.host] = report
                skews[answer.host] = report.clock_s - answer.heard_at
        return reports, problems, skews


def read_report(answer: "Answer") -> "HostReport | str":
    """The report, or why there is none."""
    from pydantic import ValidationError

    from hortator.topology.probe import HostReport

    if not answer.ok:
        return answer.problem
    last = answer.stdout.strip().rpartition(b"\n")[2]  # a login shell may have greeted first
    try:
        return HostReport.model_validate_json(last)
    except ValidationError:
        return f"answered with something that is no report: {printable(last[:80].decode(errors='replace'))!r}"


def redis_of(fleet: "Fleet | None") -> tuple["Address", ...]:
    """Redis as leaders must reach it: the fleet file's, or the one that goes without saying."""
    from hortator.topology.probe import Address

    if fleet is None:
        return ()
    parts = urlsplit(fleet.redis_url)
    return (Address(host=parts.hostname, port=parts.port or 6379),) if parts.hostname else ()


def redis_itself(fleet: "Fleet | None") -> Iterator["Finding"]:
    """From this host: whether it lets us in, and would lose no job, which leaders ask at their start."""
    from hortator.producer.errors import HortatorError, StoreForbidden, StoreUnavailable
    from hortator.topology.findings import doubtful, fine, wrong

    if fleet is None:
        return
    try:
        with operator(fleet.redis_url, fleet.namespace) as talk:
            talk.store.check()
    except StoreForbidden as error:
        yield wrong("redis itself", error.message, "correct redis_url in the fleet file, or the user in Redis")
    except StoreUnavailable as error:
        yield doubtful("redis itself", error.message, "up, status and down need it here, too")
    except HortatorError as error:
        yield wrong("redis itself", error.message, "no leader starts with it as it is")
    else:
        yield fine("redis itself", "lets us in, and loses no job")


def line(finding: "Finding") -> str:
    advice = f"  -> {finding.advice}" if finding.advice else ""
    return printable(f"{MARKS[finding.grade]} {finding.check}: {finding.text}{advice}")


def suggestions(environments: Mapping[str, Mapping[str, str]]) -> Iterable[str]:
    """Once for all hosts that need the same."""
    from hortator.topology.findings import grouped, named

    worded = {host: " ".join(f"{k}={v}" for k, v in said.items()) for host, said in environments.items()}
    by_text = grouped(worded)
    for text, hosts in by_text.items():
        where = "all hosts" if len(by_text) == 1 else named(hosts)
        yield f"     suggested for {where}: {text}"


def verdict(findings: Iterable["Finding"], num_hosts: int, took_s: float) -> str:
    from hortator.producer.hindrance import counted

    grades = [str(finding.grade) for finding in findings]
    bad, doubts = grades.count("fail"), grades.count("warn")
    said = "fit to run" if not bad else f"{counted(bad, 'check')} failed"
    warned = f", {counted(doubts, 'warning')}" if doubts else ""
    return f"{counted(num_hosts, 'host')} in {took_s:.1f} s: {said}{warned}"

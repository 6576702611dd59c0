"""Commands that reach the hosts of a fleet over ssh: up and logs; and `leader`, which they run there."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hortator.cli_errors import EXIT_FAILED, EXIT_OK, fail_line, printable
from hortator.cli_store import client

if TYPE_CHECKING:
    from hortator.producer.store import GroupBeat
    from hortator.topology.errand import Answer
    from hortator.topology.fleet import Fleet
    from hortator.topology.leaders import Quarters
    from hortator.topology.plan import Plan, PlannedGroup
    from hortator.topology.road import Road

STATE = Path("~/.local/state/hortator")
ANSWER_S = 30.0
POLL_S = 0.5
STRANGER_S = 8.0  # a group that has just died passes for alive for five
LOOK_EVERY_S = 4.0
START_S = 30.0  # beyond its ranks' start: what a leader itself needs
LAST_WORDS_S = 15.0  # beyond its grace: what a leader needs to tell the store and to end its ranks

FleetFile = Annotated[Path, typer.Argument(metavar="FLEET", help="fleet file (TOML), as `hortator plan` reads it")]
Hostfile = Annotated[Path | None, typer.Option("--hostfile", help="default: the fleet file's")]
Directory = Annotated[
    Path | None, typer.Option("--dir", help=f"on every leader's host: logs and pids; default: {STATE}/NAME")
]
SshProgram = Annotated[str, typer.Option("--ssh", help="the ssh client")]


def register(app: typer.Typer) -> None:
    app.command()(up)
    app.command()(logs)
    app.command(hidden=True)(leader)


def up(
    fleet_file: FleetFile,
    *,
    group: Annotated[
        list[str] | None, typer.Option("--group", help="only this one; may be given several times")
    ] = None,
    hostfile: Hostfile = None,
    include: Annotated[str, typer.Option(help="as DeepSpeed's: HOST[:GPU,GPU]@HOST...")] = "",
    exclude: Annotated[str, typer.Option(help="likewise")] = "",
    launcher: Annotated[
        str, typer.Option(help="ssh | deepspeed | external: print what others need to start it")
    ] = "ssh",
    style: Annotated[str, typer.Option("--for", help="with external: torchrun | slurm | kubernetes")] = "torchrun",
    wait: Annotated[bool, typer.Option(help="until every group is ready")] = True,
    directory: Directory = None,
    ssh_program: SshProgram = "ssh",
) -> int:
    """Start the groups of a fleet that do not run yet, each leader on its group's first host."""
    fleet = Commanded.read(fleet_file, hostfile, include=include, exclude=exclude, directory=directory, ssh=ssh_program)
    groups = fleet.chosen(group or ())
    if launcher == "external":
        from hortator.topology.external import recipe

        for one in groups:
            typer.echo(recipe(style, fleet.fleet, one, python=fleet.python))
        return EXIT_OK
    if strangers := fleet.strangers(groups):
        return fail_line(
            f"{', '.join(strangers)}: alive, but not on the host where the plan has it: hortator down it first",
            EXIT_FAILED,
        )
    well = fleet.start(groups, launcher)
    if wait and well:
        well = wait_ready(fleet, groups)
    return EXIT_OK if well else EXIT_FAILED


def logs(
    fleet_file: FleetFile,
    groups: Annotated[list[str] | None, typer.Argument(metavar="[GROUP...]", help="default: all")] = None,
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="stay, until Ctrl-C")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, max=100_000, help="of each group")] = 50,
    hostfile: Hostfile = None,
    directory: Directory = None,
    ssh_program: SshProgram = "ssh",
) -> int:
    """Print what all ranks of all groups say, each line with group, rank and host."""
    fleet = Commanded.read(fleet_file, hostfile, directory=directory, ssh=ssh_program)
    return fleet.read_logs(fleet.chosen(groups or ()), lines, follow=follow)


def leader() -> int:
    """Start, find, stop or read the leaders of this host: an order as JSON on stdin."""
    from hortator.topology.leaders import Order, Quarters

    order = json.loads(sys.stdin.buffer.readline())
    quarters = Quarters(Path(order["directory"]))
    match order["do"]:
        case "start":
            print_json(quarters.start(Order.model_validate(order["order"])).model_dump(mode="json"))
        case "look":
            print_json(quarters.look(order["group"]).model_dump(mode="json"))
        case "stop":
            print_json({"ended": quarters.stop(order["group"], patience_s=float(order["patience_s"]))})
        case "left":
            print_json({"left": quarters.left(int(pid) for pid in order["pids"])})
        case "log":
            print_log(quarters, order["group"], int(order["lines"]), follow=bool(order["follow"]))
        case other:
            raise typer.BadParameter(f"{other!r} is nothing that a leader's host can do")
    return EXIT_OK


@dataclass(frozen=True)
class Commanded:
    """A fleet file with its plan, and the way to its hosts."""

    fleet: "Fleet"
    plan: "Plan"
    python: Path
    directory: Path
    ssh: str

    @classmethod
    def read(
        cls,
        fleet_file: Path,
        hostfile: Path | None,
        *,
        include: str = "",
        exclude: str = "",
        directory: Path | None = None,
        ssh: str = "ssh",
    ) -> "Commanded":
        from hortator.cli_plan import planned
        from hortator.topology.fleet import read_fleet

        fleet = read_fleet(fleet_file)
        return cls(
            fleet=fleet,
            plan=planned(fleet_file, hostfile, include=include, exclude=exclude),
            python=fleet.python or Path(sys.executable),
            directory=directory or STATE / fleet_file.stem,
            ssh=ssh,
        )

    @cached_property
    def road(self) -> "Road":
        """Found when it is wanted first: it asks the resolver for every host."""
        from hortator.topology.road import road

        return road(self.fleet.ssh, (host.address for host in self.plan.hosts), program=self.ssh)

    def chosen(self, names: Sequence[str]) -> "list[PlannedGroup]":
        """The groups of these names; all of them if there are none."""
        known = {group.name: group for group in self.plan.groups}
        if strange := [name for name in names if name not in known]:
            raise typer.BadParameter(f"the fleet has no group {strange[0]}; it has {', '.join(known)}")
        return [known[name] for name in dict.fromkeys(names)] or list(known.values())

    def start(self, groups: "Iterable[PlannedGroup]", launcher: str) -> bool:
        """Start leaders, say what became of each; True if all run."""
        from hortator.topology.orders import leader_order

        if launcher not in ("ssh", "deepspeed"):
            raise typer.BadParameter(f"--launcher {launcher}: ssh, deepspeed or (with up) external")

        orders = {group: leader_order(self.fleet, group, python=self.python, launcher=launcher) for group in groups}
        answers = self.ask(
            {group: {"do": "start", "order": order.model_dump(mode="json")} for group, order in orders.items()}
        )
        well = [said_start(answer) for answer in answers]
        return all(well)

    def strangers(self, groups: "Iterable[PlannedGroup]") -> list[str]:
        """Groups that are alive somewhere else; two leaders of one name would take each other's jobs for their own.

        A leader that has just died passes for alive a while longer: that is waited for."""
        until = time.monotonic() + STRANGER_S
        while True:
            alive = alive_in(self.fleet)
            asked = [group for group in groups if group.name in alive]
            answers = self.ask({group: {"do": "look", "group": group.name} for group in asked})
            strange = [answer.host for answer in answers if answer.ok and last_json(answer)["pid"] is None]
            if not strange or time.monotonic() > until:
                return strange
            time.sleep(1.0)

    def ask(
        self, orders: "Mapping[PlannedGroup, Mapping[str, Any]]", *, timeout_s: float = ANSWER_S
    ) -> "Iterator[Answer]":
        """Tell the hosts of these groups' leaders, all at once."""
        from hortator.topology.errand import Errand, run_errands

        errands = [
            Errand(group.name, self.command(group.hosts[0].host), self.order(**order) + b"\n")
            for group, order in orders.items()
        ]
        yield from run_errands(errands, timeout_s=timeout_s)

    def ended(self, groups: "Iterable[PlannedGroup]") -> "Iterator[tuple[str, str]]":
        """Those of these groups whose leaders do not run, with their last words."""
        for answer in self.ask({group: {"do": "look", "group": group.name} for group in groups}):
            if answer.ok and (found := last_json(answer))["pid"] is None:
                yield answer.host, found["last_words"]

    def command(self, host: str) -> tuple[str, ...]:
        return self.road.argv(host, (str(self.python), "-m", "hortator", "leader"))

    def end(self, groups: "Sequence[PlannedGroup]") -> "Iterator[Answer]":
        """End leaders that Redis did not reach; one answer for each group, named by it."""
        specs = {group: self.fleet.model_named(group.model) for group in groups}
        patience_s = {group: spec.grace_s + LAST_WORDS_S for group, spec in specs.items()}
        yield from self.ask(
            {g: {"do": "stop", "group": g.name, "patience_s": patience_s[g]} for g in groups},
            timeout_s=ANSWER_S + max(patience_s.values()),
        )

    def left(self, ranks: "Mapping[str, Sequence[tuple[int, int]]]") -> dict[str, list[int]]:
        """Ranks that outlived their group, by host; a host that cannot be asked counts as having none, and is told.

        `ranks`: of each group, rank and pid."""
        from hortator.topology.errand import Errand, run_errands

        pids: dict[str, list[int]] = {}
        for group in self.plan.groups:
            hosts = {rank.rank: rank.host for rank in group.ranks}
            for rank, pid in ranks.get(group.name, ()):
                pids.setdefault(hosts[rank], []).append(pid)
        errands = [
            Errand(host, self.command(host), self.order(do="left", pids=some) + b"\n") for host, some in pids.items()
        ]
        found = {}
        for answer in run_errands(errands, timeout_s=ANSWER_S):
            if not answer.ok:
                fail_line(f"{answer.host} cannot be asked whether ranks are left: {answer.problem}", EXIT_FAILED)
            elif left := last_json(answer)["left"]:
                found[answer.host] = left
        return found

    def order(self, **order: Any) -> bytes:
        return json.dumps({"directory": str(self.directory), **order}).encode()

    def read_logs(self, groups: "Sequence[PlannedGroup]", num_lines: int, *, follow: bool) -> int:
        """Print until all logs have ended; with `follow` until Ctrl-C."""
        from hortator.topology.launch import read_lines
        from hortator.topology.loglines import labelled
        from hortator.topology.orders import hosts_of_ranks

        processes = [
            subprocess.Popen(
                self.command(group.hosts[0].host),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for group in groups
        ]
        for group, process in zip(groups, processes, strict=True):
            assert process.stdin is not None
            process.stdin.write(self.order(do="log", group=group.name, lines=num_lines, follow=follow) + b"\n")
            process.stdin.flush()
        hosts = [hosts_of_ranks(group) for group in groups]
        outputs = {number: process.stdout for number, process in enumerate(processes) if process.stdout is not None}
        try:
            read_lines(outputs, lambda n, text: typer.echo(printable(labelled(text, groups[n].name, hosts[n]))))
        finally:
            for process in processes:
                process.kill()
                process.communicate()
        return EXIT_OK


def alive_in(fleet: "Fleet") -> set[str]:
    """Groups that the fleet's Redis knows alive."""
    with client(fleet.redis_url, fleet.namespace) as talk:
        return {beat.group for queue in talk.queues() for beat in queue.groups}


def last_json(answer: "Answer") -> dict[str, Any]:
    """What a host said at last; a login shell may have greeted first."""
    said: dict[str, Any] = json.loads(answer.stdout.strip().rpartition(b"\n")[2])
    return said


def said_start(answer: "Answer") -> bool:
    """Say what became of one leader; True if it runs."""
    from hortator.topology.leaders import Leader

    if not answer.ok:
        fail_line(f"{answer.host}: {answer.problem.removeprefix('error: ')}", EXIT_FAILED)
        return False
    found = Leader.model_validate(last_json(answer))
    typer.echo(f"{answer.host} {'starts' if found.fresh else 'runs already'}: pid {found.pid}, {found.log}")
    return True


def wait_ready(fleet: "Commanded", groups: "Sequence[PlannedGroup]") -> bool:
    """Until all are ready, or have failed, or the time for starting is over."""
    limit_s = max(spec.start_timeout_s for spec in fleet.fleet.models) + START_S
    until = time.monotonic() + limit_s
    vigil = Vigil(fleet, {group.name: group for group in groups})
    with client(fleet.fleet.redis_url, fleet.fleet.namespace) as talk:
        while vigil.left and time.monotonic() < until:
            vigil.look({beat.group: beat for queue in talk.queues() for beat in queue.groups})
            time.sleep(POLL_S if vigil.left else 0)
    if vigil.left:
        fail_line(f"not ready after {limit_s:.0f} s: {', '.join(vigil.left)}; see hortator logs", EXIT_FAILED)
    return not vigil.left and not vigil.failed


@dataclass
class Vigil:
    """Waits for groups and says what becomes of them.  One that goes down says why and is waited for, because it tries
    again; one whose leader has ended has failed."""

    fleet: "Commanded"
    left: "dict[str, PlannedGroup]"
    failed: bool = False
    look_at: float = field(default_factory=lambda: time.monotonic() + LOOK_EVERY_S)
    told: dict[str, str] = field(default_factory=dict)

    def look(self, beats: "Mapping[str, GroupBeat]") -> None:
        """What the groups say, and now and then what their hosts say of those that are silent."""
        for name in self.left.keys() & beats.keys():
            if beats[name].state == "ready":
                del self.left[name]
                typer.echo(f"{name} is ready")
            elif failure := beats[name].info.get("last_failure"):
                self._tell(name, f"{name} is {beats[name].state}: {printable(str(failure))}")
        if time.monotonic() > self.look_at:
            self.look_at = time.monotonic() + LOOK_EVERY_S
            self._ask_hosts([group for name, group in self.left.items() if name not in beats])

    def _tell(self, name: str, text: str) -> None:
        if self.told.get(name) != text:
            self.told[name] = text
            typer.echo(text, err=True)

    def _ask_hosts(self, silent: "Sequence[PlannedGroup]") -> None:
        for name, last_words in self.fleet.ended(silent):
            del self.left[name]
            self.failed = bool(fail_line(f"{name} has ended: {last_words}", EXIT_FAILED))


def print_log(quarters: "Quarters", group: str, num_lines: int, *, follow: bool) -> None:
    """The last lines, and with `follow` what comes, until whoever asked is gone: stdin ends then."""
    for text in quarters.tail(group, num_lines):
        print_line(text)
    if not follow:
        return
    gone = threading.Event()
    threading.Thread(target=wait_for_end, args=(gone,), daemon=True).start()
    for text in quarters.follow(group):
        if gone.is_set():
            return
        if text:
            print_line(text)


def wait_for_end(gone: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 4096):  # nothing is expected
        pass
    gone.set()


def print_line(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_json(value: Mapping[str, Any]) -> None:
    print_line(json.dumps(value))

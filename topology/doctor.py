"""What the reports of a fleet's hosts say together: which check holds, what is wrong where, and what to do.  Pure."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from .findings import Finding, doubtful, fine, grouped, named, wrong
from .network import Interface
from .probe import HostReport
from .reach import unreached

MAX_SKEW_S = 2.0
"""Nothing of hortator compares the clocks of two hosts; people who read two logs do, and so does TLS."""

MIN_SHM_BYTES = 256 << 20
FREE_SHARE = 0.95
"""A GPU with less than this free is in use, even where the processes of other containers cannot be seen."""

SAME_EVERYWHERE = ("hortator", "code", "torch", "nccl", "transformers", "deepspeed")

Reports = Mapping[str, HostReport]


@dataclass(frozen=True, slots=True)
class Demand:
    """What the fleet wants of its hosts.  `gpus`: the GPUs of each host that it will use; `device`: auto, cpu, cuda.

    `ports` must be free on every host; `reach` are the addresses that leaders' hosts must reach.
    """

    gpus: Mapping[str, tuple[int, ...]]
    device: str = "auto"
    ports: tuple[int, ...] = ()
    reach: tuple[str, ...] = ()

    @property
    def hosts(self) -> tuple[str, ...]:
        return tuple(self.gpus)


def examine(
    demand: Demand, reports: Reports, problems: Mapping[str, str], skews: Mapping[str, float]
) -> Iterator[Finding]:
    """All checks in order.  `problems`: why a host gave no report; `skews`: its clock less ours, in seconds."""
    yield from reached(demand, problems)
    if not reports:
        return
    yield from machines_apart(reports)
    yield from same_versions(reports)
    yield from gpus_found(demand, reports)
    yield ports_free(demand, reports)
    yield from models_equal(reports)
    yield connections(demand, reports)
    yield clocks_agree(skews)
    yield from networks(reports)
    yield shared_memory(reports)


def reached(demand: Demand, problems: Mapping[str, str]) -> Iterator[Finding]:
    """Every host answered."""
    if not problems:
        yield fine("ssh", "the host answers" if len(demand.hosts) == 1 else f"all {len(demand.hosts)} hosts answer")
    yield from unreached(problems)


def machines_apart(reports: Reports) -> Iterator[Finding]:
    """No machine stands in the hostfile twice under two names (localhost and 127.0.0.1, a name and its address)."""
    names = grouped({host: report.machine for host, report in reports.items() if report.machine})
    if twice := [hosts for hosts in names.values() if len(hosts) > 1]:
        text = "; ".join(f"{named(hosts)} are one machine" for hosts in twice)
        advice = "keep one of its names in the hostfile, with all of its slots"
        yield wrong("machines", f"{text}: its slots are counted twice", advice, [h for hosts in twice for h in hosts])
    elif len(names) == len(reports) > 1:
        yield fine("machines", f"{len(names)} hosts are as many machines")


def same_versions(reports: Reports) -> Iterator[Finding]:
    """Ranks of one group must be of one build; the first difference would be refused at start."""
    yield _same("python", {host: report.python.rpartition(".")[0] for host, report in reports.items()})
    for name in SAME_EVERYWHERE:
        found = {host: report.versions.get(name) for host, report in reports.items()}
        if name == "nccl" and not any(found.values()):
            yield fine(name, "not installed anywhere: this torch is for CPUs")
        elif missing := [host for host, value in found.items() if value is None]:
            yield wrong(name, f"not installed on {named(missing)}", "pip install 'hortator[worker]' there", missing)
        else:
            yield _same(name, {host: str(value) for host, value in found.items()})


def _same(check: str, values: Mapping[str, str]) -> Finding:
    """All values equal; else the minority is named, and those who came first are in the right at a tie."""
    by_value = grouped(values)
    usual = max(by_value, key=lambda value: len(by_value[value]))
    if len(by_value) == 1:
        return fine(check, f"{usual} everywhere")
    others = {value: hosts for value, hosts in by_value.items() if value != usual}
    text = f"{usual} on {len(by_value[usual])} of {len(values)} hosts, but " + ", ".join(
        f"{value} on {named(hosts)}" for value, hosts in others.items()
    )
    advice = (
        "the same version, other files: install the same commit everywhere"
        if check == "code"
        else f"install {check} {usual} there"
    )
    return wrong(check, text, advice, [host for hosts in others.values() for host in hosts])


def gpus_found(demand: Demand, reports: Reports) -> Iterator[Finding]:
    """As many GPUs as the hostfile says, all alike, and nobody on them."""
    if demand.device == "cpu":
        yield fine("gpus", "not used: the fleet runs on CPUs")
        return
    if broken := {host: r.gpu_problem for host, r in reports.items() if r.gpu_problem}:
        text = "; ".join(f"{named(hosts)}: {why}" for why, hosts in grouped(broken).items())
        yield wrong("gpus", text, "is the driver loaded and of the version of its library? (nvidia-smi, dmesg)", broken)
        return
    if demand.device == "auto" and not any(report.gpus for report in reports.values()):
        yield doubtful("gpus", "no host has one: ranks will run on CPUs", "if that is meant, say device = 'cpu'")
        return
    yield _enough_gpus(demand, reports)
    yield _same(
        "gpu model", {host: " + ".join(sorted({g.name for g in r.gpus})) or "none" for host, r in reports.items()}
    )
    yield _gpus_free(demand, reports)


def _enough_gpus(demand: Demand, reports: Reports) -> Finding:
    short = {
        host: f"{len(report.gpus)} of slots={max(demand.gpus[host], default=-1) + 1}"
        for host, report in reports.items()
        if not {gpu.index for gpu in report.gpus} >= set(demand.gpus[host])
    }
    if not short:
        return fine("gpus", f"{sum(len(demand.gpus[host]) for host in reports)} found as the hostfile says")
    text = "; ".join(f"{named(hosts)}: {what}" for what, hosts in grouped(short).items())
    return wrong(
        "gpus", text, "correct the slots in the hostfile, or look for the missing GPU (nvidia-smi, lspci)", short
    )


def _gpus_free(demand: Demand, reports: Reports) -> Finding:
    busy: dict[str, str] = {}
    for host, report in reports.items():
        used = [gpu for gpu in report.gpus if gpu.index in demand.gpus[host]]
        taken = [g for g in used if g.pids or g.free_bytes < FREE_SHARE * g.total_bytes]
        if taken:
            busy[host] = ", ".join(
                f"GPU {g.index} has {g.free_bytes / 2**30:.1f} of {g.total_bytes / 2**30:.1f} GiB free"
                + (f" (pid {', '.join(map(str, g.pids))})" if g.pids else "")
                for g in taken
            )
    if not busy:
        return fine("gpus free", "nobody computes on them")
    text = "; ".join(f"{host}: {what}" for host, what in list(busy.items())[:8])
    return wrong(
        "gpus free", text, "end what runs there, or leave these GPUs out (hortator plan --exclude HOST:GPU)", busy
    )


def ports_free(demand: Demand, reports: Reports) -> Finding:
    """The ports that groups were told to use."""
    taken = {host: ", ".join(map(str, r.taken_ports)) for host, r in reports.items() if r.taken_ports}
    if not demand.ports:
        return fine("ports", "not asked: no --port was given")
    if not taken:
        return fine("ports", f"{', '.join(map(str, demand.ports))} free on every host")
    text = "; ".join(f"{named(hosts)}: {ports} in use" for ports, hosts in grouped(taken).items())
    first = next(iter(taken.values())).split(",")[0]
    return wrong(
        "ports", text, f"see who listens (ss -ltnp 'sport = :{first}') and end it, or take another port", taken
    )


def models_equal(reports: Reports) -> Iterator[Finding]:
    """Every model directory is there, whole, and the same."""
    paths = dict.fromkeys(model.path for report in reports.values() for model in report.models)
    for path in paths:
        found = {host: model for host, report in reports.items() for model in report.models if model.path == path}
        check = f"model {path}"
        if bad := {host: model.problem for host, model in found.items() if model.problem}:
            text = "; ".join(f"{named(hosts)}: {why}" for why, hosts in grouped(bad).items())
            yield wrong(check, text, "copy the model there (rsync -a), or correct its path in the fleet file", bad)
        else:
            yield _equal_sums(check, {host: model.checksums for host, model in found.items()})


def _equal_sums(check: str, sums: Mapping[str, Mapping[str, str]]) -> Finding:
    for name in sorted({name for one in sums.values() for name in one}):
        finding = _same(check, {host: one.get(name, "nothing") for host, one in sums.items()})
        if finding.hosts:
            text = f"{name} differs: {finding.text}"
            return wrong(check, text, "copy the directory anew from one host to the others", finding.hosts)
    return fine(check, "sound" if len(sums) == 1 else f"the same on {len(sums)} hosts")


def connections(demand: Demand, reports: Reports) -> Finding:
    """What leaders must reach: Redis."""
    gone = {
        host: "; ".join(f"{a}: {why}" for a, why in r.unreachable.items())
        for host, r in reports.items()
        if r.unreachable
    }
    if not demand.reach:
        return fine("redis", "not asked: no fleet file with a plan says where it is")
    if not gone:
        return fine("redis", f"every leader's host reaches {', '.join(demand.reach)}")
    text = "; ".join(f"{named(hosts)}: {why}" for why, hosts in grouped(gone).items())
    return wrong("redis", text, "does Redis listen there for other hosts (bind, protected-mode, firewall)?", gone)


def clocks_agree(skews: Mapping[str, float]) -> Finding:
    """Clocks against this host's, as the answers arrived."""
    late = {host: skew for host, skew in skews.items() if abs(skew) > MAX_SKEW_S}
    if not late:
        most = max((abs(skew) for skew in skews.values()), default=0.0)
        return fine("clock", f"within {max(most, 0.1):.1f} s of this host's")
    text = ", ".join(f"{host} {abs(s):.1f} s {'ahead' if s > 0 else 'behind'}" for host, s in list(late.items())[:8])
    return wrong("clock", text, "let chrony or systemd-timesyncd set it (chronyc makestep)", late)


def networks(reports: Reports) -> Iterator[Finding]:
    """The interface that carries the address by which the others call a host; how ranks find each other."""
    if len(reports) == 1:
        return
    lost = {host: r.hostname for host, r in reports.items() if r.own_interface is None}
    if lost:
        yield wrong(
            "network",
            f"{named(list(lost))}: no interface there has the address that the hostfile's name gives",
            "use an address of the host itself in the hostfile (not a gateway's), or correct its /etc/hosts",
            lost,
        )
    yield from _loopback(reports)
    yield from _speeds({host: own for host, r in reports.items() if (own := own_interface(r)) and not own.loopback})
    if any(report.rdma for report in reports.values()):
        yield _rdma(reports)


def _loopback(reports: Reports) -> Iterator[Finding]:
    looped = [h for h, r in reports.items() if (own := own_interface(r)) is not None and own.loopback]
    if looped:
        yield wrong(
            "network",
            f"{named(looped)}: its own name leads to the loopback interface there, so it would tell others 127.0.0.1",
            "use its address on the network in the hostfile, or take its name off the 127.* line of its /etc/hosts",
            looped,
        )


def _speeds(own: Mapping[str, Interface]) -> Iterator[Finding]:
    speeds = {host: f"{one.speed_mbit} Mbit/s" for host, one in own.items() if one.speed_mbit}
    if len(set(speeds.values())) > 1:
        finding = _same("network speed", speeds)
        yield doubtful(
            "network speed",
            finding.text,
            "a group is as fast as its slowest link: check cable and switch",
            finding.hosts,
        )
    mtus = {host: str(one.mtu) for host, one in own.items()}
    if len(set(mtus.values())) > 1:
        finding = _same("mtu", mtus)
        yield doubtful("mtu", finding.text, "large packets may be lost between them: set one MTU on all", finding.hosts)


def _rdma(reports: Reports) -> Finding:
    dark = [h for h, r in reports.items() if not any(port.active for port in r.rdma)]
    if not dark:
        rates = grouped({h: next(p.rate for p in r.rdma if p.active) for h, r in reports.items()})
        return fine("rdma", "; ".join(f"{rate} on {len(hosts)} hosts" for rate, hosts in rates.items()))
    return doubtful(
        "rdma",
        f"no active port on {named(dark)}, while others have one",
        "groups that include these hosts fall back to TCP: bring the port up (ibstat), or plan around them",
        dark,
    )


def shared_memory(reports: Reports) -> Finding:
    """NCCL and gloo pass data between ranks of one host through /dev/shm."""
    small = [host for host, report in reports.items() if report.shm_bytes < MIN_SHM_BYTES]
    if not small:
        return fine("shm", f"at least {MIN_SHM_BYTES >> 20} MiB free in /dev/shm")
    return doubtful(
        "shm",
        f"{named(small)}: less than {MIN_SHM_BYTES >> 20} MiB free in /dev/shm",
        "give the container more (--shm-size 1g, or an emptyDir of medium Memory)",
        small,
    )


def own_interface(report: HostReport) -> Interface | None:
    """The interface by which the others know this host."""
    return next((one for one in report.interfaces if one.name == report.own_interface), None)


def suggested_environment(reports: Iterable[HostReport]) -> dict[str, dict[str, str]]:
    """For each host what NCCL and gloo should be told, from the interfaces that were seen.

    Both otherwise guess: gloo by the host's name, which often leads to 127.0.1.1, NCCL by the first interface that is
    up, which often is a container bridge.
    """
    suggested = {}
    for report in reports:
        own = own_interface(report)
        if own is None or own.loopback:
            continue
        said = {"GLOO_SOCKET_IFNAME": own.name, "NCCL_SOCKET_IFNAME": f"={own.name}"}
        if active := [f"{port.device}:{port.port}" for port in report.rdma if port.active]:
            said["NCCL_IB_HCA"] = "=" + ",".join(active)
        elif report.rdma:
            said["NCCL_IB_DISABLE"] = "1"
        suggested[report.address] = said
    return suggested

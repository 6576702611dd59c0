"""Has the links of teams of ranks measured, over ssh, and says which is slow."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, TypeVar

from pydantic import BaseModel, ValidationError

from .errand import last_line
from .findings import Finding, Grade, doubtful, fine, wrong
from .links import LIMIT_S, LinkOrder, Measured
from .road import Road

Said = TypeVar("Said", bound=BaseModel)

MEETING_S = 60.0
TEAMS_AT_ONCE = 16
FAIL_BELOW, WARN_BELOW = 0.25, 0.5
"""Of the bandwidth of a usual link."""

SLOW_TIMES, SLOW_BY_S = 5.0, 0.002
"""A link's latency is wrong when it is so many times the usual one, and so much longer."""


@dataclass(frozen=True, slots=True)
class Team:
    """Ranks that work together, in order, each on a device of a host."""

    name: str
    seats: tuple[tuple[str, int], ...]
    device: Literal["auto", "cpu", "cuda"] = "cpu"

    @property
    def hosts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(host for host, _ in self.seats))

    @property
    def measured_seats(self) -> tuple[tuple[str, int], ...]:
        """On CPUs the ranks of one host have one network between them: one of them will do."""
        if self.device == "cuda":
            return self.seats
        return tuple((host, 0) for host in self.hosts)


class _Port(BaseModel):
    """What rank 0 says first."""

    port: int


class LinksUnmeasured(Exception):
    """Why a team has no figures."""


def survey(
    teams: Iterable[Team], road: Road, command: Sequence[str], environments: Mapping[str, Mapping[str, str]]
) -> list[Finding]:
    """Measure all teams, those at once that have no host in common.  A finding for each team and each slow link."""
    return asyncio.run(_survey([team for team in teams if len(team.measured_seats) > 1], road, command, environments))


async def _survey(
    teams: Sequence[Team], road: Road, command: Sequence[str], environments: Mapping[str, Mapping[str, str]]
) -> list[Finding]:
    findings: list[Finding] = []
    for wave in waves(teams):
        results = await asyncio.gather(*(_examine(team, road, command, environments) for team in wave))
        findings += [finding for result in results for finding in result]
    return findings


def waves(teams: Sequence[Team]) -> list[list[Team]]:
    """Teams by turns: none shares a host with another of its turn, which would halve what both measure."""
    turns: list[list[Team]] = []
    for team in teams:
        for turn in turns:
            if len(turn) < TEAMS_AT_ONCE and not any(set(team.hosts) & set(other.hosts) for other in turn):
                turn.append(team)
                break
        else:
            turns.append([team])
    return turns


async def _examine(
    team: Team, road: Road, command: Sequence[str], environments: Mapping[str, Mapping[str, str]]
) -> list[Finding]:
    try:
        async with asyncio.timeout(LIMIT_S + 10):
            return list(judge(team, await _measure(team, road, command, environments)))
    except (LinksUnmeasured, TimeoutError) as error:
        why = str(error) or f"no result within {LIMIT_S + 10} s"
        advice = "can these hosts open connections to each other on any port? Is the interface the right one?"
        return [wrong(f"links {team.name}", why, advice, team.hosts)]


async def _measure(
    team: Team, road: Road, command: Sequence[str], environments: Mapping[str, Mapping[str, str]]
) -> list[Measured]:
    seats = team.measured_seats
    orders = [
        LinkOrder(
            rank=rank,
            world_size=len(seats),
            address=seats[0][0],
            device="cuda" if team.device == "cuda" else "cpu",
            local_rank=device,
        )
        for rank, (_, device) in enumerate(seats)
    ]
    commands = [("env", *(f"{k}={v}" for k, v in environments.get(host, {}).items()), *command) for host, _ in seats]
    ranks: list[_Rank] = []
    try:
        ranks.append(await _Rank.start(seats[0][0], road, commands[0], orders[0]))
        port = await ranks[0].hear(_Port, MEETING_S)
        for (host, _), said, order in zip(seats[1:], commands[1:], orders[1:], strict=True):
            told = order.model_copy(update={"store": (seats[0][0], port.port)})
            ranks.append(await _Rank.start(host, road, said, told))
        return await asyncio.gather(*(rank.hear(Measured, LIMIT_S) for rank in ranks))
    finally:
        await asyncio.gather(*(rank.end() for rank in ranks))


@dataclass(frozen=True, slots=True)
class _Rank:
    """One running measurement; it ends when its stdin does."""

    host: str
    process: asyncio.subprocess.Process

    @classmethod
    async def start(cls, host: str, road: Road, command: Sequence[str], order: LinkOrder) -> "_Rank":
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *road.argv(host, command), stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):
            process.stdin.write(order.model_dump_json().encode() + b"\n")
            await process.stdin.drain()
        return cls(host, process)

    async def hear(self, kind: type[Said], timeout_s: float) -> Said:
        """The next line that is what we wait for; a login shell may say other things."""
        assert self.process.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                while line := await self.process.stdout.readline():
                    with contextlib.suppress(ValidationError):
                        return kind.model_validate_json(line)
        except TimeoutError:
            raise LinksUnmeasured(f"{self.host} did not answer within {timeout_s:g} s") from None
        raise LinksUnmeasured(f"{self.host}: {await self._complaint()}")

    async def _complaint(self) -> str:
        assert self.process.stderr is not None
        return last_line(await self.process.stderr.read(64 << 10)) or "ended without a word"

    async def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.wait()


def judge(team: Team, measured: Sequence[Measured]) -> Iterable[Finding]:
    """The figures of a team, and the links that are slower than the others.

    What is usual is the median over the ranks of each one's best link: so one slow host, all of whose links are slow,
    stands out as well as one slow link.
    """
    check = f"links {team.name}"
    names = [f"{host}:{device}" if team.device == "cuda" else host for host, device in team.measured_seats]
    flows = [flow for one in measured for flow in one.flows]
    usual = median(max(f.bytes_per_s for f in flows if rank in (f.source, f.target)) for rank in range(len(names)))
    quick_s = median(min(f.latency_s for f in flows if rank in (f.source, f.target)) for rank in range(len(names)))
    broadcast_s = max(one.broadcast_s for one in measured)
    reduce_s = max(one.all_reduce_s for one in measured)
    yield fine(
        check,
        f"{len(names)} ranks: {quick_s * 1e3:.2f} ms, {rate(usual)} between two; broadcast of a step plan "
        f"{broadcast_s * 1e3:.2f} ms, all-reduce of 4 MiB {reduce_s * 1e3:.1f} ms",
    )
    for flow in flows:
        link = f"{names[flow.source]} -> {names[flow.target]}"
        hosts = tuple(dict.fromkeys(team.measured_seats[rank][0] for rank in (flow.source, flow.target)))
        share = flow.bytes_per_s / usual
        if share < WARN_BELOW:
            grade = Grade.FAIL if share < FAIL_BELOW else Grade.WARN
            text = f"{link} carries {rate(flow.bytes_per_s)}, {share:.0%} of the usual {rate(usual)}"
            yield Finding("slow link", grade, text, _ADVICE, hosts)
        elif flow.latency_s > SLOW_TIMES * quick_s and flow.latency_s > quick_s + SLOW_BY_S:
            text = f"{link} takes {flow.latency_s * 1e3:.1f} ms, usual are {quick_s * 1e3:.2f} ms"
            yield doubtful("slow link", text, _ADVICE, hosts)


_ADVICE = (
    "look at cable, port and driver at both ends (ethtool, ip -s link), at traffic shaping (tc qdisc), and whether"
    " GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the fast interface"
)


def rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s >= 1e9 else f"{bytes_per_s / 1e6:.1f} MB/s"

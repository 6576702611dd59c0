"""Who is alive: what the ranks last said, and the judgement over it.  Pure; the clock is handed in (monotonic)."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

STARTUP_FACTOR = 4
"""While a rank loads, long C calls (dlopen, CUDA) may hold the interpreter, so silence is borne this much longer."""


def bearable_silence_s(*, heartbeat_s: float, heartbeat_timeout_s: float) -> float:
    """After this much silence the other end counts as dead.

    The timeout runs from the first beat that is missed; the rest is for the way back after a cut that was shorter than
    the timeout: neighbours have to be found again (ARP asks once a second), and a probe has to get through.
    """
    return heartbeat_timeout_s + 1.5 * heartbeat_s


class Cause(StrEnum):
    """How a rank fell out of step."""

    REFUSED = "refused"  # its fingerprint differs from rank 0's
    FAILED = "failed"  # it said why itself
    GONE = "gone"  # its connection ended
    SILENT = "silent"  # no beats: stopped, cut off, or its interpreter is blocked
    STALLED = "stalled"  # beats, but no progress although it is busy


@dataclass(frozen=True, slots=True)
class Trouble:
    """One reason why the group cannot go on.  `code` is what a FAILED rank gave."""

    ranks: tuple[int, ...]
    cause: Cause
    message: str
    code: str = ""


@dataclass(slots=True)
class Vitals:
    """The last word of one rank.  `still_s`: for how long its progress has not moved, measured by the rank itself."""

    rank: int
    pid: int
    host: str
    heard: float
    ready: bool = False
    busy: bool = False
    step: int = 0
    progress: int = 0
    still_s: float = 0.0

    @property
    def name(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


def silent(ranks: Iterable[Vitals], *, now: float, timeout_s: float) -> list[Trouble]:
    """Ranks that have not been heard of for `timeout_s` (longer while they load)."""
    return [
        Trouble((v.rank,), Cause.SILENT, f"{v.name} has been silent for {now - v.heard:.1f} s: stopped or cut off")
        for v in ranks
        if now - v.heard > timeout_s * (1 if v.ready else STARTUP_FACTOR)
    ]


def stalled(ranks: Iterable[Vitals], *, timeout_s: float) -> list[Trouble]:
    """The busy rank that stands still while the others wait for it.

    A rank that waits in a collective stands still as well, so only those that came least far can be to blame; and while
    these move, however slowly, nobody is.  Progress must therefore count the same on all ranks.
    """
    busy = [v for v in ranks if v.ready and v.busy]
    least = min(((v.step, v.progress) for v in busy), default=(0, 0))
    last = [v for v in busy if (v.step, v.progress) == least and v.still_s >= timeout_s / 2]
    still_s = max((v.still_s for v in last), default=0.0)
    if still_s < timeout_s:
        return []
    names = ", ".join(v.name for v in last)
    message = f"{names}: no progress for {still_s:.1f} s after step {least[0]}"
    return [Trouble(tuple(v.rank for v in last), Cause.STALLED, message)]

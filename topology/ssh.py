"""Starts keepers on other hosts over ssh.

No shell on this side: ssh is run with a list of arguments.  The command on the other side consists of fixed words and
the checked path of a Python; all that belongs to the launch, the key above all, goes through standard input.
"""

import contextlib
import json
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Self

from .address import python_problem, user_problem
from .errors import CannotStart
from .launch import LineSink, describe_exit, read_lines
from .placement import Share, check_host
from .tied import tied
from .vitals import Cause, Trouble

FIXED_OPTIONS = (
    "BatchMode=yes",  # never ask
    "ControlMaster=no",  # a connection of our own, which ends with us
    "ControlPath=none",
    "ClearAllForwardings=yes",
    "ForwardAgent=no",
    "ForwardX11=no",
    "PermitLocalCommand=no",
    "EscapeChar=none",
    "ServerAliveInterval=5",
    "ServerAliveCountMax=3",
)


@dataclass(frozen=True, slots=True)
class SshOptions:
    """How to reach hosts; what is None is left to ssh's own configuration."""

    user: str | None = None
    port: int | None = None
    identity_file: Path | None = None
    known_hosts_file: Path | None = None
    python: str = sys.executable
    connect_timeout_s: int = 5

    def __post_init__(self) -> None:
        if self.user is not None and (problem := user_problem(self.user)):
            raise CannotStart(f"ssh_user {problem}")
        if problem := python_problem(self.python):
            raise CannotStart(f"remote_python {problem}")

    def arguments(self) -> list[str]:
        """Options of ssh, without host and command."""
        own = [*FIXED_OPTIONS, f"ConnectTimeout={self.connect_timeout_s}"]
        own += [f"IdentityFile={_quoted(self.identity_file)}"] if self.identity_file else []
        own += [f"UserKnownHostsFile={_quoted(self.known_hosts_file)}"] if self.known_hosts_file else []
        arguments = [word for option in own for word in ("-o", option)]
        arguments += ["-p", str(self.port)] if self.port is not None else []
        arguments += ["-l", self.user] if self.user is not None else []
        return arguments


def keeper_command(host: str, options: SshOptions) -> tuple[str, ...]:
    """The argument list that starts a keeper on `host`."""
    remote = (options.python, "-m", "hortator.topology.keeper", "--stdin")
    return ("ssh", "-T", *options.arguments(), "--", check_host(host), *remote)


class SshStarter:
    """One ssh for each host, for one launch at a time."""

    def __init__(self, options: SshOptions) -> None:
        self._options = options
        self._sessions: list[_Session] = []

    def start(self, shares: Sequence[Share], *, address: tuple[str, int], key: bytes, on_line: LineSink) -> None:
        self._sessions = []
        for share in shares[1:]:
            self._sessions.append(_Session.open(share, self._options, address=address, key=key))
        sessions = {session.share.ranks[0]: session for session in self._sessions}

        def note(rank: int, text: str) -> None:
            sessions[rank].said.append(text)
            on_line(rank, text)

        outputs = {rank: session.output for rank, session in sessions.items()}
        threading.Thread(target=read_lines, args=(outputs, note), name="ssh-output", daemon=True).start()

    def troubles(self) -> list[Trouble]:
        return [trouble for session in self._sessions if (trouble := session.trouble()) is not None]

    token = ""

    def stop(self, *, lost: bool) -> None:
        """The keepers see that their standard input ends."""
        for session in self._sessions:
            session.process.kill()
        for session in self._sessions:
            session.close()
        self._sessions = []

    def close(self) -> None:
        """Nothing outlives a launch."""


@dataclass(slots=True)
class _Session:
    """One running ssh; `said`: the last lines of ssh itself and of a keeper that could not join."""

    share: Share
    process: subprocess.Popen[bytes]
    said: deque[str] = field(default_factory=lambda: deque(maxlen=3))
    told: bool = False

    @classmethod
    def open(cls, share: Share, options: SshOptions, *, address: tuple[str, int], key: bytes) -> Self:
        process = subprocess.Popen(
            tied(keeper_command(share.node.host, options)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        errand = {"host": address[0], "port": address[1], "key": key.hex()}
        place = {"ranks": share.ranks, "devices": share.node.devices}
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # ssh has ended already: `trouble` tells
            process.stdin.write(json.dumps(errand | place).encode() + b"\n")
            process.stdin.flush()
        return cls(share, process)

    @property
    def output(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def trouble(self) -> Trouble | None:
        """Said once, when ssh has ended although nobody wanted it to."""
        code = self.process.poll()
        if code is None or self.told:
            return None
        self.told = True
        words = "; ".join(self.said) or describe_exit(code)
        ranks = ", ".join(map(str, self.share.ranks))
        where = f"{self.share.node.host} ({'ranks' if len(self.share.ranks) > 1 else 'rank'} {ranks})"
        return Trouble(self.share.ranks, Cause.GONE, f"ssh to {where} ended: {words}")

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5.0)


def _quoted(path: Path) -> str:
    """A path as ssh's configuration wants it."""
    if any(character in str(path) for character in "\"'\\\n%$"):
        raise CannotStart(f"{path}: ssh cannot be given a path with quotes, line breaks or any of \\ $ %")
    return f'"{path}"' if any(character.isspace() for character in str(path)) else str(path)

"""Starts keepers through DeepSpeed's launcher (pdsh over ssh), with a hostfile of the group's hosts and devices.

DeepSpeed starts a process for each rank and lets them run on when a host goes; so the group's life never hangs on it.
Its processes are keepers: each ends its rank, and itself, when the front is gone.  They stay over restarts of the group
(DeepSpeed takes 10 s and more to start), until one of them is lost: then all are started anew.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from .address import host_port
from .errors import CannotStart
from .launch import LineSink, describe_exit, read_lines
from .placement import Share, check_host
from .ssh import SshOptions
from .tied import tied
from .vitals import Cause, Trouble

_SAFE_PATH = re.compile(r"/[A-Za-z0-9_./+-]*")
PATIENCE_S = 60  # longer than the front's longest pause between two lives


class DeepSpeedStarter:
    """One DeepSpeed launcher for all hosts, the front's own too, where its processes only hold the places."""

    def __init__(self, options: SshOptions, *, secret_file: Path, environment: Mapping[str, str]) -> None:
        self._options = options
        self._environment = environment
        self._secret_file = secret_file.resolve()
        self._process: subprocess.Popen[bytes] | None = None
        self._said: deque[str] = deque(maxlen=5)
        self._told = False
        self.token = ""

    def start(self, shares: Sequence[Share], *, address: tuple[str, int], key: bytes, on_line: LineSink) -> None:
        if self._process is not None:
            return
        self.token, self._told = secrets.token_hex(8), False
        environment = deepspeed_environment(self._environment, self._options)
        with nameless_file(hostfile_of(shares)) as hostfile:
            command = deepspeed_command(
                shares,
                hostfile=Path(f"/dev/fd/{hostfile}"),
                address=address,
                secret_file=self._secret_file,
                token=self.token,
            )
            self._process = subprocess.Popen(
                tied(command),
                env=environment,
                pass_fds=(hostfile,),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        said: deque[str] = deque(maxlen=5)
        self._said = said

        def note(rank: int, text: str) -> None:
            said.append(text)
            on_line(rank, text)

        outputs = {0: self._process.stdout}
        threading.Thread(target=read_lines, args=(outputs, note), name="deepspeed-output", daemon=True).start()

    def troubles(self) -> list[Trouble]:
        code = self._process.poll() if self._process is not None else None
        if code is None or self._told:
            return []
        self._told = True
        words = "; ".join(self._said)
        return [Trouble((), Cause.GONE, f"DeepSpeed's launcher {describe_exit(code)}: {words}")]

    def stop(self, *, lost: bool) -> None:
        if lost or self._told:
            self.close()

    def close(self) -> None:
        """DeepSpeed's own reaction to SIGTERM is a pkill on all hosts; its keepers know better when to go."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5.0)
            self._process = None
        self.token = secrets.token_hex(8)


@contextlib.contextmanager
def nameless_file(text: str) -> Iterator[int]:
    """A descriptor to hand on as /dev/fd/N.  Nothing of it is on a disk, so nothing stays when its owner is killed."""
    fd = os.memfd_create("hostfile")
    try:
        os.write(fd, text.encode())
        yield fd
    finally:
        os.close(fd)


def check_hosts(hosts: Iterable[str]) -> None:
    """Raises CannotStart: DeepSpeed takes a colon for the end of a host's name, and pdsh knows no brackets."""
    if strange := [host for host in hosts if ":" in host]:
        raise CannotStart(
            f"launcher=deepspeed cannot reach {strange[0]}, an IPv6 address: use launcher=ssh, or names in the hostfile"
        )


def hostfile_of(shares: Sequence[Share]) -> str:
    """One line a host.  `--include` then picks the devices, so there are as many slots as the highest one needs."""
    return "".join(f"{check_host(share.node.host)} slots={max(share.node.devices) + 1}\n" for share in shares)


def deepspeed_command(
    shares: Sequence[Share], *, hostfile: Path, address: tuple[str, int], secret_file: Path, token: str
) -> tuple[str, ...]:
    """The argument list.  DeepSpeed puts parts of it, and the working directory, unquoted into a command of a remote
    shell, so nothing but plain paths goes in."""
    check_hosts([*(share.node.host for share in shares), address[0]])
    for path in (sys.executable, os.getcwd(), str(secret_file)):
        if not _SAFE_PATH.fullmatch(path):
            raise CannotStart(f"launcher=deepspeed: {path!r} must be a path of letters, digits and _./+- only")
    include = "@".join(f"{s.node.host}:{','.join(map(str, s.node.devices))}" for s in shares)
    return (
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *("--hostfile", str(hostfile), "--include", include, "--launcher", "pdsh", "--force_multi"),
        *("--no_ssh_check", "--master_addr", address[0], "--no_local_rank", "--module", "hortator.topology.keeper"),
        *("--join", host_port(*address), "--secret-file", str(secret_file)),
        *("--start", token, "--patience", str(PATIENCE_S)),
    )


def deepspeed_environment(inherited: Mapping[str, str], options: SshOptions) -> dict[str, str]:
    """pdsh takes ssh's options from here.  DeepSpeed would pass PYTHON… variables on by itself."""
    if shutil.which("pdsh") is None:
        raise CannotStart("launcher=deepspeed needs pdsh on this host: install it, or use launcher=ssh")
    own = {name: value for name, value in inherited.items() if not name.startswith("HORTATOR_")}
    arguments = " ".join(options.arguments())
    if '"' in arguments:
        raise CannotStart("launcher=deepspeed: paths of ssh's files must not hold spaces")
    return own | {"PDSH_SSH_ARGS_APPEND": arguments, "PDSH_RCMD_TYPE": "ssh"}

"""Commands that the container tests run: never through a shell, always with an end in time."""

import subprocess
from collections.abc import Mapping, Sequence


class CommandFailed(AssertionError):
    """A command ended with another code than 0."""


def run(
    *argv: str,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 120.0,
    check: bool = True,
    cwd: str | None = None,
) -> str:
    """What it prints, stdout and stderr together.  Raises CommandFailed with the end of that."""
    done = subprocess.run(
        argv,
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout_s,
        check=False,
    )
    if check and done.returncode != 0:
        raise CommandFailed(f"{' '.join(argv)} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


def succeeds(argv: Sequence[str], *, env: Mapping[str, str] | None = None, timeout_s: float = 30.0) -> bool:
    """Whether it ends with 0 in time."""
    try:
        run(*argv, env=env, timeout_s=timeout_s)
    except (AssertionError, OSError, subprocess.TimeoutExpired):
        return False
    return True

"""Runs a program that dies with the process that started it, although it knows nothing of that: `tied(("ssh", …))`.

As a script this file asks the kernel for it (PR_SET_PDEATHSIG, which an exec keeps) and becomes the program.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with(parent_pid: int) -> bool:
    """Have the kernel end this process when the thread that forked it ends; False if that has happened already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent_pid


def tied(argv: tuple[str, ...]) -> tuple[str, ...]:
    """The command line that runs `argv` as a child that does not outlive this process."""
    return (sys.executable, "-I", "-S", __file__, str(os.getpid()), *argv)


if __name__ == "__main__":
    if die_with(int(sys.argv[1])):
        try:
            os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606
        except OSError as error:
            sys.exit(f"cannot run {sys.argv[2]}: {error.strerror}")

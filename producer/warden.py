"""Run one command and end it when whoever started this script is gone, however that happened.

Started as a plain script (`python -I warden.py COMMAND ...`, stdin a pipe that nobody writes to), never imported: it
must be small and quick.  With `--remove DIRECTORY` before the command, that goes when the starter is gone, too.  It
prints the child's pid and waits; what the child prints goes to stderr.  The child is told
to end when the pipe closes or the parent changes, and the kernel kills it if this script itself is killed.
"""

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1
CHECK_MS = 300
END_GRACE_S = 3.0
GONE_S = 1.0


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(child: "subprocess.Popen[bytes]") -> None:
    child.terminate()
    try:
        child.wait(END_GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _is_gone(parent: int) -> bool:
    """A process that dies closes its pipes a moment before its children have another parent."""
    until = time.monotonic() + GONE_S
    while os.getppid() == parent:
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def main() -> int:
    parent = os.getppid()
    ours, command = (sys.argv[2], sys.argv[3:]) if sys.argv[1] == "--remove" else (None, sys.argv[1:])
    # preexec_fn is safe here: this process has one thread, and it is the one whose death the kernel watches.
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, preexec_fn=_die_with_parent)  # noqa: PLW1509
    sys.stdout.write(f"{child.pid}\n")
    sys.stdout.flush()
    wakeup_read, wakeup_write = os.pipe()
    os.set_blocking(wakeup_write, False)
    signal.set_wakeup_fd(wakeup_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    poller = select.poll()
    poller.register(0, select.POLLIN | select.POLLHUP)
    poller.register(wakeup_read, select.POLLIN)
    while child.poll() is None:
        ready = {fd for fd, _ in poller.poll(CHECK_MS)}
        if 0 in ready or os.getppid() != parent:
            _end(child)
            if ours is not None and _is_gone(parent):
                shutil.rmtree(ours, ignore_errors=True)
        if wakeup_read in ready:
            os.read(wakeup_read, 512)
    return 0


if __name__ == "__main__":
    sys.exit(main())

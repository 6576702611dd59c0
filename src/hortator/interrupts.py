"""Ctrl-C: one line and exit 130, never a traceback, also where Python would swallow or wrap what it raises."""

# Not the module signal: it takes a while, in which Ctrl-C would be a traceback.
import _signal as signal  # type: ignore[import-not-found]
import contextlib
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, NoReturn

EXIT_INTERRUPTED = 130
AGAIN_S = 0.01


def leave(*_: object) -> "NoReturn":
    """The handler of a process that has nothing to put in order yet."""
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(EXIT_INTERRUPTED)


def leave_at_once() -> None:
    """Until somebody else handles SIGINT.  A process that was started with SIGINT ignored, as in a shell's
    background, goes on ignoring it; one that was started with it held back hears of it now."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def hold_until_exec() -> None:
    """What follows is exec: the new program hears of SIGINT when it calls leave_at_once."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


class Interrupts:
    """KeyboardInterrupt for a command that may have something to put in order."""

    def __init__(self) -> None:
        self.came = False  # imports may turn the exception into another one
        self._num_holds = 0
        self._pending = False

    def watch(self) -> None:
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
            return
        signal.signal(signal.SIGINT, self._interrupt)
        signal.signal(signal.SIGALRM, self._interrupt)
        sys.unraisablehook = self._unraisable

    def rest(self) -> None:
        """The command is over: Ctrl-C changes nothing any more."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    @contextlib.contextmanager
    def held(self) -> "Iterator[None]":
        """An interrupt is raised at the end of this block, which must be short."""
        self._num_holds += 1
        try:
            yield
        finally:
            self._num_holds -= 1
            if self._pending and not self._num_holds:
                self._pending = False
                raise KeyboardInterrupt

    def _interrupt(self, *_: object) -> None:
        self.came = True
        if self._num_holds:
            self._pending = True
            return
        raise KeyboardInterrupt

    def _unraisable(self, problem: "Any") -> None:
        """One that came where nothing can be raised, as in a callback, comes again."""
        if issubclass(problem.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
        else:
            sys.__unraisablehook__(problem)


interrupts = Interrupts()

"""Where commands write: what cannot be written is an error of its own; a closed stream never becomes another file."""

import contextlib
import errno
import io
import os
import sys
from typing import Any, TextIO

STDOUT, STDERR = 1, 2


class OutputLost(Exception):
    """Standard output took no more; `reader_left` as in `| head`, which is no error."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(f"standard output cannot be written: {cause.strerror}")
        self.reader_left = cause.errno == errno.EPIPE


class Output(io.FileIO):
    """Standard output, whose errors cannot be taken for those of another file."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OutputLost(error) from None


def open_streams() -> None:
    """Called first of all: Python has no stream for a descriptor that was closed (`>&-`), and the next file that is
    opened would get its number."""
    if sys.stdin is None:
        sys.stdin = _standing_in(0, os.O_RDONLY)
    closed = sys.stdout is None
    if closed:
        sys.stdout = _standing_in(STDOUT, os.O_RDONLY)  # so that what is written is missed
    if sys.stderr is None:
        sys.stderr = _standing_in(STDERR, os.O_WRONLY)
    encoding = "utf-8" if closed else sys.stdout.encoding
    errors = "strict" if closed else sys.stdout.errors
    raw = Output(STDOUT, "w", closefd=False)
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=raw.isatty())


def say(text: str) -> None:
    """A line on stderr; a stderr that takes none is no reason to fail once more."""
    try:
        print(text, file=sys.stderr, flush=True)  # noqa: T201
    except OSError:
        _silence(STDERR)


def give_up() -> None:
    """Nothing more is written, nor said about it when Python ends."""
    with contextlib.suppress(OSError, AttributeError):
        _silence(sys.stdout.fileno())


def _silence(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _standing_in(descriptor: int, flags: int) -> TextIO:
    """/dev/null under this number."""
    nowhere = os.open(os.devnull, flags)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor, inheritable=False)
        os.close(nowhere)
    return open(descriptor, "w" if flags == os.O_WRONLY else "r", closefd=False, encoding="utf-8")

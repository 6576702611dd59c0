"""One command on each of many hosts, all at once: how the doctor, and whoever starts or stops a fleet, get about.

What a host is told goes to the command's stdin and what it answers comes on stdout, so nothing has to survive a remote
shell's reading of an argument.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, ValidationError

MAX_AT_ONCE = 128
"""An ssh client costs some 10 MB and 30 ms of a core; at 10 s for a silent host, 1,000 silent ones take 80 s."""

MAX_ANSWER_BYTES = 8 << 20
MAX_COMPLAINT_BYTES = 64 << 10
MAX_SHOWN_BYTES = 30

Said = TypeVar("Said", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Errand:
    """`argv` as it is run here, ssh included."""

    host: str
    argv: tuple[str, ...]
    stdin: bytes = b""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back.  `returncode` is ssh's own 255 if the host was not reached; None: it was given up after
    `took_s`.  `heard_at` is this host's clock when the answer was complete."""

    host: str
    returncode: int | None
    stdout: bytes
    complaint: str
    took_s: float
    heard_at: float

    @property
    def ok(self) -> bool:
        return self.returncode == 0

    @property
    def problem(self) -> str:
        """Why it is not ok, in one line."""
        if self.returncode is None:
            return f"no answer within {self.took_s:.0f} s"
        return self.complaint or f"the command ended with {self.returncode} and said nothing"


def run_errands(
    errands: Iterable[Errand],
    *,
    timeout_s: float,
    at_once: int = MAX_AT_ONCE,
    on_answer: Callable[[Answer], None] | None = None,
) -> list[Answer]:
    """Run all, at most `at_once` at a time, each for at most `timeout_s`; answers in the order of `errands`."""
    return asyncio.run(_run_all(list(errands), timeout_s, at_once, on_answer))


async def _run_all(
    errands: list[Errand], timeout_s: float, at_once: int, on_answer: Callable[[Answer], None] | None
) -> list[Answer]:
    places = asyncio.Semaphore(at_once)

    async def run(errand: Errand) -> Answer:
        async with places:
            answer = await _run_one(errand, timeout_s)
        if on_answer is not None:
            on_answer(answer)
        return answer

    return await asyncio.gather(*map(run, errands))


async def _run_one(errand: Errand, timeout_s: float) -> Answer:
    began = time.monotonic()
    try:
        process = await asyncio.create_subprocess_exec(
            *errand.argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        return Answer(errand.host, 127, b"", f"{errand.argv[0]}: {error.strerror}", 0.0, time.time())
    stdout, complaint, heard_at = b"", b"", time.time()
    returncode = None
    try:
        async with asyncio.timeout(timeout_s):
            stdout, complaint, heard_at = await _talk(process, errand.stdin)
            returncode = await process.wait()
    except TimeoutError:
        pass
    finally:
        _kill(process)
        await process.wait()
    return Answer(errand.host, returncode, stdout, last_line(complaint), time.monotonic() - began, heard_at)


async def _talk(process: asyncio.subprocess.Process, stdin: bytes) -> tuple[bytes, bytes, float]:
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    (stdout, heard_at), (complaint, _), _ = await asyncio.gather(
        _hear(process.stdout, MAX_ANSWER_BYTES),
        _hear(process.stderr, MAX_COMPLAINT_BYTES),
        _tell(process.stdin, stdin),
    )
    return stdout, complaint, heard_at


async def _tell(pipe: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):  # the command ended without listening
        pipe.write(data)
        await pipe.drain()
    pipe.close()


async def _hear(pipe: asyncio.StreamReader, limit: int) -> tuple[bytes, float]:
    """All of it and when it ended; of more than `limit` bytes the rest is read and dropped, so that the command can
    end."""
    kept = bytearray()
    while data := await pipe.read(1 << 16):
        kept += data[: limit - len(kept)]
    return bytes(kept), time.time()


def read_answer(answer: Answer, model: type[Said]) -> "Said | str":
    """What a host said at last (a login shell may have greeted first); or in one printable line why it is nothing."""
    if not answer.ok:
        return answer.problem
    last = answer.stdout.strip().rpartition(b"\n")[2]
    try:
        return model.model_validate_json(last)
    except ValidationError:
        return f"answered with something that is no {model.__name__}: {ascii(last[:MAX_SHOWN_BYTES])[1:]}"


def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def last_line(text: bytes) -> str:
    """What a command complained of at last: that is where ssh says why, and Python names the exception."""
    lines = [line.strip() for line in text.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""

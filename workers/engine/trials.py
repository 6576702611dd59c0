"""The rank's side of the process in which structures are compiled on trial (trial.py)."""

import json
import logging
import socket
import subprocess
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

from hortator.producer.errors import BadRequest

from .step import Structure
from .trial import WALL_S

logger = logging.getLogger("hortator.engine")

NUM_LANES = 2  # structures that are tried at a time
_PROGRAM = (sys.executable, "-P", "-m", "hortator.workers.engine.trial")
_START_S = 60.0  # until the tokenizer is read there
_SLACK_S = 5.0  # the other side keeps the limit itself


class Lane:
    """One socket to the process, for one structure at a time."""

    def __init__(self, ours: socket.socket) -> None:
        self._socket = ours
        self._lines = ours.makefile("rb")
        self._begun = False

    def ask(self, structure: Structure) -> str | None:
        """Why it is refused; OSError or ValueError if the process does not answer."""
        if not self._begun:
            if problem := self._answer("ready", _START_S):
                raise ValueError(problem)
            self._begun = True
        question = {"kind": structure.kind.value, "definition": structure.definition}
        self._socket.settimeout(_SLACK_S)
        self._socket.sendall(json.dumps(question).encode() + b"\n")
        return self._answer("refused", WALL_S + _SLACK_S)

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def _answer(self, name: str, timeout_s: float) -> str | None:
        self._socket.settimeout(timeout_s)
        line = self._lines.readline()
        if not line:
            raise ValueError("it has ended")
        reason = json.loads(line)[name]
        return None if reason is None else str(reason)


class Trials:
    """Starts the process at once, so that it is warm when the first structure comes, and another if one is lost."""

    def __init__(self, tokenizer: Path, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._command = [*_PROGRAM, str(tokenizer), str(vocab_size), ",".join(map(str, eos_token_ids))]
        self._free: SimpleQueue[Lane] = SimpleQueue()
        self._open: list[Lane] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self.close = weakref.finalize(self, _end, self._open, self._processes)
        self._start(NUM_LANES)

    def run(self, structure: Structure) -> None:
        """BadRequest if it is wrong or costs too much, or if nobody can try it."""
        for _ in range(NUM_LANES + 1):  # all may have been lost at once
            if not self.close.alive:
                break
            lane = self._free.get()
            try:
                refused = lane.ask(structure)
            except (OSError, ValueError, KeyError) as error:
                self._replace(lane, error)
                continue
            self._free.put(lane)
            if refused is not None:
                raise BadRequest(refused)
            return
        raise BadRequest("structure: the process that tries it has ended or does not answer")

    def _replace(self, lane: Lane, error: Exception) -> None:
        if self.close.alive:
            logger.warning("the process that tries structures does not answer (%s): another one is started", error)
            self._open.remove(lane)
            lane.close()
            self._start(1)

    def _start(self, num_lanes: int) -> None:
        pairs = [socket.socketpair() for _ in range(num_lanes)]
        theirs = [their.fileno() for _, their in pairs]
        self._processes[:] = [process for process in self._processes if process.poll() is None]
        self._processes.append(
            subprocess.Popen(
                [*self._command, *map(str, theirs)],
                pass_fds=theirs,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # the library may quote a description there
            )
        )
        for ours, their in pairs:
            their.close()
            lane = Lane(ours)
            self._open.append(lane)
            self._free.put(lane)


def _end(lanes: list[Lane], processes: list[subprocess.Popen[bytes]]) -> None:
    """Closed sockets end idle processes; one that is busy has nobody to answer."""
    for lane in lanes:
        lane.close()
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        process.kill()
        process.wait()

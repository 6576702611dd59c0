"""The process in which structures are compiled on trial, so that one which takes all memory or time ends only itself.

`python -m hortator.workers.engine.trial TOKENIZER VOCAB_SIZE EOS_IDS FD...`: reads the tokenizer, then serves each of
these sockets by a process of its own, and there each structure again by a process of its own: they share the
tokenizer's memory.  All end when the other side of their socket is closed, the last one by its limits.

A lane first says {"ready": null}, or why it cannot.  Then each line {"kind": ..., "definition": ...} is answered by
{"refused": null}, or by the reason.
"""

import json
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import llguidance

from hortator.producer.errors import BadRequest

from .compiler import PATIENCE_S, STACK_BYTES, compile_structure, first_line, read_tokenizer
from .step import Structure, StructureKind

MAX_BYTES = 3 << 29  # 1.5 GiB beyond what a process with the tokenizer has
WALL_S = 10.0  # of a machine that is busy
_CUT_S = 1.2 * PATIENCE_S  # of processor time: what comes to its end before that is refused with the figure
_REASONS = {
    signal.SIGPROF: f"it takes more than {PATIENCE_S:.0f} s to begin: simplify it",
    signal.SIGALRM: f"it takes more than {WALL_S:.0f} s to begin: simplify it",
}
_TOO_LARGE = f"it takes more than {MAX_BYTES / 2**30:g} GiB of memory, or more than the library can bear: simplify it"


def main(arguments: list[str]) -> int:
    path, vocab_size, eos_token_ids, *fds = arguments
    lanes = [socket.socket(fileno=int(fd)) for fd in fds]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for sent_to_all in (signal.SIGINT, signal.SIGTERM):  # of the rank's group: it may go on for a while, so do we
        signal.signal(sent_to_all, signal.SIG_IGN)
    tokenizer, problem = None, None
    try:
        tokenizer = read_tokenizer(Path(path), int(vocab_size), [int(token) for token in eos_token_ids.split(",")])
    except Exception as error:  # the rank reads the same file and says what is wrong with it
        problem = first_line(str(error))
    pids = [_fork(partial(_serve, lane, lanes, tokenizer, problem)) for lane in lanes]
    for lane in lanes:
        lane.close()
    for pid in pids:
        os.waitpid(pid, 0)
    return 0


def _serve(
    lane: socket.socket, lanes: list[socket.socket], tokenizer: llguidance.LLTokenizer | None, problem: str | None
) -> None:
    for other in lanes:
        if other is not lane:
            other.close()
    _say(lane, ready=problem)
    if tokenizer is None:
        return
    for line in lane.makefile("rb"):
        said = json.loads(line)
        structure = Structure(StructureKind(said["kind"]), said["definition"])
        _, status = os.waitpid(_fork(partial(_try, lane, tokenizer, structure)), 0)
        if status:
            died_of = signal.Signals(os.WTERMSIG(status)) if os.WIFSIGNALED(status) else None
            _say(lane, refused=f"structure: {_REASONS.get(died_of, _TOO_LARGE) if died_of else _TOO_LARGE}")


def _try(lane: socket.socket, tokenizer: llguidance.LLTokenizer, structure: Structure) -> None:
    """Within limits that kill this process; whoever waits for it finds out which."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    room = pages * resource.getpagesize() + STACK_BYTES + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    signal.setitimer(signal.ITIMER_PROF, _CUT_S)
    signal.setitimer(signal.ITIMER_REAL, WALL_S)
    answers: list[str | None] = []
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=lambda: answers.append(_refusal(tokenizer, structure)))
    thread.start()
    thread.join()
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if not answers:
        os._exit(1)
    _say(lane, refused=answers[0])


def _refusal(tokenizer: llguidance.LLTokenizer, structure: Structure) -> str | None:
    try:
        compile_structure(tokenizer, structure)
    except BadRequest as error:
        return error.message
    return None


def _say(lane: socket.socket, **answer: str | None) -> None:
    lane.sendall(json.dumps(answer).encode() + b"\n")


def _fork(then: Callable[[], None]) -> int:
    """The id of a process that does this and ends."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            then()
            status = 0
        finally:
            os._exit(status)
    return pid


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

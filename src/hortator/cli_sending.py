"""Sending jobs from the command line: whatever ends the command, the ids of what is in the queue are told."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import typer

from hortator.cli_errors import EXIT_FAILED, EXIT_OK, fail_line
from hortator.cli_output import say
from hortator.interrupts import interrupts

if TYPE_CHECKING:
    from hortator.producer.client import Client, JobHandle
    from hortator.producer.errors import HortatorError
    from hortator.producer.schema import Job

AT_A_TIME = 1000


@dataclass(frozen=True)
class PlacedJob:
    """A job, and the line that it comes from: prompts.jsonl:3, or nothing."""

    job: "Job"
    where: str


@dataclass
class Sent:
    """Handles in the order of the prompts; of the first `num_told` the user knows the id, or has the answer."""

    handles: "list[JobHandle]" = field(default_factory=list)
    num_told: int = 0

    def print_ids(self, *, as_json: bool) -> None:
        some = self.handles[self.num_told :]
        if some:
            typer.echo(
                "\n".join(json.dumps({"id": one.id, "duplicate": one.duplicate}) if as_json else one.id for one in some)
            )
        self.num_told = len(self.handles)

    def say_rest(self) -> None:
        from hortator.producer.hindrance import counted

        if rest := self.handles[self.num_told :]:
            go = "goes" if len(rest) == 1 else "go"
            say(f"note: {counted(len(rest), 'job')} in the queue {go} on; hortator result ID has the answer:")
            say("\n".join(one.id for one in rest))


@contextmanager
def nothing_lost() -> Iterator[Sent]:
    """However the block ends too early, stderr gets the ids that nobody was told."""
    sent = Sent()
    try:
        yield sent
    except BaseException:
        with interrupts.held():
            sent.say_rest()
        raise


def send(talk: "Client", jobs: Sequence[PlacedJob], sent: Sent, *, told: Callable[[], None]) -> None:
    """Enqueue all; `told` is called whenever more are in.  An error names the line that was refused."""
    from hortator.producer.errors import HortatorError

    for start in range(0, len(jobs), AT_A_TIME):
        some = jobs[start : start + AT_A_TIME]
        try:
            with interrupts.held():  # between Redis's answer and ours the ids would be lost
                accept(talk, some, sent)
        except HortatorError as error:
            told()
            raise refused(error, some, len(sent.handles), start) from None
        told()


def accept(talk: "Client", some: Sequence[PlacedJob], sent: Sent) -> None:
    from hortator.producer.errors import HortatorError

    try:
        sent.handles += talk.enqueue_many([placed.job for placed in some])
    except HortatorError as error:
        sent.handles += error.accepted
        raise


def refused(error: "HortatorError", some: Sequence[PlacedJob], num_in: int, start: int) -> "HortatorError":
    """The same error, with the line and how many are in."""
    from hortator.producer.hindrance import counted

    place = error.index if error.index is not None else num_in - start
    if where := some[min(place, len(some) - 1)].where:
        before = f"{counted(num_in, 'job')} before it {'is' if num_in == 1 else 'are'} in"
        error.message = f"{where}: {error.message}; {before}"
        error.args = (error.message,)
    return error


def answers(talk: "Client", sent: Sent, show: "Callable[[int, JobHandle], int]") -> int:
    """Wait for all and show each as soon as those before it are shown."""
    code, ended = EXIT_OK, set()
    for handle in talk.as_completed(sent.handles):
        ended.add(handle)
        while sent.num_told < len(sent.handles) and sent.handles[sent.num_told] in ended:
            code = max(code, show(sent.num_told, sent.handles[sent.num_told]))
            sent.num_told += 1
    return code


def answer_line(handle: "JobHandle", where: str) -> int:
    """One line for one job, whatever its text holds: a JSON string, an array of several, or null for none."""
    from hortator.producer.errors import JobFailed, UnknownJob

    try:
        found = handle.result()
    except (JobFailed, UnknownJob) as failed:
        typer.echo("null")
        return fail_line(f"{where}: {failed.message}", EXIT_FAILED)
    typer.echo(one_line([one.text for one in found.choices] if found.choices else found.text))
    return EXIT_OK


def one_line(value: object) -> str:
    """JSON that reads well and that neither a terminal obeys nor a reader of lines cuts."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)

"""Commands about dead letters: messages that can never run, and jobs that took groups down."""

import base64
import json
import re
import time
from typing import TYPE_CHECKING, Annotated

import typer

from hortator.cli_errors import EXIT_FAILED, EXIT_OK, fail_line, printable
from hortator.cli_jobs import columns
from hortator.cli_store import AsJson, Namespace, RedisUrl, client

if TYPE_CHECKING:
    from hortator.producer.store import DeadLetter

LETTER_ID = re.compile(r"[0-9]{1,16}-[0-9]{1,16}")


def register(app: typer.Typer) -> None:
    letters = typer.Typer(help="Messages that can never run.  Also jobs that took groups down.")
    letters.command("list")(list_letters)
    letters.command("show")(show)
    letters.command("replay")(replay)
    app.add_typer(letters, name="dead-letters")


def list_letters(
    limit: Annotated[int, typer.Option(min=1)] = 100,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    namespace: Namespace = None,
) -> int:
    """Print the dead letters, newest first."""
    with client(redis_url, namespace) as talk:
        found = talk.store.dead_letters(limit=limit)
    if as_json:
        for letter in found:
            typer.echo(json.dumps(summary(letter)))
    elif found:
        rows = [("LETTER", "BURIED", "MODEL", "JOB", "REASON"), *(row(letter) for letter in found)]
        typer.echo("\n".join(columns(rows)))
    return EXIT_OK


def show(
    letter_id: Annotated[str, typer.Argument(metavar="LETTER")],
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    namespace: Namespace = None,
) -> int:
    """Print one dead letter whole.  Bytes that a terminal might obey are escaped."""
    with client(redis_url, namespace) as talk:
        letter = talk.store.dead_letter(letter_id) if LETTER_ID.fullmatch(letter_id) else None
    if letter is None:
        return fail_line(f"there is no dead letter {letter_id}", EXIT_FAILED)
    message = escaped(letter.message)
    if as_json:
        typer.echo(json.dumps({**summary(letter), "message": message}))
    else:
        for name, value in summary(letter).items():
            typer.echo(f"{name}: {printable(str(value))}")
        typer.echo(f"message:\n{message}")
        if body := body_of(letter.message):
            typer.echo(f"its body:\n{escaped(body)}")
    return EXIT_OK


def replay(
    letter_ids: Annotated[list[str], typer.Argument(metavar="LETTER...")],
    redis_url: RedisUrl = None,
    namespace: Namespace = None,
) -> int:
    """Send dead letters to their queues again, with a clean record.  Prints the job ids."""
    for letter_id in letter_ids:
        if not LETTER_ID.fullmatch(letter_id):
            return fail_line(f"there is no dead letter {letter_id}; nothing was replayed", EXIT_FAILED)
    with client(redis_url, namespace) as talk:
        for job_id in talk.store.replay(letter_ids):
            typer.echo(job_id)
    return EXIT_OK


def row(letter: "DeadLetter") -> tuple[str, ...]:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(letter.buried_ms / 1000))
    return letter.letter_id, when, letter.model, letter.job_id or "-", letter.reason[:100]


def summary(letter: "DeadLetter") -> dict[str, str | int | None]:
    return {
        "letter_id": letter.letter_id,
        "model": letter.model,
        "job_id": letter.job_id,
        "reason": letter.reason,
        "buried_ms": letter.buried_ms,
        "message_bytes": letter.message_bytes,
    }


def body_of(message: bytes) -> bytes | None:
    """What a Celery message wraps in base64, where the job stands; None if it is not such a message."""
    try:
        return base64.b64decode(json.loads(message)["body"], validate=True)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def escaped(message: bytes) -> str:
    """As a Python literal would show it: printable ASCII only."""
    return repr(message)[2:-1]

"""Commands about jobs: enqueue, result, tail, cancel."""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hortator.cli_errors import EXIT_FAILED, EXIT_NOT_DONE, EXIT_OK, fail_line, printable
from hortator.cli_sending import PlacedJob, Sent, answer_line, answers, nothing_lost, one_line, send
from hortator.cli_store import AsJson, Namespace, RedisUrl, Tenant, client, given

if TYPE_CHECKING:
    from hortator.producer.client import Client, JobHandle
    from hortator.producer.schema import Chunk, Job

STDIN = Path("-")

JobIdArgument = Annotated[str, typer.Argument(metavar="ID", help="as `hortator enqueue` printed it")]
WaitS = Annotated[float, typer.Option("--wait-s", min=0, help="wait this long for the end of the job")]


def register(app: typer.Typer) -> None:
    for command in (enqueue, result, tail, cancel):
        app.command()(command)


def enqueue(
    prompt: Annotated[str | None, typer.Argument(help="leave it out with --file")] = None,
    *,
    model: Annotated[
        str | None, typer.Option("--model", help="queue of the model; may stand in each line of --file")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="JSON lines, each a job or just a prompt; - is stdin")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="default 256")] = None,
    temperature: Annotated[float | None, typer.Option(help="default 0: greedy")] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    stop: Annotated[list[str] | None, typer.Option(help="ends the text; may be given several times")] = None,
    n: Annotated[int | None, typer.Option("--n", help="answers to the same prompt")] = None,
    more: Annotated[
        str | None, typer.Option("--sampling", metavar="JSON", help='any sampling parameters, as {"min_p": 0.05}')
    ] = None,
    priority: Annotated[str | None, typer.Option(help="interactive | standard | batch")] = None,
    deadline_s: Annotated[float | None, typer.Option(help="the job expires after this")] = None,
    idempotency_key: Annotated[str | None, typer.Option(help="the same key is the same job")] = None,
    tenant: Tenant = "default",
    wait: Annotated[bool, typer.Option("--wait", help="wait for the answers and print them")] = False,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    namespace: Namespace = None,
) -> int:
    """Put prompts in the queue.  Prints their ids, or with --wait their answers.

    The answers to --file are a line each, as JSON strings, in the order of the file; null where there is none.
    """
    sampling = sampling_object(more) | given(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=stop or None, n=n
    )
    common = given(
        model=model, priority=priority, deadline_s=deadline_s, idempotency_key=idempotency_key, tenant=tenant
    )
    if (prompt is None) == (file is None):
        raise typer.BadParameter("give a PROMPT or --file, and not both")
    if file is not None and idempotency_key is not None:
        raise typer.BadParameter("--idempotency-key is for one prompt; in --file each line has its own")
    if file is None:
        jobs = [PlacedJob(parsed({"prompt": prompt}, common, sampling, where=""), "")]
    else:
        jobs = list(read_jobs(file, common, sampling))
    with client(redis_url, namespace, tenant) as talk, nothing_lost() as sent:
        send(talk, jobs, sent, told=(lambda: None) if wait else (lambda: sent.print_ids(as_json=as_json)))
        return print_answers(talk, jobs, sent, as_json=as_json) if wait else EXIT_OK


def result(
    job_id: JobIdArgument,
    *,
    wait_s: WaitS = 0.0,
    tenant: Tenant = "default",
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    namespace: Namespace = None,
) -> int:
    """Print the answer of a job."""
    with client(redis_url, namespace, tenant) as talk:
        return answer(known(talk, job_id), wait_s=wait_s, as_json=as_json)


def tail(
    job_id: JobIdArgument,
    *,
    after: Annotated[int, typer.Option(min=0, help="tokens to leave out")] = 0,
    tenant: Tenant = "default",
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    namespace: Namespace = None,
) -> int:
    """Print the tokens of a job as they come."""
    with client(redis_url, namespace, tenant) as talk:
        chunks = known(talk, job_id).stream(after=after)
        if as_json:
            for chunk in chunks:
                print_now(chunk.model_dump_json(exclude_none=True) + "\n")
        else:
            print_text(chunks)
    return EXIT_OK


def cancel(
    job_ids: Annotated[list[str], typer.Argument(metavar="ID...")],
    tenant: Tenant = "default",
    redis_url: RedisUrl = None,
    namespace: Namespace = None,
) -> int:
    """End jobs.  Prints the state of each; a job that is over stays as it is."""
    with client(redis_url, namespace, tenant) as talk:
        states = talk.store.cancel(job_ids, tenant=tenant)
    for job_id, state in zip(job_ids, states, strict=True):
        if state is not None:
            typer.echo(f"{job_id} {state}")
        else:
            fail_line(f"there is no job {job_id}", EXIT_FAILED)
    return EXIT_FAILED if None in states else EXIT_OK


def sampling_object(text: str | None) -> dict[str, Any]:
    """What --sampling gives; a name that no sampling parameter has is refused."""
    from hortator.producer.schema import Sampling

    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError) as problem:
        raise typer.BadParameter(f"--sampling: not JSON: {problem}") from None
    if not isinstance(found, dict):
        raise typer.BadParameter('--sampling: not an object, as {"min_p": 0.05}')
    if unknown := found.keys() - Sampling.model_fields.keys():
        names = ", ".join(Sampling.model_fields)
        raise typer.BadParameter(f"--sampling: unknown field {', '.join(sorted(unknown))[:200]}; there are {names}")
    return found


def read_jobs(file: Path, common: dict[str, Any], sampling: dict[str, Any]) -> Iterator[PlacedJob]:
    """The jobs of a JSON lines file; the options stand for what a line leaves out."""
    from hortator.producer.errors import BadRequest, ConfigError
    from hortator.producer.schema import Job, Sampling

    others: set[str] = set()  # a data set's own columns, or typing errors
    try:
        text = sys.stdin.read() if file == STDIN else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(f"cannot read {file}: {problem}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{'stdin' if file == STDIN else file}:{number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise BadRequest(f"{where}: not JSON: {problem}") from None
        fields = {"prompt": entry} if isinstance(entry, str) else entry
        if not isinstance(fields, dict):
            raise BadRequest(f"{where}: neither a job (an object) nor a prompt (a string)")
        others |= fields.keys() - Job.model_fields.keys() - Sampling.model_fields.keys()
        yield PlacedJob(parsed(fields, common, sampling, where=where), where)
    if others:
        typer.echo(
            f"note: left out of the jobs, which have no such field: {printable(', '.join(sorted(others)))}", err=True
        )


def parsed(fields: dict[str, Any], common: dict[str, Any], sampling: dict[str, Any], *, where: str) -> "Job":
    """One job.  Raises BadRequest that names each wrong field."""
    from pydantic import ValidationError

    from hortator.producer.errors import BadRequest
    from hortator.producer.job import describe, misplaced
    from hortator.producer.schema import Job, Sampling

    own = fields.get("sampling", {})
    prefix = f"{where}: " if where else ""
    unknown = [f"sampling.{name}" for name in own if name not in Sampling.model_fields] if isinstance(own, dict) else []
    if problem := misplaced(fields):
        raise BadRequest(prefix + problem)
    if unknown:
        raise BadRequest(f"{prefix}unknown field {', '.join(unknown)[:200]}")
    merged = {**common, **fields, "sampling": {**sampling, **own} if isinstance(own, dict) else own}
    if "model" not in merged:
        raise BadRequest(f"{prefix}which model? give --model")
    try:
        return Job.model_validate(merged)
    except ValidationError as error:
        raise BadRequest(prefix + describe(error)) from None


def known(talk: "Client", job_id: str) -> "JobHandle":
    """A job that is there.  A Redis that is away now is an error at once; one that goes away later is waited for."""
    handle = talk.job(job_id)
    handle.status()
    return handle


def print_answers(talk: "Client", jobs: Sequence[PlacedJob], sent: Sent, *, as_json: bool) -> int:
    """Wait for all; print in the order of the prompts."""

    def show(number: int, handle: "JobHandle") -> int:
        where = jobs[number].where
        if as_json or not where:
            return answer(handle, wait_s=None, as_json=as_json)
        return answer_line(handle, where)

    return answers(talk, sent, show)


def answer(handle: "JobHandle", *, wait_s: float | None, as_json: bool) -> int:
    """Print one job's end: the text of each answer, or why there is none."""
    from hortator.producer.errors import JobFailed

    try:
        if as_json:
            return json_answer(handle, wait_s=wait_s)
        found = handle.result(timeout_s=wait_s)
        for one in found.choices or (found,):
            typer.echo(shown(one.text))
    except JobFailed as failed:
        return fail_line(failed.message, EXIT_FAILED)
    except TimeoutError:
        return fail_line(f"job {handle.id} is {handle.status().state}; wait for it with --wait-s", EXIT_NOT_DONE)
    return EXIT_OK


def json_answer(handle: "JobHandle", *, wait_s: float | None) -> int:
    """Print the whole status, whatever it is."""
    from hortator.producer.errors import JobFailed, UnknownJob
    from hortator.producer.schema import State

    try:
        with suppress(JobFailed, TimeoutError):  # the status says it
            handle.result(timeout_s=wait_s)
        found = handle.status()
    except UnknownJob as gone:  # while it was waited for: each job has its line
        typer.echo(
            one_line({"id": handle.id, "state": "unknown", "failure": {"code": gone.code, "message": gone.message}})
        )
        return EXIT_FAILED
    typer.echo(found.model_dump_json(exclude_none=True))
    if not found.state.terminal:
        return EXIT_NOT_DONE
    return EXIT_OK if found.state is State.SUCCEEDED else EXIT_FAILED


def columns(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Left-aligned, as wide as needed."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[n]) for row in cells) for n in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def print_text(chunks: "Iterable[Chunk]") -> None:
    """The first answer as it comes, further ones behind it.  Its last line is ended even if the job ends badly, so that
    the reason stands on its own."""
    begun = False
    others: defaultdict[int, str] = defaultdict(str)
    try:
        for chunk in chunks:
            begun = True
            if chunk.choice:
                others[chunk.choice] += chunk.text
            else:
                print_now(shown(chunk.text))
    except BaseException:
        if begun:
            print_now("\n")
        raise
    print_now("\n")
    for _, text in sorted(others.items()):
        typer.echo(shown(text))


def print_now(text: str) -> None:
    typer.echo(text, nl=False)
    sys.stdout.flush()


def shown(text: str) -> str:
    """A model's text for a terminal, which must not obey it; for a file or a pipe as it is."""
    return printable(text) if sys.stdout.isatty() else text

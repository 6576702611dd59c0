"""Commands that run until they are stopped: redis, worker, serve."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from hortator.cli_errors import EXIT_FAILED, EXIT_OK, fail_line
from hortator.cli_store import Namespace, RedisUrl, given, redacted, store_settings, tell_strange_variables
from hortator.interrupts import hold_until_exec

CELERY_ARGUMENTS = {"allow_extra_args": True}  # those behind "--"


def register(app: typer.Typer) -> None:
    app.command()(redis)
    app.command(context_settings=CELERY_ARGUMENTS)(worker)
    app.command()(serve)


def redis(
    directory: Annotated[
        Path | None, typer.Option("--dir", help="where jobs are kept; default: a temporary one, lost at the end")
    ] = None,
    port: Annotated[int, typer.Option(help="0: any free one", min=0, max=65_535)] = 6379,
) -> int:
    """Run a private redis-server until Ctrl-C.  It is set up so that it loses no job.

    It listens on 127.0.0.1, for this host only; docs/10-operating.md has the redis.conf for a fleet of several hosts.
    """
    from hortator.producer.embedded import EmbeddedRedis
    from hortator.producer.errors import ConfigError

    for number in (signal.SIGINT, signal.SIGTERM):  # a background job of a shell inherits SIGINT as ignored
        signal.signal(number, interrupt)
    try:
        server = EmbeddedRedis(directory, port=port).start()
    except ConfigError as problem:
        return fail_line(problem.message, EXIT_FAILED)
    try:
        typer.echo(server.url)
        kept = "kept" if directory else "lost when this command ends (keep them with --dir)"
        typer.echo(f"redis-server runs in {server.directory}; jobs are {kept}. Ctrl-C stops it.", err=True)
        while server.running:
            time.sleep(0.2)
        return fail_line(f"redis-server ended by itself; its log: {server.log}", EXIT_FAILED)
    except KeyboardInterrupt:
        return EXIT_OK
    finally:
        server.stop()


def serve(
    host: Annotated[str | None, typer.Option(help="default: HORTATOR_API_HOST, else 127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="default: HORTATOR_API_PORT, else 8080; 0: any free one")] = None,
    redis_url: RedisUrl = None,
    namespace: Namespace = None,
) -> int:
    """Run the HTTP API until Ctrl-C.  Its other settings: HORTATOR_API_*, see docs/06-polling-api.md."""
    from fastapi import FastAPI

    from hortator.producer.api import ApiSettings, create_app
    from hortator.producer.api.server import address_of, listen, run
    from hortator.producer.errors import ConfigError, StoreUnavailable
    from hortator.producer.redis_store import AsyncRedisStore
    from hortator.variables import strange_to_api

    signal.signal(signal.SIGINT, interrupt)  # it may be inherited as ignored; later it is uvicorn's
    settings = ApiSettings(**given(host=host, port=port))
    where = store_settings(redis_url, namespace)
    tell_strange_variables()
    for said in strange_to_api(os.environ, ApiSettings):
        typer.echo(f"warning: {said}", err=True)
    settings.key_ring()  # a wrong key file is refused before the port is taken
    # The API has a patience of its own, which knows when it is this process that is slow.
    store = AsyncRedisStore.from_settings(where.model_copy(update={"timeout_s": 2.0, "connect_timeout_s": 2.0}))
    try:
        sock = listen(settings.host, settings.port)
    except ConfigError as problem:
        return fail_line(problem.message, EXIT_FAILED)

    async def make_app() -> FastAPI:
        """Refuses a Redis that would lose jobs; one that is away may come back, readyz says when."""
        try:
            await store.check()
        except StoreUnavailable as problem:
            if isinstance(problem, ConfigError):  # wrong credentials: nothing to wait for
                raise
            typer.echo(f"warning: {problem.message}; serving, not ready until it answers", err=True)
        typer.echo(
            f"hortator API on {address_of(sock)} (described at /openapi.json), {redacted(where.redis_url)}", err=True
        )
        return create_app(store, api_settings=settings)

    run(make_app, store.aclose, sock=sock, settings=settings)
    return EXIT_OK


def worker(
    context: typer.Context,
    *,
    model: Annotated[Path | None, typer.Option("--model", help="directory in the Hugging Face format")] = None,
    name: Annotated[str | None, typer.Option("--name", help="queue; default: the directory's name")] = None,
    tp: Annotated[int | None, typer.Option("--tp", help="tensor parallel ranks")] = None,
    pp: Annotated[int | None, typer.Option("--pp", help="pipeline parallel ranks")] = None,
    device: Annotated[str | None, typer.Option(help="auto | cpu | cuda")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto | float32 | bfloat16 | float16")] = None,
    engine: Annotated[str | None, typer.Option(help="paged | echo")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="jobs at a time")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="tokens; default: the model's own")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="token budget of one step")] = None,
    block_size: Annotated[int | None, typer.Option(help="tokens in one KV block")] = None,
    kv_cache_bytes: Annotated[str | None, typer.Option(help='per rank, as "20 GiB"; default: from free memory')] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(help="part of a GPU's memory that may be used")
    ] = None,
    load_format: Annotated[str | None, typer.Option(help="safetensors | dummy: random weights")] = None,
    group: Annotated[str | None, typer.Option(help="this group's name; default: host and pid")] = None,
    redis_url: RedisUrl = None,
    namespace: Namespace = None,
    log_level: Annotated[str, typer.Option("--log-level", "-l")] = "INFO",
) -> int:
    """Run a model group: its leader and its ranks.

    The same as `celery -A hortator.workers worker -Q MODEL` with HORTATOR_* set; arguments after -- go to celery.
    """
    if context.args and not context.args[0].startswith("-"):
        raise typer.BadParameter(f"{context.args[0]}: a model goes behind --model, what celery shall have behind --")
    import celery  # noqa: F401  # a missing extra is said before anything else

    from hortator.cli_plan import parse_bytes
    from hortator.workers.modelcheck import check_model
    from hortator.workers.settings import WorkerSettings

    chosen = given(
        model_path=model.absolute() if model else None,
        model=name,
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        device=device,
        dtype=dtype,
        engine=engine,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        kv_cache_bytes=None if kv_cache_bytes is None else parse_bytes(kv_cache_bytes, "--kv-cache-bytes"),
        gpu_memory_utilization=gpu_memory_utilization,
        load_format=load_format,
        group=group,
        redis_url=redis_url,
        namespace=namespace,
    )
    settings = WorkerSettings(**chosen)
    if settings.engine == "paged":
        check_model_directory(settings.model_path)
        check_model(settings)
    environment = os.environ | {f"HORTATOR_{field.upper()}": str(value) for field, value in chosen.items()}
    arguments = ["-A", "hortator.workers", "worker", "-Q", settings.queue, "-l", log_level]
    if not any(argument.startswith(("-n", "--hostname")) for argument in context.args):
        arguments += ["-n", f"{settings.group}@%h"]
    hold_until_exec()
    os.execve(sys.executable, [sys.executable, "-m", "celery", *arguments, *context.args], environment)  # noqa: S606


def check_model_directory(path: Path | None) -> None:
    """The commonest mistakes, said before torch is loaded."""
    from hortator.producer.errors import ConfigError

    assert path is not None  # the settings saw to it
    if not path.is_dir():
        raise ConfigError(f"--model {path}: there is no such directory")
    if not (path / "config.json").is_file():
        raise ConfigError(f"--model {path}: no config.json there; it must be a model in the Hugging Face format")


def interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt

"""Which Redis a command talks to: its options, else HORTATOR_REDIS_URL and HORTATOR_NAMESPACE."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit, urlunsplit

import typer

from hortator.cli_output import say

if TYPE_CHECKING:
    from hortator.producer.client import Client
    from hortator.producer.settings import StoreSettings

RedisUrl = Annotated[
    str | None, typer.Option("--redis-url", help="default: HORTATOR_REDIS_URL, else redis://127.0.0.1:6379/0")
]
Tenant = Annotated[str, typer.Option("--tenant", help="whose jobs")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON, one object a line")]
Namespace = Annotated[str | None, typer.Option("--namespace", help="default: HORTATOR_NAMESPACE, else none")]
OPERATOR_TIMEOUT_S = 2.0
PATIENCE_S = 30.0  # how long a command that waits bears with a Redis that is away


def store_settings(redis_url: str | None, namespace: str | None) -> "StoreSettings":
    """The options that were given, over the environment."""
    from hortator.producer.settings import StoreSettings

    return StoreSettings.model_validate(given(redis_url=redis_url, namespace=namespace))


def given(**options: Any) -> dict[str, Any]:
    """Only the options that were given: the rest is for the environment and the defaults."""
    return {name: value for name, value in options.items() if value is not None}


@contextmanager
def client(
    redis_url: str | None, namespace: str | None, tenant: str = "default", timeout_s: float | None = None
) -> Iterator["Client"]:
    """A client for one command."""
    tell_strange_variables()
    from hortator.producer.client import Client

    with Client(
        redis_url, namespace=namespace, tenant=tenant, timeout_s=timeout_s, patience_s=PATIENCE_S, on_outage=tell_outage
    ) as opened:
        yield opened


def tell_outage(error: Exception) -> None:
    """Whoever waits hears at once that what he waits for cannot come now."""
    say(f"waiting up to {PATIENCE_S:.0f} s: {error}")


def operator(redis_url: str | None, namespace: str | None) -> AbstractContextManager["Client"]:
    """The client of whoever operates a fleet, who rather waits than hears of a Redis that is busy for a moment."""
    return client(redis_url, namespace, timeout_s=OPERATOR_TIMEOUT_S)


def redacted(url: str) -> str:
    """The URL without its password."""
    parts = urlsplit(url)
    user, at, address = parts.netloc.rpartition("@")
    if ":" in user:
        user = user.partition(":")[0] + ":***"
    return urlunsplit(parts._replace(netloc=user + at + address, query="", fragment=""))


def tell_strange_variables() -> None:
    """Before anything is asked, for one of them may have meant another Redis."""
    from hortator.variables import strange_to_worker

    for said in strange_to_worker(os.environ):
        typer.echo(f"warning: {said}", err=True)

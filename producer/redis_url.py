"""Where Redis is, as a URL: checked once, with the parser of the clients, for all who are told it.

redis-py takes port 0, ignores a database that is no number and sends parameters that nobody knows to a constructor; so
what it reads is looked at once more.  No message repeats the URL, which may hold a password.
"""

import re
from typing import Annotated
from urllib.parse import SplitResult, parse_qs, quote, urlsplit

from pydantic import AfterValidator

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\.?|[0-9A-Fa-f:.]+")  # compose's names have "_"
_TLS = frozenset({"ssl_cert_reqs", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname"})
_PARAMETERS = {"redis": frozenset[str](), "rediss": _TLS, "unix": frozenset({"db"})}
_CREDENTIALS = ("password", "username")
_WRITE = "write redis://HOST:PORT/DB, with a password redis://:PASSWORD@HOST:PORT/DB (its special characters as %XX)"


def checked_redis_url(url: str) -> str:
    """The URL as it is.  ValueError says what is wrong with it and what to write instead."""
    if problem := _problem(url):
        raise ValueError(f"{problem}; {_WRITE}")
    return url


RedisUrl = Annotated[str, AfterValidator(checked_redis_url)]


def kombu_url(url: str, *, transport: str = "redis") -> str:
    """The same place as kombu and Celery spell it: a unix socket otherwise than redis-py, its database too.  What is
    before "+" decides which transport it is, whatever else says so."""
    parts = urlsplit(url)
    if parts.scheme != "unix":
        return url
    database = parse_qs(parts.query).get("db", ["0"])[0]
    return f"{transport}+socket://{parts.netloc}{parts.path}?virtual_host={quote(database)}"


def is_unix(url: str) -> bool:
    return url.startswith("unix://")


def _problem(url: str) -> str | None:
    if not url.isprintable() or " " in url:
        return "the URL of Redis has a space or a control character"
    if not url.startswith(tuple(f"{scheme}://" for scheme in _PARAMETERS)):
        return "the URL of Redis begins with none of redis://, rediss:// and unix://"
    try:
        parts = urlsplit(url)
    except ValueError:
        return "the URL of Redis has '[' or ']' around something that is no IPv6 address"
    if parts.fragment or url.endswith("#"):
        return _fragment_problem(parts)
    return _place_problem(parts) or _parameter_problem(parts) or _parser_problem(url)


def _fragment_problem(parts: SplitResult) -> str:
    """What follows "#" is read by nobody: a password with that character looks like a port."""
    return _place_problem(parts) or "the URL of Redis has a '#'"


def _place_problem(parts: SplitResult) -> str | None:
    if parts.scheme == "unix":
        if parts.netloc.rpartition("@")[2]:
            return "the URL of Redis names a host before its socket: write three slashes, unix:///run/redis.sock"
        return None if parts.path.strip("/") else "the URL of Redis names no socket: write unix:///run/redis.sock"
    try:
        if parts.port == 0:
            raise ValueError
    except ValueError:
        return "the URL of Redis has a port that is no number from 1 to 65535"
    if not parts.hostname or not _HOST.fullmatch(parts.hostname):
        return "the URL of Redis names no host"
    database = parts.path.removeprefix("/")
    if database and not (database.isascii() and database.isdecimal()):
        return "the URL of Redis has a database that is no number"
    return None


def _parameter_problem(parts: SplitResult) -> str | None:
    known = _PARAMETERS[parts.scheme]
    given = parse_qs(parts.query, keep_blank_values=True)
    for name in _CREDENTIALS:
        if name in given:
            return f"the URL of Redis has a {name} behind '?', where it would be logged: write it before the host"
    if unknown := sorted(given.keys() - known):
        there = f"; known for {parts.scheme}: {', '.join(sorted(known))}" if known else ""
        return f"the URL of Redis has a parameter {unknown[0][:40]!r} that means nothing here{there}"
    return None


def _parser_problem(url: str) -> str | None:
    """What only the clients' own parser finds, as a database that is no number."""
    from redis.connection import parse_url  # here: ranks have settings, too, and no Redis

    try:
        parse_url(url)  # type: ignore[no-untyped-call]
    except ValueError as error:
        return f"the URL of Redis cannot be read: {error}"
    return None

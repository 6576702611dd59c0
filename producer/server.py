"""What the Redis server must be, and what its errors mean."""

import re
from typing import Any

import redis.exceptions as broken

from .errors import HortatorError, StoreForbidden, StoreUnavailable, StoreUnsuitable


def refuse_unsuitable(info: dict[str, Any]) -> None:
    """StoreUnsuitable with the reason, unless the server that gave this INFO is safe to queue on."""
    version = str(info.get("redis_version", "0"))
    if tuple(int(part) for part in version.split(".")[:2]) < (6, 2):
        raise StoreUnsuitable(f"Redis {version} is too old: 6.2 or newer is needed")
    if info.get("cluster_enabled"):
        raise StoreUnsuitable("this is a Redis Cluster node: use a single Redis (with replicas, if you like)")
    if info.get("role") != "master":
        raise StoreUnsuitable("this Redis is a replica and takes no writes: give the address of its master")
    policy = info.get("maxmemory_policy")
    if policy != "noeviction":
        raise evicts(str(policy))


def evicts(policy: str) -> StoreUnsuitable:
    return StoreUnsuitable(
        f"this Redis evicts keys when it is full (maxmemory-policy {policy}), which loses jobs:"
        " run CONFIG SET maxmemory-policy noeviction, and put it in redis.conf"
    )


# Redis 6.2 wraps what a script met in an error of its own, so the code may stand anywhere
_UNAVAILABLE = re.compile(r"\b(OOM|MISCONF|READONLY|LOADING|BUSY|MASTERDOWN|NOREPLICAS)\b")

_NO_PASSWORD = re.compile(
    r"\bNOAUTH\b|Authentication required|HELLO must be called with the client already authenticated"
)
_PROTECTED = re.compile(r"\bDENIED\b.*protected mode")
_HOW = "write redis://:PASSWORD@HOST:PORT/DB"
_FORBIDDEN = re.compile(r"\b(NOAUTH|WRONGPASS|NOPERM)\b|can't run this command|can't access at least one of the keys")


def translate(error: Exception, where: str) -> HortatorError:
    """What to raise for what redis-py raised.  Whatever a server answers that nobody foresaw is an outage as well: what
    is at that address now, or what somebody did to our keys, may be mended while workers and clients wait."""
    text = str(error)
    if _NO_PASSWORD.search(text):
        return StoreForbidden(f"Redis at {where} wants a password, and the URL has none: {_HOW}", retry_after_s=5)
    if _PROTECTED.search(text):
        return StoreForbidden(
            f"Redis at {where} is in protected mode: without a password it takes nobody from another machine;"
            f" give it one (requirepass in its configuration) and {_HOW}",
            retry_after_s=5,
        )
    if isinstance(error, broken.AuthenticationError | broken.NoPermissionError) or _FORBIDDEN.search(text):
        return StoreForbidden(f"Redis at {where} refuses our credentials: {text[:200]}", retry_after_s=5.0)
    if isinstance(error, broken.ConnectionError | broken.TimeoutError | OSError):
        problem = text.rstrip(".") or type(error).__name__
        return StoreUnavailable(f"Redis at {where} does not answer: {problem}; does it run, and is the URL right?")
    if isinstance(error, broken.OutOfMemoryError | broken.ReadOnlyError) or _UNAVAILABLE.search(text):
        return StoreUnavailable(f"Redis at {where} takes no writes now: {text[:200]}")
    return StoreUnavailable(f"Redis at {where} refused a call: {text[:200] or type(error).__name__}")


def refuse_no_room(reply: list[Any]) -> None:
    kind, *rest = reply
    if kind == b"evicts":
        raise evicts(rest[0].decode(errors="replace"))
    if kind == b"full_memory":
        raise StoreUnavailable(
            f"Redis is nearly full ({rest[0]} of {rest[1]} bytes): finished results will make room", retry_after_s=5.0
        )

"""What tells two fleets apart: the Redis and the namespace in which the names of their groups are unique.  Pure."""

import hashlib
import ipaddress
from collections.abc import Iterable
from urllib.parse import parse_qs, urlsplit

from .errors import BadFleet
from .fleet import Fleet


def identity_of(fleet: Fleet) -> str:
    """Fit to be shown and stored: without user and password."""
    return f"{redis_place(fleet.redis_url)} namespace={fleet.namespace or 'none'}"


def state_name(stem: str, identity: str) -> str:
    """The name of the fleet's directory on its hosts."""
    return f"{stem}-{hashlib.sha256(identity.encode()).hexdigest()[:10]}"


def check_redis_is_reached(fleet: Fleet, leaders: Iterable[str], *, here: Iterable[str] | None = None) -> None:
    """Raises BadFleet if these leaders' hosts cannot all mean the same Redis.  `here`: those that are this one."""
    hosts = dict.fromkeys(leaders)
    alone = len(hosts) == 1 if here is None else set(hosts) <= set(here)
    if hosts and not alone and _is_local(fleet.redis_url):
        raise BadFleet(
            f"{_said(fleet)} is every host's own, but leaders run on {_listed(list(hosts))}: "
            "give an address that all of them reach, as redis://10.0.0.1:6379/0 (docs/10-operating.md says how to run "
            "such a Redis)"
        )


def check_redis_of_recipe(fleet: Fleet, hosts: Iterable[str], *, style: str) -> None:
    """Raises BadFleet if leaders that somebody else places on some of these hosts would each look for a Redis of their
    own.  In a pod even one host's is out of reach."""
    among = list(dict.fromkeys(hosts))
    if not _is_local(fleet.redis_url):
        return
    if style == "kubernetes":
        raise BadFleet(
            f"{_said(fleet)} is every pod's own: give the address of a Redis that all pods reach, as"
            " redis://redis:6379/0 (compose/kubernetes has such a one)"
        )
    if len(among) > 1:
        raise BadFleet(
            f"{_said(fleet)} is every host's own, but {style} is to use {_listed(among)}: give an address that all of"
            " them reach, as redis://10.0.0.1:6379/0 (docs/10-operating.md says how to run such a Redis)"
        )


def _said(fleet: Fleet) -> str:
    default = "" if "redis_url" in fleet.model_fields_set else " (the default: the fleet file has none)"
    return f"redis_url {redis_place(fleet.redis_url)}{default}"


def redis_place(url: str) -> str:
    """Scheme, host, port and database of a URL: no user, no password."""
    parts = urlsplit(url)
    asked = parse_qs(parts.query)
    database = asked.get("db", ["0"])[0]
    if parts.scheme == "unix":
        return f"unix://{parts.path}?db={database}"
    host = (parts.hostname or "localhost").lower()
    return f"{parts.scheme}://{host}:{parts.port or 6379}/{parts.path.strip('/') or database}"


def _is_local(url: str) -> bool:
    parts = urlsplit(url)
    host = (parts.hostname or "localhost").lower()
    if parts.scheme == "unix" or host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listed(hosts: list[str]) -> str:
    return ", ".join(hosts[:5]) + (f" and {len(hosts) - 5} more" if len(hosts) > 5 else "")

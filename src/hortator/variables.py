"""HORTATOR_* variables that nobody reads: most often a setting whose name was misspelt."""

import difflib
from collections.abc import Collection, Iterable, Iterator

from pydantic_settings import BaseSettings

PREFIX = "HORTATOR_"
API_PREFIX = "HORTATOR_API_"
CONFIG_VARIABLE = "HORTATOR_CONFIG"
HANDED_DOWN = frozenset({"HORTATOR_RANK_CONFIG", "HORTATOR_PARENT_PID"})
"""From the front to its ranks."""
COMPOSE = frozenset(
    PREFIX + name for name in ("API_IMAGE", "WORKER_IMAGE", "MODEL_DIR", "REDIS_PUBLISH", "API_PUBLISH")
)
"""Filled into the compose files."""


def variables_of(settings: type[BaseSettings]) -> frozenset[str]:
    """The variables that these settings are read from."""
    prefix = settings.model_config.get("env_prefix", "")
    return frozenset(prefix + name.upper() for name in settings.model_fields)


def strange_to_worker(names: Iterable[str]) -> Iterator[str]:
    """A line for each variable that neither a worker nor a producer reads; the API's are the API's business."""
    from hortator.producer.settings import StoreSettings
    from hortator.workers.settings import WorkerSettings

    known = variables_of(WorkerSettings) | variables_of(StoreSettings) | COMPOSE | HANDED_DOWN | {CONFIG_VARIABLE}
    return strange((name for name in names if not name.upper().startswith(API_PREFIX)), known)


def strange_to_api(names: Iterable[str], settings: type[BaseSettings]) -> Iterator[str]:
    """A line for each HORTATOR_API_* variable that the API, which has these settings, does not read."""
    return strange((name for name in names if name.upper().startswith(API_PREFIX)), variables_of(settings) | COMPOSE)


def strange(names: Iterable[str], known: Collection[str]) -> Iterator[str]:
    """Never their values, which may be secrets."""
    for name in sorted(names):
        if not name.upper().startswith(PREFIX) or name.upper() in known:
            continue
        bare = {other.removeprefix(PREFIX): other for other in known}
        nearest = difflib.get_close_matches(name.upper().removeprefix(PREFIX), bare, n=1, cutoff=0.7)
        yield f"{name} is no setting and is ignored" + (f": is {bare[nearest[0]]} meant?" if nearest else "")

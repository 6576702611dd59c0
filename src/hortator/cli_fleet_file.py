"""The fleet file as commands take it: what a leader would refuse at its start is refused here."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hortator.topology.fleet import Fleet


def checked_fleet(file: Path) -> "Fleet":
    """Read the file.  Raises BadFleet."""
    from hortator.topology.errors import BadFleet
    from hortator.topology.fleet import read_fleet

    fleet = read_fleet(file)
    if problem := redis_problem(fleet) or settings_problem(fleet):
        raise BadFleet(f"{file}: {problem}")
    return fleet


def redis_problem(fleet: "Fleet") -> str | None:
    """Why no client can be made for its redis_url; it is not connected to."""
    from hortator.producer.errors import ConfigError
    from hortator.producer.redis_store import RedisStore

    try:
        RedisStore(fleet.redis_url, namespace=fleet.namespace).close()
    except ConfigError as error:
        return f"redis_url: {error.message}"
    return None


def settings_problem(fleet: "Fleet") -> str | None:
    """What is wrong with the settings (HORTATOR_*) in its environment."""
    from pydantic import ValidationError

    from hortator.producer.problems import text_of
    from hortator.variables import PREFIX, strange_to_worker
    from hortator.workers.settings import read_setting

    for line in strange_to_worker(fleet.environment):
        return f"environment: {line.replace(' and is ignored', '')}"
    for name, value in fleet.environment.items():
        if name.startswith(PREFIX):
            try:
                read_setting(name.removeprefix(PREFIX).lower(), value)
            except ValidationError as error:
                return f"environment.{name}: {text_of(error.errors()[0])}"
    return None

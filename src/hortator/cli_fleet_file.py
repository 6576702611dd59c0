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
    """What a leader of some model would refuse of the settings that it is given."""
    from pydantic import ValidationError

    from hortator.producer.problems import text_of
    from hortator.variables import PREFIX, strange_to_worker
    from hortator.workers.settings import settings_of

    for line in strange_to_worker(fleet.environment):
        return f"environment: {line.replace(' and is ignored', '')}"
    variables = {name.upper(): name for name in fleet.environment}
    for spec in fleet.models:
        try:
            settings_of({**fleet.environment, **fleet.worker_environment(spec)})
        except ValidationError as error:
            problem = error.errors()[0]
            name = str(problem["loc"][0]) if problem["loc"] else ""
            own = f"models[{spec.name!r}]" + (f".{name}" if name else "")
            variable = variables.get(f"{PREFIX}{name.upper()}")
            return f"{f'environment.{variable}' if variable else own}: {text_of(problem)}"
    return None

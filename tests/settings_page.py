"""docs/12-settings.md, made from the settings themselves.  `python -m tests.settings_page` writes it anew."""

import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings

from hortator.producer.api.settings import ApiSettings
from hortator.producer.settings import StoreSettings
from hortator.workers.settings import WorkerSettings

PAGE = Path(__file__).resolve().parent.parent / "docs" / "12-settings.md"
READERS: dict[type[BaseSettings], str] = {
    StoreSettings: "producers, API",
    WorkerSettings: "workers",
    ApiSettings: "API",
}
BOUNDS = {Ge: ("ge", ">="), Gt: ("gt", ">"), Le: ("le", "<="), Lt: ("lt", "<")}

HEAD = """\
# Every setting

Each is an environment variable; lists are JSON there, unless the meaning names another form. A keyword in Python, or an
option of a command, comes before it. Workers also read a TOML file that `HORTATOR_CONFIG` names, with the names in
small letters and without `HORTATOR_`. A variable that begins like these and is none is told at start, with the name
that was probably meant. Times are in seconds. A fleet file ([08-many-nodes](08-many-nodes.md)) has most of a worker's
settings for each model.

This table is made from the code: `python -m tests.settings_page` writes it.

| name | type | default | meaning | who reads it |
|---|---|---|---|---|
"""

BY_SSH = "launcher=ssh and deepspeed; default: what ssh's own configuration says"
MEANINGS = {
    "API_HOST": "address that the API listens on",
    "API_KEYS_FILE": "file of lines as `hortator keys new` prints them",
    "API_MAX_BODY_BYTES": "a larger body is refused before it is read",
    "API_MAX_JSON_DEPTH": "objects and arrays inside each other",
    "COLLECTIVE_TIMEOUT_S": "torch's own limit of a collective; a dead rank is found long before",
    "CONNECT_TIMEOUT_S": "longest wait for a connection to Redis",
    "API_PORT": "port that the API listens on; 0: any free one",
    "CONTROL_HOST": "where ranks and keepers find the front; default with hosts: the first of them",
    "DEFAULT_DEADLINE_S": "the deadline of jobs that name none",
    "KV_CACHE_BYTES": "memory for KV blocks, per rank; default: from free memory",
    "MAX_MODEL_LEN": "tokens of prompt and answer together; default: the model's own",
    "CONTROL_PORT": "where ranks report to the front; 0: any free port",
    "DEVICE": "what the ranks compute on; auto: GPUs if there are any",
    "DTYPE": "of weights and KV blocks; auto: the checkpoint's own",
    "GROUP": "the group's name",
    "HEARTBEAT_S": "how often ranks and front say that they live",
    "IDEMPOTENCY_TTL_S": "how long an idempotency key stands for its job",
    "JOURNAL_TTL_S": "how long a job's tokens can be read from the stream; cut to RESULT_TTL_S",
    "LAUNCHER": "who starts the ranks of other hosts",
    "LEASE_S": "a leader that is silent for so long loses its jobs to another",
    "MAX_ATTEMPTS": "times that a job may be started before it fails",
    "MAX_LETTERS": "dead letters that are kept",
    "MAX_LETTERS_BYTES": "bytes of dead letters that are kept",
    "MAX_MESSAGE_BYTES": "a larger job is refused",
    "MAX_NUM_SEQS": "jobs that the group computes at a time",
    "MAX_QUEUED_PER_MODEL": "jobs that may wait for a model; more are refused with queue_full",
    "MAX_QUEUED_PER_TENANT": "jobs of one tenant that may wait for a model; more are refused with queue_full",
    "MEMORY_HEADROOM": "share of Redis's maxmemory that is kept free of new jobs",
    "MODEL_PATH": "model directory in the Hugging Face format, the same on every host",
    "PIPELINE_PARALLEL_SIZE": "stages that the layers are split into",
    "REDIS_URL": "where Redis is",
    "REQUIRE_KNOWN_MODEL": "refuse jobs for models that no group has served within RESULT_TTL_S",
    "RESTART_WINDOW_S": "what restart_budget counts in",
    "RESULT_TTL_S": "how long a job's record is kept after its end",
    "SSH_IDENTITY_FILE": f"ssh's private key; {BY_SSH}",
    "SSH_KNOWN_HOSTS_FILE": f"keys of the hosts that ssh may reach; {BY_SSH}",
    "SSH_PORT": f"port of ssh on the other hosts; {BY_SSH}",
    "SSH_USER": f"who ssh is on the other hosts; {BY_SSH}",
    "START_TIMEOUT_S": "a group that is not ready after this is started anew",
    "TENSOR_PARALLEL_SIZE": "ranks that every layer is cut for",
}
"""Where the field itself says nothing, or too little without its neighbours."""

DEFAULTS = {"group": "host and pid", "remote_python": "the front's own"}
"""Where the machine decides."""


def page() -> str:
    return HEAD + "".join(f"{row}\n" for row in rows())


def rows() -> Iterator[str]:
    """By name; a setting that several read with the same meaning is one row."""
    readers: dict[tuple[str, str, str, str], list[str]] = {}
    for settings, reader in READERS.items():
        prefix = str(settings.model_config.get("env_prefix", ""))
        for name, field in settings.model_fields.items():
            variable = (prefix + name).upper()
            row = (variable, type_of(field), default_of(name, field), meaning_of(variable, field))
            readers.setdefault(row, []).append(reader)
    for row in sorted(readers):
        variable, kind, default, meaning = row
        yield f"| `{variable}` | {kind} | {default} | {meaning} | {', '.join(readers[row])} |"


def meaning_of(variable: str, field: FieldInfo) -> str:
    short = variable.removeprefix("HORTATOR_")
    return (MEANINGS.get(short) or field.description or missing(variable)).replace("|", "\\|")


def missing(variable: str) -> str:
    raise KeyError(f"{variable} has no meaning yet: give its field a description")


def type_of(field: FieldInfo) -> str:
    """As the environment has it, with its limits."""
    limits = [
        f"{sign} {getattr(rule, name)}"
        for kind, (name, sign) in BOUNDS.items()
        for rule in field.metadata
        if isinstance(rule, kind)
    ]
    return ", ".join([kind_of(field.annotation), *limits])


def kind_of(annotation: Any) -> str:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind_of(parts[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind_of(part) for part in parts if part is not type(None))
    if origin is typing.Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (tuple, frozenset):
        return "list"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path"}
    return names[annotation]


def default_of(name: str, field: FieldInfo) -> str:
    value = field.default
    if name in DEFAULTS:
        return DEFAULTS[name]
    assert value is not PydanticUndefined, f"{name} has a default of no name yet: give it one in DEFAULTS"
    if value is None or value in ("", (), frozenset()):
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def links() -> set[str]:
    """The pages that lead here."""
    return {path.name[:2] for path in PAGE.parent.glob("*.md") if re.search(r"\(12-settings\.md\)", path.read_text())}


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

"""The fleet file: what shall run, as a TOML or YAML file that one person reads and one program checks.

    redis_url = "redis://10.0.0.1:6379/0"
    hostfile = "hosts"                      # beside this file
    gpu_memory_bytes = "80 GiB"             # of each GPU; [hosts."10.0.0.4"] may say otherwise

    [[models]]
    name = "llama"                          # its queue
    path = "/models/llama"                  # the same directory on every host
    tensor_parallel_size = 4
    pipeline_parallel_size = 2
    replicas = 3

A model may also have every setting of the worker that is not a matter of where it runs (max_num_seqs, dtype, lease_s).
What [environment] says of them (HORTATOR_DEVICE) holds for all models that do not say otherwise, in the plan too.
Pure, but for `read_fleet`.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ByteSize, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import ErrorDetails

from hortator.ceilings import MAX_BYTES, Lifetime

from .address import address_problem, canonical, python_problem, shown, unbracketed, user_problem
from .elsewhere import OTHER_PLACES, PLACES, RULES
from .errors import BadFleet
from .groupsettings import GroupSettings
from .plainyaml import BadYaml, read_yaml
from .variables import OWN_PREFIX, variable_problem

MAX_FLEET_BYTES = 1 << 20
MAX_KEY_PARTS = 32  # the parser takes the square of it
MAX_REPLICAS = 16_384

_LONG_KEY = re.compile(rf"""(?<![\w'"-])(?:[\w'"-]++[ \t]*+\.[ \t]*+){{{MAX_KEY_PARTS}}}""")


Text = TypeVar("Text", str, Path)


def _checked_address(text: str) -> str:
    return canonical(_without(address_problem, unbracketed(text)))


def _checked_user(text: str) -> str:
    return _without(user_problem, text)


def _checked_python(path: Path) -> Path:
    _without(python_problem, str(path))
    return path


def _checked_variable(name: str) -> str:
    if name.startswith(OWN_PREFIX) and name.isidentifier():
        return name
    return _without(partial(variable_problem, by_ssh=True), name)


def _without(problem_of: Callable[[str], str | None], text: str) -> str:
    if problem := problem_of(text):
        raise ValueError(problem)
    return text


def _printable(text: Text) -> Text:
    if not str(text).isprintable():
        raise ValueError("has a control character: remove it")
    return text


def _at_home(path: Path) -> Path:
    """`~` is the home of who runs this."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError("there is no such user: write the path out") from None


Line = Annotated[str, StringConstraints(max_length=4096), AfterValidator(_printable)]
PlainPath = Annotated[Path, AfterValidator(_printable), AfterValidator(_at_home)]
Address = Annotated[str, AfterValidator(_checked_address)]
Bytes = Annotated[ByteSize, Field(gt=0, le=MAX_BYTES)]
QueueName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")]
User = Annotated[str, AfterValidator(_checked_user)]
Interpreter = Annotated[PlainPath, AfterValidator(_checked_python)]
Variable = Annotated[str, AfterValidator(_checked_variable)]


class Table(BaseModel):
    """A table of the file; a key that nobody knows is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ModelSpec(Table, GroupSettings):
    """One [[models]] table: what is its own, and every setting of a group that is not a matter of where it runs."""

    name: QueueName
    path: PlainPath | None = Field(default=None, description="model directory; engine=paged needs it")
    replicas: int = Field(default=1, ge=1, le=MAX_REPLICAS, description="groups that serve this model")
    kv_cache_bytes: Bytes | None = None
    result_ttl_s: Lifetime = Field(default=86_400.0, ge=1)

    def group(self, replica: int) -> str:
        """The name of a replica's group: fit for file names and for Celery's node names."""
        return f"{self.name.replace('/', '.')}-{replica}"


class Ssh(Table):
    """How the hosts are reached: the same for all.  What is None is left to ssh's own configuration."""

    user: User | None = None
    port: int | None = Field(default=None, ge=1, le=65_535)
    identity_file: PlainPath | None = None
    known_hosts_file: PlainPath | None = None
    connect_timeout_s: int = Field(default=10, ge=1, le=600)


class HostSpec(Table):
    """What one host has that the others do not."""

    gpu_memory_bytes: Bytes | None = None


class Fleet(Table):
    """The whole file.  Paths are absolute, but for those that were given with a source of no directory."""

    redis_url: Line = "redis://127.0.0.1:6379/0"
    namespace: Line = ""
    hostfile: PlainPath | None = None
    python: Interpreter | None = Field(
        default=None, description="interpreter on every host; default: the one that runs this"
    )
    environment: dict[Variable, Line] = Field(
        default={}, description="for every rank, as NCCL_SOCKET_IFNAME; HORTATOR_* for leaders alone"
    )
    gpu_memory_bytes: Bytes | None = Field(default=None, description="of each GPU; None: not known")
    hosts: dict[Address, HostSpec] = {}
    ssh: Ssh = Ssh()
    models: tuple[ModelSpec, ...]

    def model_named(self, name: str) -> ModelSpec:
        """The model of this queue name, which must be in the file."""
        return next(model for model in self.models if model.name == name)

    @property
    def rank_variables(self) -> tuple[str, ...]:
        """Those of `environment` that every rank gets, wherever it is."""
        return tuple(name for name in self.environment if not name.startswith(OWN_PREFIX))

    def gpu_memory(self, address: str) -> int | None:
        """Bytes of each GPU of the host, if anybody has said."""
        own = self.hosts.get(canonical(address))
        return own.gpu_memory_bytes if own and own.gpu_memory_bytes is not None else self.gpu_memory_bytes

    def worker_environment(self, model: ModelSpec) -> dict[str, str]:
        """HORTATOR_* variables that tell a worker of `model` what the file says, and only that.  `redis_url` may hold a
        password: for an environment, never for an argument list."""
        said: dict[str, Any] = self.model_dump(include={"redis_url", "namespace"}, exclude_unset=True)
        said |= {"model": model.name, "model_path": model.path, "rank_variables": ",".join(self.rank_variables) or None}
        said |= model.model_dump(exclude_unset=True, exclude={"name", "path", "replicas"})
        return {f"HORTATOR_{name.upper()}": str(value) for name, value in said.items() if value is not None}


def read_fleet(path: Path) -> Fleet:
    """Read and check the file.  Raises BadFleet."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FLEET_BYTES + 1)
    except OSError as error:
        raise BadFleet(f"cannot read the fleet file {path}: {error.strerror}") from error
    if len(raw) > MAX_FLEET_BYTES:
        raise BadFleet(f"{path} is larger than {MAX_FLEET_BYTES} bytes: it is no fleet file")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise BadFleet(f"{path} is not UTF-8 at byte {error.start}: save it as UTF-8 text") from error
    return parse_fleet(text, source=path.absolute())


def parse_fleet(text: str, *, source: Path = Path("fleet.toml")) -> Fleet:
    """Check the file's text; relative paths in it are taken from the directory of `source`.  Raises BadFleet, naming
    file, key and what to do."""
    content = _content(text, source)
    try:
        fleet = Fleet.model_validate(content)
    except ValidationError as error:
        raise BadFleet(f"{source}: {'; '.join(_problems(error, content))}") from error
    _check_environment(fleet, source)
    fleet = _with_common_settings(fleet, source)
    _check_models(fleet, source)
    return _with_absolute_paths(fleet, source.parent)


def _content(text: str, source: Path) -> dict[str, Any]:
    """The tables, by the kind of file that its name says it is."""
    reader = _READERS.get(source.suffix.lower())
    if reader is None:
        raise BadFleet(f"{source}: the name of a fleet file ends in {', '.join(_READERS)}: rename it, or write one")
    try:
        content = reader(text)
    except RecursionError as error:
        raise BadFleet(f"{source} is nested too deeply: it is no fleet file") from error
    except ValueError as error:  # a number of thousands of digits is no error of the format's own
        kind = "YAML" if isinstance(error, BadYaml) else "TOML"
        raise BadFleet(f"{source} is not valid {kind}: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise BadFleet(f"{source} is no table of keys: begin with models:")
    return content


def _read_toml(text: str) -> dict[str, Any]:
    if _LONG_KEY.search(text):
        raise ValueError(f"a key has more than {MAX_KEY_PARTS} parts")
    return tomllib.loads(text)


_READERS: dict[str, Callable[[str], Any]] = {".toml": _read_toml, ".yaml": read_yaml, ".yml": read_yaml}


def _check_environment(fleet: Fleet, source: Path) -> None:
    """A setting whose place is elsewhere would be overruled in silence."""
    for name in fleet.environment:
        if elsewhere := OTHER_PLACES.get(name.upper()):
            raise BadFleet(f"{source}: environment.{name}: {elsewhere}")


def _with_common_settings(fleet: Fleet, source: Path) -> Fleet:
    """Settings of [environment] that a model may have, in every model that does not say them itself."""
    known = {
        f"{OWN_PREFIX}{name.upper()}": name for name in ModelSpec.model_fields.keys() - {"name", "path", "replicas"}
    }
    variables = {known[name.upper()]: name for name in fleet.environment if name.upper() in known}
    common = {setting: fleet.environment[name] for setting, name in variables.items()}
    models = []
    for model in fleet.models:
        try:
            models.append(ModelSpec.model_validate(common | model.model_dump(exclude_unset=True)))
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = f"models[{shown(model.name)}] with [environment]"
            key = f"environment.{variables[str(problem['loc'][0])]}" if problem["loc"] else where
            raise BadFleet(f"{source}: {key}: {_worded(problem)}") from error
    return fleet.model_copy(update={"models": tuple(models)})


def _check_models(fleet: Fleet, source: Path) -> None:
    if not fleet.models:
        raise BadFleet(f"{source}: models: {_NO_MODELS}")
    seen: dict[str, str] = {}
    for model in fleet.models:
        other = seen.get(model.group(0))
        if other is not None:
            why = "stands twice" if other == model.name else f"has groups of the same names as {other!r}"
            raise BadFleet(f"{source}: models: {model.name!r} {why}: rename one, or use replicas for more groups")
        seen[model.group(0)] = model.name
        if model.path is None and model.engine == "paged":
            raise BadFleet(f"{source}: models[{model.name!r}].path: is missing: give the model's directory")


def _with_absolute_paths(fleet: Fleet, directory: Path) -> Fleet:
    models = tuple(model.model_copy(update={"path": _absolute(model.path, directory)}) for model in fleet.models)
    files = {name: _absolute(getattr(fleet.ssh, name), directory) for name in ("identity_file", "known_hosts_file")}
    ssh = fleet.ssh.model_copy(update=_given(**files))
    return fleet.model_copy(
        update={"models": models, "ssh": ssh, **_given(hostfile=_absolute(fleet.hostfile, directory))}
    )


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _absolute(path: Path | None, directory: Path) -> Path | None:
    """`..` is resolved without looking at the disk, which may be another host's."""
    return None if path is None else Path(os.path.normpath(directory / path))


# --- what is wrong, in words


def _problems(error: ValidationError, content: Mapping[str, Any]) -> Iterable[str]:
    for problem in error.errors(include_url=False)[:5]:
        yield f"{_key(problem['loc'], content)}: {_worded(problem)}"


def _key(location: tuple[int | str, ...], content: Mapping[str, Any]) -> str:
    """The key as its author knows it: a model by its name."""
    if len(location) >= 2 and location[0] == "models" and isinstance(location[1], int):
        models = content.get("models")
        table = models[location[1]] if isinstance(models, list) else None
        name = table.get("name") if isinstance(table, dict) else None
        which = shown(name) if isinstance(name, str) else f"number {location[1] + 1}"
        return ".".join((f"models[{which}]", *map(str, location[2:])))
    return ".".join(str(part) for part in location if part != "[key]")


def _worded(problem: ErrorDetails) -> str:
    match problem["type"]:
        case "extra_forbidden":
            return _unknown_key(problem["loc"])
        case "missing":
            return _NO_MODELS if problem["loc"] == ("models",) else "is missing: add it"
        case "string_pattern_mismatch":
            return f"{shown(str(problem['input']))} does not match {problem['ctx']['pattern']}: choose another"
        case _:
            value = problem["input"]
            got = f" (got {shown(str(value))})" if isinstance(value, str | int | float) else ""
            return problem["msg"].removeprefix("Value error, ") + ("" if "redis_url" in problem["loc"] else got)


def _unknown_key(location: tuple[int | str, ...]) -> str:
    table = _table_at(location[:-1])
    unknown = str(location[-1])
    if table is ModelSpec and (elsewhere := PLACES.get(unknown)):
        return elsewhere
    if table is ModelSpec and unknown in RULES:
        return (
            f"it is the same for all who use this Redis, producers too: HORTATOR_{unknown.upper()} in [environment],"
            " and in theirs"
        )
    near = difflib.get_close_matches(unknown, table.model_fields, n=1, cutoff=0.75)
    known = dict.fromkeys((*table.__annotations__, *table.model_fields))
    meant = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
    return f"there is no such key; {meant}"


_NO_MODELS = "there are none: add at least one [[models]] table with name and path"


def _table_at(location: tuple[int | str, ...]) -> type[Table]:
    first = location[0] if location else ""
    tables: dict[int | str, type[Table]] = {"models": ModelSpec, "ssh": Ssh, "hosts": HostSpec}
    return tables.get(first, Fleet)

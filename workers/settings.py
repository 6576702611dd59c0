"""Settings of one model group, read once at the edge: keyword > environment (HORTATOR_*) > TOML (HORTATOR_CONFIG)."""

import os
import socket
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    TomlConfigSettingsSource,
)

from hortator.producer.errors import ConfigError
from hortator.producer.schema import ModelName
from hortator.producer.settings import NamespaceSettings
from hortator.topology.errors import BadPlacement
from hortator.topology.groupsettings import GroupSettings
from hortator.topology.placement import Node, read_nodes
from hortator.topology.variables import variable_problem


def _nodes(value: object) -> tuple[Node, ...]:
    try:
        return read_nodes(value)
    except BadPlacement as error:
        raise ValueError(str(error)) from None


def _names(value: object) -> object:
    names = [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value
    if isinstance(names, Iterable) and (
        problems := [why for name in names if (why := variable_problem(str(name), by_ssh=True))]
    ):
        alone = all(str(name).isidentifier() for name in names)
        raise ValueError(problems[0] + ("" if alone else "; write names alone, as NAME,NAME"))
    return names


class WorkerSettings(NamespaceSettings, GroupSettings):
    """One model group.  Names are the field's standard ones; times are in seconds, sizes in tokens unless they say."""

    # the model
    model: ModelName | None = Field(default=None, description="queue name; default: the directory's name")
    model_path: Path | None = None

    # the group
    group: str = Field(
        default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}", pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,199}$"
    )
    hosts: Annotated[tuple[Node, ...], NoDecode, BeforeValidator(_nodes)] = Field(
        default=(), description="nodeA:2,nodeB:2 or a JSON list of {host, devices, interface}; this host is the first"
    )
    launcher: Literal["local", "ssh", "deepspeed", "external"] = "local"
    front_ranks: int = Field(
        default=1, ge=1, le=2**20, description="launcher=external without hosts: ranks of the front's host"
    )
    rank_variables: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names)] = Field(
        default=(), description="NAME,NAME: variables of the front that every rank gets, on other hosts too"
    )
    secret_file: Path | None = Field(default=None, description="lets keepers join: launcher=external and deepspeed")
    keeper_port: int = Field(default=0, ge=0, le=65_535, description="where keepers join; 0: any free port")
    ssh_user: str | None = None
    ssh_port: int | None = Field(default=None, ge=1, le=65_535)
    ssh_identity_file: Path | None = None
    ssh_known_hosts_file: Path | None = None
    ssh_connect_timeout_s: int = Field(default=5, ge=1, le=600, description="until ssh gives a silent host up")
    remote_python: str = Field(default=sys.executable, description="launcher=ssh: hortator's Python on the other hosts")
    control_host: str = Field(default="127.0.0.1", description="default with hosts: the first of them")
    control_port: int = Field(default=0, ge=0, le=65_535, description="0: any free port")
    store_host: str | None = Field(default=None, description="where rank 0 listens for the mesh; default: control_host")
    store_port: int = Field(default=0, ge=0, le=65_535, description="where ranks meet; 0: any free port")

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.engine == "paged" and self.model_path is None:
            raise ValueError("model_path is not set: give --model, HORTATOR_MODEL_PATH or model_path in the TOML file")
        if self.model is None and self.model_path is None:
            raise ValueError(f"engine={self.engine} needs a queue name: set HORTATOR_MODEL")
        num_seats = sum(len(node.devices) for node in self.hosts)
        if self.hosts and num_seats != self.world_size:
            raise ValueError(
                f"hosts has room for {num_seats} ranks, but tensor_parallel_size={self.tensor_parallel_size} times "
                f"pipeline_parallel_size={self.pipeline_parallel_size} are {self.world_size}"
            )
        if self.launcher == "local" and len(self.hosts) > 1:
            raise ValueError("launcher=local starts ranks on this host only: set launcher=ssh, or name one host")
        if self.launcher in ("ssh", "deepspeed") and not self.hosts:
            raise ValueError(f"launcher={self.launcher} needs hosts, as in hosts=nodeA:2,nodeB:2")
        if self.launcher == "external" and not self.hosts and self.front_ranks > self.world_size:
            raise ValueError(f"front_ranks={self.front_ranks}: the group has {self.world_size} ranks")
        if self.launcher == "external" and not self.keeper_port:
            raise ValueError("launcher=external needs a keeper_port that those who come can know")
        return self

    @property
    def meeting_host(self) -> str:
        """Where ranks and keepers find the front."""
        if self.hosts and self.launcher != "local" and "control_host" not in self.model_fields_set:
            return self.hosts[0].host
        return self.control_host

    @property
    def queue(self) -> str:
        """The queue that this group serves."""
        if self.model is not None:
            return self.model
        assert self.model_path is not None
        return self.model_path.resolve().name

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        toml = os.environ.get("HORTATOR_CONFIG")
        files = (_read(Path(toml), settings_cls),) if toml else ()
        return (init_settings, env_settings, *files)


class ToldSettings(WorkerSettings):
    """Those of another process: nothing of this one's environment."""

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def settings_of(environment: Mapping[str, str]) -> WorkerSettings:
    """As a leader with this environment alone would have them, without its TOML file.  Raises ValidationError."""
    names = {f"HORTATOR_{name.upper()}": name for name in WorkerSettings.model_fields}
    told: dict[str, Any] = {names[v.upper()]: text for v, text in environment.items() if v.upper() in names}
    return ToldSettings(**told)


def _read(file: Path, settings_cls: type[BaseSettings]) -> PydanticBaseSettingsSource:
    """The file's settings; ConfigError if it cannot be read, or names a setting that there is not."""
    if not file.is_file():
        raise ConfigError(f"HORTATOR_CONFIG={file}: there is no such file")
    try:
        source = TomlConfigSettingsSource(settings_cls, toml_file=file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"HORTATOR_CONFIG={file}: {error}") from None
    unknown = sorted(source.toml_data.keys() - WorkerSettings.model_fields.keys())
    if unknown:
        raise ConfigError(f"HORTATOR_CONFIG={file}: no such settings: {', '.join(unknown)}")
    return source

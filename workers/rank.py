"""One rank of a model group: `python -m hortator.workers.rank`, started by the front.

The order of a rank's life: read the configuration, prove to the front that it is about to run the same as rank 0, meet
the other ranks, load the engine, then step in lock-step (stroke.py) until the front says STOP or is gone.
"""

import importlib
import os
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import hortator
from hortator.producer.errors import ConfigError, HortatorError
from hortator.topology.codeprint import code_digest
from hortator.topology.control import listen
from hortator.topology.doors import close_doors
from hortator.topology.errors import LeaderLost, MeshFailed, NoDevice, PortTaken, Refused
from hortator.topology.launch import PARENT_VARIABLE
from hortator.topology.tether import EXIT_LEADER_LOST, ControlClient, exit_process
from hortator.topology.tied import die_with

from .collector import spare_what_is_loaded
from .engine.echo import DEFAULT_MODEL_LEN, EchoEngine
from .engine.step import Engine, EngineInfo
from .lockstep import Channel, CollectiveFailed, DistributedChannel, Follower, InProcessChannel, LockstepError
from .pipe import Pipe, PipeBroken
from .stroke import Leader, Peer, most_untold_steps

if TYPE_CHECKING:
    from hortator.topology.mesh import Mesh

CONFIG_VARIABLE = "HORTATOR_RANK_CONFIG"


class Exit(IntEnum):
    """Exit codes of a rank (0: STOP; sysexits.h where one fits)."""

    LEADER_LOST = EXIT_LEADER_LOST
    CRASH = 70
    COLLECTIVE = 75  # another rank is gone: a consequence, not a cause
    LOCKSTEP = 76
    CONFIG = 78  # starting again cannot help


class RankConfig(BaseModel):
    """Everything that one rank is told, as JSON in HORTATOR_RANK_CONFIG.  It holds a secret: never log it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(ge=0)
    epoch: int = Field(ge=0)
    local_rank: int | None = Field(default=None, ge=0, description="device; None: LOCAL_RANK, as the keeper says")
    pipe_fd: int | None = Field(default=None, description="rank 0: the inherited end of the pipe")

    control_host: str
    control_port: int
    control_key: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    store_host: str = "127.0.0.1"
    store_port: int = Field(default=0, ge=0, le=65_535, description="rank 0 listens here for the mesh; 0: any")
    heartbeat_s: float
    heartbeat_timeout_s: float
    stall_timeout_s: float
    start_timeout_s: float
    collective_timeout_s: float

    engine: str = "paged"
    model_path: Path | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    max_num_seqs: int = 64
    max_model_len: int | None = None
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    prefix_caching: bool = True
    probation_tokens: int = 8
    echo_latency_s: float = 0.0

    @property
    def world_size(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def last_rank(self) -> bool:
        return self.rank == self.world_size - 1


EngineFactory = Callable[[RankConfig, "Mesh"], Engine]
"""What `engine = "module:factory"` names: called once on every rank, after the ranks have met.  Its own process
groups it makes now: over gloo nobody gets through to another rank later (doors.py)."""


def main() -> NoReturn:
    """Run a rank; ends the process without any cleaning up, which other ranks could only wait for."""
    config = read_config()
    parent_pid = os.environ.pop(PARENT_VARIABLE, None)
    if parent_pid is not None and not die_with(int(parent_pid)):
        exit_process(Exit.LEADER_LOST, "the front is gone")
    problem: Exception | None = None
    try:
        fingerprint = fingerprint_of(config)
        listener = open_store(config)
    except Exception as error:
        problem = error
    control = connect(config)  # only now: the front expects HELLO at once
    try:
        if problem is not None:
            raise problem
        store = listener.getsockname()[:2] if listener is not None else None
        control.hello(fingerprint=fingerprint, store=store)
        serve(config, control, listener)
    except Exception as error:
        give_up(control, error)
    exit_process(0, "")


def read_config() -> RankConfig:
    """Take the configuration out of the environment, so that nothing started from here inherits the key."""
    try:
        config = RankConfig.model_validate_json(os.environ.pop(CONFIG_VARIABLE, ""))
        if config.local_rank is None and "LOCAL_RANK" in os.environ:
            return RankConfig.model_validate(config.model_dump() | {"local_rank": os.environ["LOCAL_RANK"]})
        return config
    except ValidationError as error:
        wrong = ", ".join(".".join(map(str, item["loc"])) or item["type"] for item in error.errors())
        exit_process(Exit.CONFIG, f"{CONFIG_VARIABLE} is not a rank's configuration: {wrong}")


def connect(config: RankConfig) -> ControlClient:
    try:
        return ControlClient(
            (config.control_host, config.control_port),
            key=bytes.fromhex(config.control_key),
            epoch=config.epoch,
            rank=config.rank,
            heartbeat_s=config.heartbeat_s,
            timeout_s=config.heartbeat_timeout_s,
            stall_timeout_s=config.stall_timeout_s,
        )
    except LeaderLost as error:
        exit_process(Exit.LEADER_LOST, f"rank {config.rank}: {error}")


def give_up(control: ControlClient, error: Exception) -> NoReturn:
    """Tell the front why, and exit with the code that says the same."""
    code, label = _kind_of(error)
    message = error.message if isinstance(error, HortatorError) else f"{type(error).__name__}: {error}"
    if code is Exit.CRASH:
        traceback.print_exception(error)
    control.fail(label, message)
    exit_process(code, message)


def _kind_of(error: Exception) -> tuple[Exit, str]:
    match error:
        case ConfigError() | PortTaken() | NoDevice() | Refused():
            return Exit.CONFIG, ConfigError.code
        case LockstepError():
            return Exit.LOCKSTEP, "lockstep"
        case LeaderLost() | PipeBroken():
            return Exit.LEADER_LOST, "leader_lost"
        case CollectiveFailed() | MeshFailed():
            return Exit.COLLECTIVE, "collective"
        case RuntimeError() if any(word in str(error) for word in ("gloo", "NCCL", "Connection closed by peer")):
            return Exit.COLLECTIVE, "collective"
        case _:
            return Exit.CRASH, "crash"


# --- before the ranks meet


def fingerprint_of(config: RankConfig) -> dict[str, str]:
    """What has to be the same on all ranks, by name.  For the paged engine this reads the model's files."""
    same = config.model_dump(mode="json", include=_SHARED_FIELDS)
    fingerprint = {name: str(value) for name, value in same.items()}
    fingerprint |= {"hortator": hortator.__version__, "code": code_digest()}
    if config.engine != "echo" or config.world_size > 1:
        import torch

        fingerprint["torch"] = torch.__version__
    if config.engine == "paged":
        from .engine.fingerprint import fingerprint as fingerprint_of_model

        assert config.model_path is not None
        fingerprint |= fingerprint_of_model(
            config.model_path, dtype=config.dtype, weights=config.load_format == "safetensors"
        )
    return fingerprint


def open_store(config: RankConfig) -> socket.socket | None:
    """Rank 0's listening socket for the mesh; the others learn the port from WELCOME."""
    if config.rank != 0 or config.world_size == 1:
        return None
    return listen(config.store_host, config.store_port)


# --- from WELCOME on


def serve(config: RankConfig, control: ControlClient, listener: socket.socket | None) -> None:
    """Meet the others, load, step."""
    begun = time.monotonic()
    welcome = control.wait_welcome(config.start_timeout_s)
    mesh = meet(config, welcome.get("store"), listener)
    met = time.monotonic()
    engine = load_engine(config, mesh)
    spent = {"meet_s": f"{met - begun:.1f}", "load_s": f"{time.monotonic() - met:.1f}"}
    if mesh is not None and mesh.backend == "gloo":  # NCCL connects pairs of ranks only when they first talk
        close_doors()
    channel: Channel = InProcessChannel()
    if mesh is not None and mesh.world_group is not None:
        channel = DistributedChannel(mesh.world_group, mesh.device, ahead=mesh.pp_size - 1)
    spare_what_is_loaded()
    control.progress = lambda: getattr(engine, "progress", 0)
    control.ready(describe(replace(engine.info, details=engine.info.details | spent)))
    if config.rank == 0:
        assert config.pipe_fd is not None
        pipe = Pipe(socket.socket(fileno=config.pipe_fd))
        untold = most_untold_steps(config.probation_tokens)
        Leader(engine, channel, control, pipe, epoch=config.epoch, most_untold_steps=untold).run()
    else:
        Peer(engine, channel, control, Follower(rank=config.rank, epoch=config.epoch)).run()


def meet(config: RankConfig, store: Any, listener: socket.socket | None) -> "Mesh | None":
    """The mesh; None where no torch is needed at all."""
    if config.engine == "echo" and config.world_size == 1:
        return None
    from hortator.topology.mesh import join

    return join(
        rank=config.rank,
        tp_size=config.tensor_parallel_size,
        pp_size=config.pipeline_parallel_size,
        store=(str(store[0]), int(store[1])) if store else None,
        listener=listener,
        device=config.device,
        local_rank=config.local_rank or 0,
        collective_timeout_s=config.collective_timeout_s,
    )


def load_engine(config: RankConfig, mesh: "Mesh | None") -> Engine:
    if config.engine == "echo":
        max_model_len = config.max_model_len or DEFAULT_MODEL_LEN
        return EchoEngine(
            max_num_seqs=config.max_num_seqs, max_model_len=max_model_len, latency_s=config.echo_latency_s
        )
    assert mesh is not None
    if config.engine != "paged":
        return _factory(config.engine)(config, mesh)
    from .engine.build import build_engine

    assert config.model_path is not None
    return build_engine(
        model_path=config.model_path,
        mesh=mesh,
        dtype=config.dtype,
        load_format=config.load_format,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        max_num_batched_tokens=config.max_num_batched_tokens,
        block_size=config.block_size,
        kv_cache_bytes=config.kv_cache_bytes,
        gpu_memory_utilization=config.gpu_memory_utilization,
        prefix_cache=config.prefix_caching,
    )


def _factory(name: str) -> EngineFactory:
    module, _, attribute = name.partition(":")
    try:
        return cast(EngineFactory, getattr(importlib.import_module(module), attribute))
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"engine={name}: {error}; give paged, echo, or module:factory") from error


def describe(info: EngineInfo) -> dict[str, Any]:
    """READY's payload: the limits, which all ranks must share, and the details, which they need not."""
    limits = asdict(info)
    return {"details": limits.pop("details"), "limits": limits}


def read_description(payload: dict[str, Any]) -> EngineInfo:
    """The inverse."""
    limits = dict(payload["limits"])
    eos_token_ids = tuple(limits.pop("eos_token_ids"))
    return EngineInfo(**limits, eos_token_ids=eos_token_ids, details=payload["details"])


_SHARED_FIELDS = {
    "engine",
    "dtype",
    "load_format",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "max_num_seqs",
    "max_model_len",
    "max_num_batched_tokens",
    "block_size",
    "kv_cache_bytes",
    "gpu_memory_utilization",
    "prefix_caching",
    "echo_latency_s",
}

if __name__ == "__main__":
    main()

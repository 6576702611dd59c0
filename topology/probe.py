"""What one host is like, in one JSON object: `ProbeRequest` in, `HostReport` out.  Looks only, changes nothing.

It runs on every host of a fleet (`hortator probe`, over ssh), so it imports neither torch nor transformers: their
versions are read from what is installed.
"""

import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from .codeprint import code_digest
from .gpus import Gpu, read_gpus
from .network import Interface, RdmaPort, addresses_of, carrying, read_interfaces, read_rdma

PACKAGES = ("hortator", "torch", "transformers", "deepspeed", "celery", "pydantic", "safetensors", "tokenizers")
REACH_TIMEOUT_S = 3.0
BOOT_ID, NETWORK = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")

Checksum = Callable[[Path], Mapping[str, str]]
"""Facts about a model directory that must be equal on all hosts; raises an exception that says what is wrong."""


class Address(BaseModel):
    model_config = ConfigDict(frozen=True)

    host: str
    port: int = Field(ge=1, le=65_535)


class ProbeRequest(BaseModel):
    """What to look at.  `address` is how the others call this host."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str
    ports: tuple[int, ...] = Field(default=(), description="must be free")
    models: tuple[Path, ...] = ()
    reach: tuple[Address, ...] = Field(default=(), description="must accept a connection")


class ModelReport(BaseModel):
    """One model directory: its checksums by name, or what is wrong with it."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    path: Path
    checksums: dict[str, str] = {}
    problem: str | None = None


class HostReport(BaseModel):
    """One host.  `clock_s` is read last, when the report is handed over."""

    model_config = ConfigDict(frozen=True)

    address: str
    hostname: str
    hostname_addresses: tuple[str, ...]
    machine: str | None = Field(default=None, description="equal for two names of one machine")
    python: str
    executable: str
    versions: dict[str, str | None]
    cpus: int
    memory_bytes: int
    shm_bytes: int
    gpus: tuple[Gpu, ...] = ()
    gpu_problem: str | None = None
    taken_ports: tuple[int, ...] = ()
    models: tuple[ModelReport, ...] = ()
    unreachable: dict[str, str] = {}
    interfaces: tuple[Interface, ...] = ()
    own_interface: str | None = None
    rdma: tuple[RdmaPort, ...] = ()
    clock_s: FiniteFloat


def probe(request: ProbeRequest, *, checksum: Checksum) -> HostReport:
    """Look at this host.  Takes about a second, or as long as nvidia-smi or a silent `reach` needs."""
    gpus, gpu_problem = read_gpus()
    interfaces = read_interfaces()
    own = carrying(interfaces, addresses_of(request.address))
    return HostReport(
        address=request.address,
        hostname=socket.gethostname(),
        hostname_addresses=addresses_of(socket.gethostname()),
        machine=this_machine(),
        python=platform.python_version(),
        executable=sys.executable,
        versions=read_versions(),
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        shm_bytes=_shm_bytes(),
        gpus=gpus,
        gpu_problem=gpu_problem,
        taken_ports=tuple(port for port in request.ports if not port_is_free(port)),
        models=tuple(_model(path, checksum) for path in request.models),
        unreachable=_unreachable(request.reach),
        interfaces=interfaces,
        own_interface=own.name if own else None,
        rdma=read_rdma(),
        clock_s=time.time(),
    )


def this_machine() -> str | None:
    """This boot of this kernel, and this network: a container with a network of its own counts as a machine."""
    try:
        return f"{BOOT_ID.read_text().strip()}:{NETWORK.stat().st_ino}"
    except OSError:
        return None


def read_versions() -> dict[str, str | None]:
    """Versions by name; None: not installed.  `nccl` is the one that torch brings, `code` this package's own files."""
    found: dict[str, str | None] = {name: _version(name) for name in PACKAGES}
    found["nccl"] = next((d.version for d in distributions() if (d.name or "").startswith("nvidia-nccl")), None)
    found["code"] = code_digest()
    return found


def port_is_free(port: int) -> bool:
    """Nobody listens on it, on any IPv4 address of this host."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection that lingers does not count
        try:
            sock.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _shm_bytes() -> int:
    """Room in /dev/shm, which NCCL and gloo use between ranks of one host; containers give 64 MiB by default."""
    try:
        stat = os.statvfs("/dev/shm")  # noqa: S108
    except OSError:
        return 0
    return stat.f_bavail * stat.f_frsize


def _model(path: Path, checksum: Checksum) -> ModelReport:
    if not path.is_dir():
        return ModelReport(path=path, problem=f"there is no directory {path}")
    try:
        return ModelReport(path=path, checksums=dict(checksum(path)))
    except Exception as error:
        return ModelReport(path=path, problem=str(error) or type(error).__name__)


def _unreachable(addresses: Iterable[Address]) -> dict[str, str]:
    problems = {}
    for address in addresses:
        try:
            socket.create_connection((address.host, address.port), REACH_TIMEOUT_S).close()
        except OSError as error:
            problems[f"{address.host}:{address.port}"] = error.strerror or str(error) or type(error).__name__
    return problems

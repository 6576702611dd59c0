"""What a process that somebody else started finds out about its place, and the secret that lets it join."""

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .address import shown
from .errors import BadPlacement, BadSecret
from .placement import MAX_RANKS

MIN_SECRET_CHARACTERS = 32
MAX_RANKS_PER_NODE = 1024
MAX_SECRET_BYTES = 4096

# rank, local rank, number of ranks: as they are called by torchrun and DeepSpeed, by Slurm, and by Open MPI
_DIALECTS = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
)
_NODE_VARIABLES = ("LWS_WORKER_INDEX", "GROUP_RANK", "SLURM_NODEID")


@dataclass(frozen=True, slots=True)
class Place:
    """The ranks that one process keeps, with their devices.  `world_size`: as its starter counted, if it did."""

    ranks: tuple[int, ...]
    devices: tuple[int, ...]
    world_size: int | None = None


def place_of(environment: Mapping[str, str], *, ranks: str = "", ranks_per_node: int = 0) -> Place:
    """From the options if they say, else from what the starter has set.  Raises BadPlacement.

    `ranks`: "2,3".  `ranks_per_node`: this process keeps all ranks of its node, whose number a variable gives.
    """
    if ranks:
        numbers = tuple(_number("--ranks", part) for part in ranks.split(","))
        return Place(numbers, tuple(range(len(numbers))))
    if ranks_per_node:
        if not 1 <= ranks_per_node <= MAX_RANKS_PER_NODE:
            raise BadPlacement(f"--ranks-per-node {ranks_per_node}: give a number from 1 to {MAX_RANKS_PER_NODE}")
        node = next((_number(name, environment[name]) for name in _NODE_VARIABLES if name in environment), None)
        if node is None:
            raise BadPlacement(f"--ranks-per-node needs the node's number: set one of {', '.join(_NODE_VARIABLES)}")
        first = node * ranks_per_node
        if first + ranks_per_node > MAX_RANKS:
            raise BadPlacement(f"node {node} would begin with rank {first}: a group has at most {MAX_RANKS} ranks")
        return Place(tuple(range(first, first + ranks_per_node)), tuple(range(ranks_per_node)))
    for rank, local_rank, world_size in _DIALECTS:
        if rank in environment:
            device = _number(local_rank, environment.get(local_rank, "0"))
            size = _number(world_size, environment[world_size]) if world_size in environment else None
            return Place((_number(rank, environment[rank]),), (device,), size)
    known = ", ".join(rank for rank, _, _ in _DIALECTS)
    raise BadPlacement(f"which rank is this? None of {known} is set: give --ranks, or --ranks-per-node")


def read_secret(path: Path) -> bytes:
    """The key that this file stands for.  Raises BadSecret: it must be long, and nobody else's to read.

    A file of root's may be readable by its group: that is how Kubernetes hands secrets to other users.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(MAX_SECRET_BYTES + 1).strip()
    except OSError as error:
        raise BadSecret(f"cannot read the secret file {path}: {error.strerror}") from None
    forbidden = 0o037 if status.st_uid == 0 and os.geteuid() != 0 else 0o077
    if not stat.S_ISREG(status.st_mode) or status.st_mode & forbidden:
        raise BadSecret(f"the secret file {path} can be read by others: chmod 600 {path}")
    if not MIN_SECRET_CHARACTERS <= len(content) <= MAX_SECRET_BYTES:
        raise BadSecret(
            f"the secret file {path} holds {len(content)} characters: `openssl rand -hex 32` makes a good one"
        )
    return hashlib.sha256(b"hortator join\0" + content).digest()


def _number(name: str, text: str) -> int:
    if not text.strip().isascii() or not text.strip().isdecimal():
        raise BadPlacement(f"{name} is {shown(text)}, not a number")
    digits = text.strip().lstrip("0")
    if len(digits) > len(str(MAX_RANKS)) or int(digits or "0") > MAX_RANKS:
        raise BadPlacement(f"{name} is {shown(digits)}: a group has at most {MAX_RANKS} ranks")
    return int(digits or "0")

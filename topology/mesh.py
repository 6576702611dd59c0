"""Where the ranks of a group meet: process groups for tensor and pipeline parallelism.  torch is imported here only.

Ranks are numbered stage by stage, rank = pp_rank * tp_size + tp_rank, so tensor parallel neighbours sit together.
Order for the engine: `join`, then turn DeepSpeed's shared-memory operation off, then `deepspeed.init_distributed`.
"""

import datetime
import socket
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from .errors import MeshFailed, NoDevice


@dataclass(frozen=True, slots=True)
class Mesh:
    """This rank's place.  A group of one rank has no process groups at all."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    tp_group: dist.ProcessGroup | None  # None: tp_size is 1
    pp_rank: int
    pp_size: int
    world_group: dist.ProcessGroup | None  # None: world_size is 1
    device: torch.device
    backend: Literal["none", "gloo", "nccl"]


def join(
    *,
    rank: int,
    tp_size: int,
    pp_size: int = 1,
    store: tuple[str, int] | None = None,
    listener: socket.socket | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    local_rank: int = 0,
    collective_timeout_s: float = 1800.0,
    meeting_timeout_s: float = 60.0,
) -> Mesh:
    """Meet the other ranks at `store`, where rank 0 serves the socket `listener` that it holds (and gives away).

    torch would open the store's port on all interfaces; a listener of ours keeps it on the one that was meant.
    """
    place = pick_device(device, local_rank)
    world_size = tp_size * pp_size
    pp_rank, tp_rank = divmod(rank, tp_size)
    if world_size == 1:
        return Mesh(0, 1, 0, 1, None, 0, 1, None, place, "none")
    backend: Literal["gloo", "nccl"] = "nccl" if place.type == "cuda" else "gloo"
    assert store is not None
    try:
        dist.init_process_group(
            backend,
            store=_open_store(store, listener, meeting_timeout_s),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=collective_timeout_s),
            device_id=place if backend == "nccl" else None,
        )
        tp_group = _tp_group(tp_size, pp_size, pp_rank)
    except RuntimeError as error:
        first_line = str(error).splitlines()[0]
        raise MeshFailed(f"rank {rank} could not meet the others at {store[0]}:{store[1]}: {first_line}") from error
    return Mesh(
        rank=rank,
        world_size=world_size,
        tp_rank=tp_rank,
        tp_size=tp_size,
        tp_group=tp_group,
        pp_rank=pp_rank,
        pp_size=pp_size,
        world_group=dist.group.WORLD,
        device=place,
        backend=backend,
    )


def pick_device(device: Literal["auto", "cpu", "cuda"], local_rank: int) -> torch.device:
    """The device of the local_rank-th rank of this host."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local_rank >= (count := torch.cuda.device_count()):
        fewer = f"put at most {count} ranks on it" if count else "use device=cpu"
        raise NoDevice(
            f"no CUDA device for local rank {local_rank}: this host shows {count}: {fewer}, or make more visible (does "
            f"nvidia-smi list them? CUDA_VISIBLE_DEVICES and a container's --gpus hide them, and so does a torch "
            f"without CUDA)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _open_store(address: tuple[str, int], listener: socket.socket | None, timeout_s: float) -> TCPStore:
    host, port = address
    return TCPStore(
        host,
        port,
        is_master=listener is not None,
        timeout=datetime.timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach() if listener is not None else None,
    )


def _tp_group(tp_size: int, pp_size: int, pp_rank: int) -> dist.ProcessGroup | None:
    """Every rank takes part in making every group; it keeps its own."""
    if tp_size == 1:
        return None
    if pp_size == 1:
        return dist.group.WORLD
    stages: list[dist.ProcessGroup] = [
        dist.new_group(list(range(stage * tp_size, (stage + 1) * tp_size))) for stage in range(pp_size)
    ]
    return stages[pp_rank]

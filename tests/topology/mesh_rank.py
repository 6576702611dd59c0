"""One process of test_mesh: joins, says where it is, and sums its rank over its tensor parallel group."""

import json
import os
import socket
import sys
from typing import Any

import torch
import torch.distributed as dist

from hortator.topology.mesh import join


def main() -> None:
    options: dict[str, Any] = json.loads(sys.argv[1])
    listener = socket.socket(fileno=options.pop("listener")) if options["rank"] == 0 else None
    options.pop("listener", None)
    mesh = join(**options | {"store": tuple(options["store"])}, listener=listener, device="cpu")
    total = torch.tensor([mesh.rank])
    if mesh.tp_group is not None:
        dist.all_reduce(total, group=mesh.tp_group)
    place = [mesh.rank, mesh.world_size, mesh.tp_rank, mesh.tp_size, mesh.pp_rank, mesh.pp_size, mesh.backend]
    print(json.dumps([*place, str(mesh.device), total.item()]), flush=True)
    dist.barrier()
    os._exit(0)


main()

"""Process groups of real ranks (gloo)."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from hortator.topology.control import listen
from hortator.topology.errors import MeshFailed, NoDevice
from hortator.topology.mesh import join, pick_device

SCRIPT = Path(__file__).with_name("mesh_rank.py")


def meet(tp_size: int, pp_size: int) -> list[list[Any]]:
    """What every rank of the layout says of itself."""
    with listen("127.0.0.1", 0) as listener:
        os.set_inheritable(listener.fileno(), True)
        options = {"tp_size": tp_size, "pp_size": pp_size, "store": listener.getsockname()}
        processes = [
            subprocess.Popen(
                [sys.executable, str(SCRIPT), json.dumps(options | {"rank": rank, "listener": listener.fileno()})],
                env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                pass_fds=(listener.fileno(),) if rank == 0 else (),
            )
            for rank in range(tp_size * pp_size)
        ]
    return [json.loads(process.communicate(timeout=60)[0]) for process in processes]


def test_tensor_parallel_neighbours_sit_together_and_stages_are_apart() -> None:
    assert meet(tp_size=2, pp_size=2) == [
        [0, 4, 0, 2, 0, 2, "gloo", "cpu", 0 + 1],
        [1, 4, 1, 2, 0, 2, "gloo", "cpu", 0 + 1],
        [2, 4, 0, 2, 1, 2, "gloo", "cpu", 2 + 3],
        [3, 4, 1, 2, 1, 2, "gloo", "cpu", 2 + 3],
    ]


def test_one_rank_needs_no_process_group() -> None:
    mesh = join(rank=0, tp_size=1, device="cpu")
    assert (mesh.world_size, mesh.tp_group, mesh.world_group, mesh.backend) == (1, None, None, "none")


def test_rank_0_listens_only_where_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.distributed would listen on all interfaces."""
    from hortator.topology.mesh import _open_store

    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    store = _open_store(("127.0.0.1", port), listener, timeout_s=5.0)
    addresses = {c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert addresses == {"127.0.0.1"}
    store.set("it", "works")
    assert store.get("it") == b"works"


def test_a_store_that_nobody_serves_is_an_error_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    with pytest.raises(MeshFailed, match=f"rank 1 could not meet the others at 127.0.0.1:{port}"):
        join(rank=1, tp_size=2, store=("127.0.0.1", port), device="cpu", meeting_timeout_s=1.0)


def test_a_device_that_is_not_there_is_an_error() -> None:
    with pytest.raises(NoDevice, match=r"local rank 999: .*(use device=cpu|at most \d ranks).*CUDA_VIS"):
        pick_device("cuda", 999)

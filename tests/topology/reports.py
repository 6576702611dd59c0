"""Hosts as the doctor sees them, made up: a sound one, and whatever a test changes about it."""

from pathlib import Path
from typing import Any

from hortator.topology.gpus import Gpu
from hortator.topology.network import Interface, RdmaPort
from hortator.topology.probe import HostReport, ModelReport

GIB = 1 << 30
MODEL = Path("/models/llama")
VERSIONS = {
    "hortator": "0.1.0",
    "code": "c0de",
    "torch": "2.13.0",
    "nccl": "2.29.7",
    "transformers": "5.23.0",
    "deepspeed": "0.19.8",
}


def gpu(index: int, *, free: int = 80, pids: tuple[int, ...] = ()) -> Gpu:
    return Gpu(index=index, uuid=f"GPU-{index}", name="H100", total_bytes=80 * GIB, free_bytes=free * GIB, pids=pids)


def model(weights: str = "5eed", problem: str | None = None) -> ModelReport:
    return ModelReport(path=MODEL, checksums={} if problem else {"config": "c0", "weights": weights}, problem=problem)


def nic(address: str, *, name: str = "eth0", speed: int = 100_000, mtu: int = 1500) -> Interface:
    return Interface(name=name, addresses=(address,), up=True, speed_mbit=speed, mtu=mtu)


def rdma(*, active: bool = True) -> RdmaPort:
    rate = "400 Gb/sec (4X NDR)"
    return RdmaPort(device="mlx5_0", port=1, active=active, rate=rate, link_layer="InfiniBand", netdev="ib0")


def report(address: str, *, versions: dict[str, str | None] | None = None, **changed: Any) -> HostReport:
    """A sound host with two free GPUs, and what the test says differently."""
    sound: dict[str, Any] = {
        "address": address,
        "hostname": address,
        "hostname_addresses": (address,),
        "python": "3.11.7",
        "executable": "/usr/bin/python3",
        "cpus": 8,
        "memory_bytes": 64 * GIB,
        "shm_bytes": GIB,
        "gpus": (gpu(0), gpu(1)),
        "models": (model(),),
        "interfaces": (Interface(name="lo", addresses=("127.0.0.1",), up=True), nic(address)),
        "own_interface": "eth0",
        "clock_s": 0.0,
    }
    return HostReport.model_validate(sound | changed | {"versions": VERSIONS | (versions or {})})

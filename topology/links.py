"""One rank of a measurement of links: `python -m hortator.topology.links`, started by the doctor on a team's hosts.

Its order comes as one line of JSON on stdin.  Rank 0 answers with the port where the others meet it; each rank ends
with one line of what it measured.  When stdin ends, so does the process: whoever started it is gone.
"""

import json
import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch

ALL_PAIRS_UP_TO = 8
"""A larger team is measured along a ring: each rank with the next one."""

LIMIT_S = 120
PINGS = 20
REPEATS = 3
FIRST_BYTES = 256 << 10
FILL_S = 0.15
MAX_BYTES = 64 << 20
PLAN_BYTES = 512
"""About what a step plan has."""

REDUCED_BYTES = 4 << 20


class LinkOrder(BaseModel):
    """One rank's part.  `store`: where rank 0 waits; None for rank 0 itself, which listens on `address`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int
    world_size: int
    address: str
    store: tuple[str, int] | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    local_rank: int = 0


class Flow(BaseModel):
    """What goes from one rank to another; latency is there and back, halved."""

    model_config = ConfigDict(frozen=True)

    source: int
    target: int
    latency_s: float
    bytes_per_s: float


class Measured(BaseModel):
    """By one rank: what it sent, and how long the collectives took it (medians)."""

    model_config = ConfigDict(frozen=True)

    rank: int
    flows: tuple[Flow, ...]
    broadcast_s: float
    all_reduce_s: float


def schedule(world_size: int) -> Iterator[tuple[int, int]]:
    """Who sends to whom, one after the other."""
    ring = ((rank, (rank + 1) % world_size) for rank in range(world_size))
    pairs = ((a, b) for a in range(world_size) for b in range(world_size) if a < b)
    for a, b in pairs if world_size <= ALL_PAIRS_UP_TO else ring:
        yield a, b
        yield b, a


def main() -> None:
    """Measure, print, and go without the farewells of torch, which wait for other ranks."""
    signal.alarm(LIMIT_S)
    order = LinkOrder.model_validate_json(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    listener = None
    if order.store is None:
        listener = socket.create_server((order.address, 0), family=_family(order.address))
        _say({"port": listener.getsockname()[1]})
    _say(_measure(order, listener).model_dump())
    os._exit(0)


def _measure(order: LinkOrder, listener: socket.socket | None) -> Measured:
    import torch
    import torch.distributed as dist

    from .mesh import join

    torch.set_num_threads(1)
    store = order.store or (order.address, listener.getsockname()[1] if listener else 0)
    mesh = join(
        rank=order.rank,
        tp_size=order.world_size,
        store=store,
        listener=listener,
        device=order.device,
        local_rank=order.local_rank,
        collective_timeout_s=LIMIT_S,
    )
    bench = Bench(order.rank, mesh.device)
    flows = []
    for source, target in schedule(order.world_size):
        if order.rank in (source, target):
            flow = bench.flow(source, target)
            flows += [flow] if source == order.rank else []
        dist.barrier()  # nobody else sends meanwhile
    plan, gradient = bench.zeros(PLAN_BYTES), bench.zeros(REDUCED_BYTES)
    return Measured(
        rank=order.rank,
        flows=tuple(flows),
        broadcast_s=bench.median(lambda: dist.broadcast(plan, src=0), PINGS),
        all_reduce_s=bench.median(lambda: dist.all_reduce(gradient), REPEATS),
    )


class Bench:
    """Send, receive, and look at the clock when the device is done."""

    def __init__(self, rank: int, device: "torch.device") -> None:
        self._rank = rank
        self._device = device

    def zeros(self, num_bytes: int) -> "torch.Tensor":
        import torch

        return torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)

    def flow(self, source: int, target: int) -> Flow:
        """Both ends call it at the same time.  The first pass opens connections and is not counted."""
        small = self.zeros(8)
        self._ping(source, target, small)
        latency_s = self.median(lambda: self._ping(source, target, small), PINGS) / 2
        first = self.zeros(FIRST_BYTES)
        took_s = self.median(lambda: self._push(source, target, first, small), 1)
        load = self.zeros(self._agree(source, target, took_s))
        took_s = self.median(lambda: self._push(source, target, load, small), REPEATS)
        return Flow(
            source=source, target=target, latency_s=latency_s, bytes_per_s=len(load) / max(took_s - latency_s, 1e-9)
        )

    def median(self, act: Callable[[], object], times: int) -> float:
        """Seconds of one `act`, after one that is not counted."""
        act()
        found = []
        for _ in range(times):
            self._settle()
            began = time.perf_counter()
            act()
            self._settle()
            found.append(time.perf_counter() - began)
        return statistics.median(found)

    def _agree(self, source: int, target: int, took_s: float) -> int:
        """The sender chooses how much fills FILL_S, so that a slow link does not take minutes."""
        import torch
        import torch.distributed as dist

        wanted = int(FIRST_BYTES * FILL_S / max(took_s, 1e-6))
        size = torch.tensor([min(max(wanted, FIRST_BYTES), MAX_BYTES)], device=self._device)
        if self._rank == source:
            dist.send(size, target)
        else:
            dist.recv(size, source)
        return int(size.item())

    def _ping(self, source: int, target: int, small: "torch.Tensor") -> None:
        self._push(source, target, small, small)

    def _push(self, source: int, target: int, load: "torch.Tensor", receipt: "torch.Tensor") -> None:
        """The load one way, a receipt back: what was only buffered does not count."""
        import torch.distributed as dist

        if self._rank == source:
            dist.send(load, target)
            dist.recv(receipt, target)
        else:
            dist.recv(load, source)
            dist.send(receipt, source)

    def _settle(self) -> None:
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)


def _say(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _end_with_stdin() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(1)


def _family(address: str) -> socket.AddressFamily:
    return socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]


if __name__ == "__main__":
    main()

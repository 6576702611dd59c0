"""Rank processes for benchmarks: a script is run once for each rank, and its ranks meet as those of a group do.

    answers = pull(Layout(2, 2), device="cpu", task={…})        the script that was started: what each rank gave
    if (seat := own_seat()) is not None: row(seat, work)        the same script as a rank: work(mesh, seat.task)

There is no front and no control connection: what is measured here is rank to rank.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

from hortator.topology.control import listen
from hortator.topology.tied import die_with

if TYPE_CHECKING:
    from hortator.topology.mesh import Mesh
    from hortator.workers.engine.engine import PagedEngine
    from hortator.workers.engine.parallel import Ranks
    from hortator.workers.engine.step import Engine, Request, StepOutput

_SEAT = "BENCHMARK_SEAT"
ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",
    # NVLink multicast gains little here, and a program that dies in it can block the GPUs of its host for others.
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}
EPOCH = 1


@dataclass(frozen=True, slots=True)
class Layout:
    """Tensor times pipeline parallel ranks; written 2x1 on the command line."""

    tp: int
    pp: int

    @classmethod
    def read(cls, text: str) -> Self:
        tp, _, pp = text.partition("x")
        layout = cls(int(tp), int(pp or 1))
        if layout.tp < 1 or layout.pp < 1:
            raise ValueError(text)
        return layout

    @property
    def size(self) -> int:
        return self.tp * self.pp

    def __str__(self) -> str:
        parts = [f"{name}{count}" for name, count in (("TP", self.tp), ("PP", self.pp)) if count > 1]
        return " x ".join(parts) or "one rank"


@dataclass(frozen=True, slots=True)
class Seat:
    """What one rank is told."""

    rank: int
    tp: int
    pp: int
    device: str
    store: tuple[str, int]
    listener: int | None  # rank 0: the inherited descriptor
    parent_pid: int
    task: dict[str, Any]


def pull(
    layout: Layout, *, device: str, task: dict[str, Any], threads: int | None = None, timeout_s: float = 1200.0
) -> list[Any]:
    """Run this very command once for each rank; what each gave, by rank.  Raises RuntimeError if one fails.

    `threads` of each rank; default: as many as the group's own ranks would take.
    """
    threads = threads or max(1, len(os.sched_getaffinity(0)) // layout.size)
    listener = listen("127.0.0.1", 0)
    ranks: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="crew-") as name, listener:
        outs = [Path(name) / f"{rank}.out" for rank in range(layout.size)]
        try:
            for rank, out in enumerate(outs):
                fd = listener.fileno() if rank == 0 else None
                seat = Seat(rank, layout.tp, layout.pp, device, listener.getsockname()[:2], fd, os.getpid(), task)
                ranks.append(_start(seat, out, threads))
            _wait(ranks, outs, time.monotonic() + timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        return [json.loads(out.read_bytes().splitlines()[-1]) for out in outs]


def own_seat() -> Seat | None:
    """In a rank: who it is."""
    told = os.environ.pop(_SEAT, None)
    if told is None:
        return None
    values = json.loads(told)
    return Seat(**values | {"store": tuple(values["store"])})


def row(seat: Seat, work: "Callable[[Mesh, dict[str, Any]], Any]") -> NoReturn:
    """Meet the others, do the work, print what it gave, and go without torch's farewells."""
    import socket

    import torch
    import torch.distributed as dist

    from hortator.topology.mesh import join

    if not die_with(seat.parent_pid):
        os._exit(1)
    listener = socket.socket(fileno=seat.listener) if seat.listener is not None and seat.tp * seat.pp > 1 else None
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    mesh = join(
        rank=seat.rank,
        tp_size=seat.tp,
        pp_size=seat.pp,
        store=seat.store,
        listener=listener,
        device=seat.device,  # type: ignore[arg-type]
        local_rank=seat.rank,
    )
    answer = work(mesh, seat.task)
    if mesh.world_size > 1:
        dist.barrier()
    print(json.dumps(answer), flush=True)
    os._exit(0)


def settle(device: Any) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


class Caller:
    """Rank 0 in lock-step, as stroke.Leader: apply, broadcast, execute.  One rank alone broadcasts nothing."""

    def __init__(self, engine: "PagedEngine", ranks: "Ranks") -> None:
        from hortator.workers.lockstep import DistributedChannel

        self.engine = engine
        self.num_steps = 0
        self._channel: DistributedChannel | None = None
        if ranks.world_group is not None:
            self._channel = DistributedChannel(ranks.world_group, ranks.device, ahead=ranks.pp_size - 1)

    def call(self, admit: "tuple[Request, ...]" = (), cancel: tuple[int, ...] = ()) -> "StepOutput":
        """One step of everybody."""
        from hortator.workers.engine.step import StepPlan
        from hortator.workers.lockstep import encode_plan

        self.num_steps += 1
        plan = StepPlan(self.num_steps, admit, cancel)
        digest = self.engine.apply(plan)
        if self._channel is not None:
            self._channel.broadcast_plan(encode_plan(plan, epoch=EPOCH, digest=digest))
        return self.engine.execute()

    def step(self, admit: "tuple[Request, ...]" = ()) -> int:
        """How many tokens came; gpu_engine.py's measurements drive an engine by this."""
        return len(self.call(admit).tokens)

    def drain(self) -> int:
        """Step until nothing is left; how many tokens came."""
        tokens = 0
        while not self.engine.idle:
            tokens += self.step()
        return tokens

    def dismiss(self) -> None:
        """Let the peers leave `follow`."""
        from hortator.workers.lockstep import encode_park

        if self._channel is not None:
            self._channel.broadcast_plan(encode_park(epoch=EPOCH, step=self.num_steps + 1))


def follow(engine: "Engine", mesh: "Mesh") -> None:
    """Every other rank, as stroke.Peer, until it is dismissed."""
    from hortator.workers.lockstep import DistributedChannel, Follower

    assert mesh.world_group is not None
    channel, follower = DistributedChannel(mesh.world_group, mesh.device), Follower(rank=mesh.rank, epoch=EPOCH)
    while True:
        header, plan = follower.read(channel.wait())
        if header.park:
            return
        follower.check(header, engine.apply(plan))
        engine.execute()


def _start(seat: Seat, out: Path, threads: int) -> "subprocess.Popen[bytes]":
    told = {_SEAT: json.dumps(asdict(seat)), "OMP_NUM_THREADS": str(threads)}
    with out.open("wb") as stdout, out.with_suffix(".err").open("wb") as stderr:
        return subprocess.Popen(
            [sys.executable, *sys.argv],
            env=ENVIRONMENT | os.environ | told,
            stdout=stdout,
            stderr=stderr,
            pass_fds=(seat.listener,) if seat.listener is not None else (),
        )


def _wait(ranks: "list[subprocess.Popen[bytes]]", outs: list[Path], until: float) -> None:
    while None in (codes := [process.poll() for process in ranks]) or any(codes):
        bad = next((rank for rank, code in enumerate(codes) if code), None)
        if bad is not None:
            time.sleep(0.5)  # the cause may be slower to end than its consequences
            said = "\n".join(f"--- rank {i}\n{o.with_suffix('.err').read_text()[-1500:]}" for i, o in enumerate(outs))
            raise RuntimeError(f"rank {bad} ended with {codes[bad]}:\n{said}")
        if time.monotonic() > until:
            raise RuntimeError(f"ranks {[i for i, code in enumerate(codes) if code is None]} are not done in time")
        time.sleep(0.05)

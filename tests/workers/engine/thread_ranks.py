"""Two ranks of test_threads over gloo, with 2 and 6 threads: a step of the second takes longer with fewer than 3.

Prints each rank's result and how many steps it took part in; a rank that went on alone would wait for ever.
"""

import os

os.environ["GLOO_SOCKET_IFNAME"] = "lo"

import torch
import torch.distributed

from hortator.topology.control import listen
from hortator.topology.mesh import join
from hortator.workers.engine.threads import threads_by_trial


def main() -> None:
    listener = listen("127.0.0.1", 0)
    store = listener.getsockname()
    rank = 0 if os.fork() else 1
    mesh = join(rank=rank, tp_size=2, store=store, listener=None if rank else listener, device="cpu", local_rank=rank)
    torch.set_num_threads((2, 6)[rank])
    now, steps = 0.0, 0

    def step() -> None:
        nonlocal now, steps
        torch.distributed.all_reduce(torch.ones(1), group=mesh.world_group)
        steps += 1
        now += 0.02 if rank and torch.get_num_threads() < 3 else 0.01

    found = threads_by_trial(step, mesh, num_rows=4, clock=lambda: now)
    torch.distributed.barrier()
    print(f"rank {rank}: {found.few} of {found.most} in {steps} steps", flush=True)
    os._exit(0)


main()

"""Two ranks of test_lockstep over gloo: the leader sends plans of every size around the inline limit, then dies.

With --measure it prints what a plan costs instead; with --cuda the ranks use NCCL and two GPUs.
"""

import os
import sys
import time

os.environ["GLOO_SOCKET_IFNAME"] = "lo"

from hortator.topology.control import listen
from hortator.topology.mesh import join
from hortator.workers.engine.step import Request, SamplingParams, StepPlan
from hortator.workers.lockstep import (
    INLINE_BYTES,
    Channel,
    CollectiveFailed,
    DistributedChannel,
    decode_plan,
    encode_plan,
)

SIZES = [0, 1, 3, 100, *range(INLINE_BYTES // 4 - 70, INLINE_BYTES // 4), INLINE_BYTES, 300_000]


def plan(step: int, num_tokens: int) -> StepPlan:
    prompt = tuple(range(num_tokens))
    return StepPlan(step, (Request(step, prompt, SamplingParams(max_tokens=1)),) if num_tokens else ())


def compare(channel: Channel, rank: int) -> None:
    for step, size in enumerate(SIZES):
        if rank == 0:
            channel.broadcast_plan(encode_plan(plan(step, size), epoch=1, digest=step))
        else:
            assert decode_plan(channel.wait())[1] == plan(step, size), (step, size)
    if rank == 0:
        os._exit(0)
    print("same", flush=True)
    if "--cuda" in sys.argv:
        os._exit(0)  # NCCL does not notice a dead rank; the control connection does
    try:
        channel.wait()
    except CollectiveFailed as error:
        print(type(error).__name__, flush=True)
    os._exit(0)


def measure(channel: Channel, rank: int, steps: int = 500) -> None:
    """Encoding, broadcast and decoding, one after the other."""
    for num_tokens in (0, 0, 100, 1000, 1900, 8000, 100_000):  # the first is to warm up
        something = plan(1, num_tokens)
        size = len(encode_plan(something, epoch=1, digest=1))
        started = time.perf_counter()
        for _ in range(steps):
            if rank == 0:
                channel.broadcast_plan(encode_plan(something, epoch=1, digest=1))
            else:
                decode_plan(channel.wait())
        micros = (time.perf_counter() - started) / steps * 1e6
        if rank == 1:
            print(f"{num_tokens:7d} prompt tokens  {size:7d} bytes  {micros:8.0f} us a plan", flush=True)
    os._exit(0)


def main() -> None:
    listener = listen("127.0.0.1", 0)
    store = listener.getsockname()
    rank = 0 if os.fork() else 1
    mesh = join(
        rank=rank,
        tp_size=2,
        store=store,
        listener=None if rank else listener,
        device="cuda" if "--cuda" in sys.argv else "cpu",
        local_rank=rank,
    )
    assert mesh.world_group is not None
    channel = DistributedChannel(mesh.world_group, mesh.device)
    if "--measure" in sys.argv:
        measure(channel, rank)
    compare(channel, rank)


main()

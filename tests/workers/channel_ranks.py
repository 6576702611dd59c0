"""Two ranks of test_lockstep over gloo: the leader sends plans of every size around the inline limit, then dies.

With --ahead the peer comes to the channel only when the leader has left it, and the last plan comes when it must not.
With --measure it prints what a plan costs instead; with --cuda the ranks use NCCL and two GPUs.
"""

import os
import sys
import time

os.environ["GLOO_SOCKET_IFNAME"] = "lo"

import torch.distributed

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

LEADER_LEFT = os.pipe()
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


def go_ahead(channel: Channel, rank: int) -> None:
    """The leader sends as many plans as it may be ahead, of one and of two broadcasts, before the peer takes any."""
    sizes = [0, 10_000]
    if rank == 0:
        for step, size in enumerate(sizes):
            channel.broadcast_plan(encode_plan(plan(step, size), epoch=1, digest=step))
        os.write(LEADER_LEFT[1], b"!")
        started = time.perf_counter()
        channel.broadcast_plan(encode_plan(plan(2, 0), epoch=1, digest=2))
        print("waited" if time.perf_counter() - started > 0.1 else "did not wait", flush=True)
    else:
        os.read(LEADER_LEFT[0], 1)
        time.sleep(0.3)
        for step, size in [*enumerate(sizes), (2, 0)]:
            assert decode_plan(channel.wait())[1] == plan(step, size), (step, size)
        print("same", flush=True)
    torch.distributed.barrier()
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
    ahead = 2 if "--ahead" in sys.argv else 0
    channel = DistributedChannel(mesh.world_group, mesh.device, ahead=ahead)
    if ahead:
        go_ahead(channel, rank)
    if "--measure" in sys.argv:
        measure(channel, rank)
    compare(channel, rank)


main()

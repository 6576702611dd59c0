"""One layer's paged decode attention: the engine's kernel against FlashInfer's, in the same run, interleaved.

    python benchmarks/gpu_attention.py [--heads 32 --kv-heads 8 --head-dim 128]

Each arm is captured in a CUDA graph over several caches, so that nothing is read from the L2 cache by chance; the
figure is the median of many replays, and the bandwidth that it means for keys and values.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

SIZE = 16
COPIES = 4
SHAPES = ((1, 576), (8, 576), (32, 576), (64, 700), (128, 700), (256, 700), (64, 4096))


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * float(begin.elapsed_time(end)) / COPIES


def captured(call: Callable[[int], Any]) -> torch.cuda.CUDAGraph:
    for copy in range(COPIES):
        call(copy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(COPIES):
            call(copy)
    return graph


def measure(rows: int, context: int, args: argparse.Namespace) -> list[tuple[str, float]]:
    from hortator.workers.engine.cuda import kernels  # needs Triton

    heads, kv_heads, dim = args.heads, args.kv_heads, args.head_dim
    count = -(-context // SIZE)
    blocks = rows * count
    caches = [torch.randn(2, blocks, kv_heads, SIZE, dim, device="cuda", dtype=torch.bfloat16) for _ in range(COPIES)]
    pages = torch.randperm(blocks, device="cuda").int()
    starts = (torch.arange(rows, device="cuda") * count).int()
    contexts = torch.full((rows,), context, device="cuda", dtype=torch.int32)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim, device="cuda", dtype=torch.bfloat16)
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for splits in (1, 2, 4, 8, 16, 32):
        if rows * kv_heads * splits <= 4096 and splits <= max(1, context // 32):
            graphs[f"splits {splits}"] = captured(
                lambda copy, splits=splits: kernels.decode(
                    qkv, caches[copy], pages, starts, contexts, num_heads=heads, scale=dim**-0.5, splits=splits
                )
            )
    if args.flashinfer:
        import flashinfer

        workspace = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
        indptr = torch.cat((starts, torch.tensor([blocks], device="cuda", dtype=torch.int32)))
        last = torch.full((rows,), (context - 1) % SIZE + 1, device="cuda", dtype=torch.int32)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_cuda_graph=True, use_tensor_cores=True, paged_kv_indptr_buffer=indptr,
            paged_kv_indices_buffer=pages, paged_kv_last_page_len_buffer=last,
        )  # fmt: skip
        wrapper.plan(indptr, pages, last, heads, kv_heads, dim, SIZE, q_data_type=torch.bfloat16)
        query = qkv[:, : heads * dim].view(rows, heads, dim).contiguous()
        graphs["flashinfer"] = captured(lambda copy: wrapper.run(query, (caches[copy][0], caches[copy][1])))
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(40):
        for name, graph in graphs.items():
            times[name].append(replay_us(graph))
    return [(name, statistics.median(values)) for name, values in times.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--no-flashinfer", dest="flashinfer", action="store_false")
    args = parser.parse_args()
    table = Table(title=f"paged decode attention, {args.heads}/{args.kv_heads} heads x {args.head_dim}, bf16, us")
    for column in ("B", "context", "arm", "us", "TB/s"):
        table.add_column(column, justify="right")
    for rows, context in SHAPES:
        moved = rows * context * args.kv_heads * args.head_dim * 2 * 2
        for name, us in measure(rows, context, args):
            table.add_row(str(rows), str(context), name, f"{us:.1f}", f"{moved / us / 1e6:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()

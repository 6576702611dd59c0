"""Every kernel against its twin in plain torch, on fresh random inputs, in bfloat16 with the twin in float32."""

from typing import Any

import pytest
import torch

from hortator.workers.engine.cuda import reference
from hortator.workers.engine.cuda.batch import Chunks

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def kernels() -> Any:
    from hortator.workers.engine.cuda import kernels

    return kernels


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative, by norm; not a number where anything is not."""
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=BF16)


@pytest.mark.parametrize("hidden", [96, 4096, 8192])
@pytest.mark.parametrize("rows", [1, 33])
def test_add_rms_norm(kernels: Any, rows: int, hidden: int) -> None:
    x, residual, weight = random(rows, hidden), random(rows, hidden), random(hidden)
    got, total = kernels.add_rms_norm(x, residual.clone(), weight, 1e-5)
    wanted, sums = reference.add_rms_norm(x, residual.clone(), weight, 1e-5)
    assert torch.equal(total, sums)
    assert error(got, wanted) < 5e-3
    got, total = kernels.add_rms_norm(x, None, weight, 1e-5)
    assert error(got, reference.add_rms_norm(x, None, weight, 1e-5)[0]) < 5e-3
    assert total is x


def test_silu_mul(kernels: Any) -> None:
    gate_up = random(37, 2 * 14336)
    assert error(kernels.silu_mul(gate_up), reference.silu_mul(gate_up)) < 5e-3


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (4, 2, 32), (8, 8, 64)])
def test_rotate_and_store(kernels: Any, heads: int, kv_heads: int, head_dim: int, normed: bool) -> None:
    tokens, blocks, size = 70, 20, 16
    qkv = random(tokens, (heads + 2 * kv_heads) * head_dim)
    positions = torch.randint(0, 500, (tokens,), device=DEVICE, dtype=torch.int32)
    slots = torch.randperm(blocks * size, device=DEVICE)[:tokens].int()
    angles = torch.randn(500, head_dim // 2, device=DEVICE)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
    norms = (random(head_dim), random(head_dim), 1e-6) if normed else None
    results = []
    for operations in (kernels, reference):
        rotated, cache = qkv.clone(), torch.full((2, blocks, kv_heads, size, head_dim), 7.0, device=DEVICE, dtype=BF16)
        operations.rotate_and_store(rotated, positions, slots, cos_sin, cache, num_heads=heads, norms=norms)
        results.append((rotated, cache))
    (rotated, cache), (wanted, wanted_cache) = results
    assert error(rotated, wanted) < 5e-3
    assert error(cache, wanted_cache) < 5e-3
    assert (cache == 7).sum() == (wanted_cache == 7).sum(), "a slot that is nobody's was written"


@pytest.mark.parametrize("options", [{}, {"splits": 2}, {"splits": 32}, {"window": 100}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (4, 2, 32), (32, 32, 64)])
def test_decode(kernels: Any, heads: int, kv_heads: int, head_dim: int, options: dict[str, Any]) -> None:
    size, contexts = 16, [1, 0, 17, 700, 64, 1500, 3]
    num_blocks = 300
    counts = [-(-context // size) for context in contexts]
    pages = torch.randperm(num_blocks, device=DEVICE)[: sum(counts)].int()
    starts = torch.tensor([sum(counts[:i]) for i in range(len(counts))], device=DEVICE, dtype=torch.int32)
    lengths = torch.tensor(contexts, device=DEVICE, dtype=torch.int32)
    cache = random(2, num_blocks, kv_heads, size, head_dim)
    unused = torch.ones(num_blocks, dtype=torch.bool, device=DEVICE)
    unused[pages.long()] = False
    cache[:, unused] = float("nan")  # what belongs to others must not be read
    for context, start in zip(contexts, starts.tolist(), strict=True):
        if context % size:  # nor what was in a block before
            cache[:, pages[start + context // size].long(), :, context % size :] = float("nan")
    qkv = random(len(contexts), (heads + 2 * kv_heads) * head_dim)
    call = (qkv, cache, pages, starts, lengths)
    got = kernels.decode(*call, num_heads=heads, scale=head_dim**-0.5, **options)
    wanted = reference.decode(*call, num_heads=heads, scale=head_dim**-0.5, **options)
    assert error(got, wanted) < 1e-2
    assert not got[1].any()


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("past", [False, True])
def test_prefill(kernels: Any, past: bool, window: int) -> None:
    heads, kv_heads, head_dim, size = 32, 8, 128, 16
    counts, befores = [100, 2, 333], [48, 0, 16] if past else [0, 0, 0]
    contexts = [count + before for count, before in zip(counts, befores, strict=True)]
    cache = random(2, 200, kv_heads, size, head_dim)
    slots = torch.randperm(200 * size, device=DEVICE)[: sum(contexts)]
    places = slots // size, slots % size
    query_ends, key_ends = (torch.tensor([0, *n], device=DEVICE).cumsum(0).int() for n in (counts, contexts))
    chunks = Chunks(sum(counts), query_ends, key_ends, max(counts), max(contexts), places if past else None)
    qkv = random(sum(counts), (heads + 2 * kv_heads) * head_dim)
    options = {"num_heads": heads, "scale": head_dim**-0.5, "window": window}
    got = kernels.prefill(qkv, cache, chunks, **options)
    wanted = reference.prefill(qkv.float(), cache.float(), chunks, **options)
    assert error(got, wanted) < 1e-2


def test_greedy(kernels: Any) -> None:
    for rows in (1, 7, 200):
        logits = random(rows, 128_256)
        logits[0, 5] = logits[0, 99_000] = logits[0].max() + 1  # the first of equals
        assert torch.equal(kernels.greedy(logits), reference.greedy(logits))
    logits[3, 77], logits[4, 128_255], logits[5, 0] = float("nan"), float("inf"), float("-inf")
    assert kernels.greedy(logits)[3:6].tolist() == [-1, -1, -1]

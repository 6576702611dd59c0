"""Tensor parallelism: who a rank is, what it holds of each weight, and DeepSpeed's layers on an explicit group.

With one rank nothing of DeepSpeed is imported and no process group is needed.
"""

from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from math import gcd
from typing import TYPE_CHECKING, Any, Protocol

import torch

from hortator.producer.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Ranks(Protocol):
    """A rank's place in its model group; hortator.topology.mesh.Mesh is one."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def tp_rank(self) -> int: ...
    @property
    def tp_size(self) -> int: ...
    @property
    def tp_group(self) -> "ProcessGroup | None": ...
    @property
    def pp_rank(self) -> int: ...
    @property
    def pp_size(self) -> int: ...
    @property
    def world_group(self) -> "ProcessGroup | None": ...
    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True, slots=True)
class SingleRank:
    """A group of one."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    tp_group: None = None
    pp_rank: int = 0
    pp_size: int = 1
    world_group: None = None


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of one tensor that a rank holds: all of it, or `ranges` of dimension `dim`, one after the other."""

    dim: int | None = None
    ranges: tuple[range, ...] = ()

    def shape(self, full: tuple[int, ...]) -> tuple[int, ...]:
        """Of the part."""
        return tuple(sum(map(len, self.ranges)) if dim == self.dim else n for dim, n in enumerate(full))


WHOLE = Cut()


_COLUMN = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj")
_ROW = ("o_proj", "down_proj")


def style_of(name: str) -> str | None:
    """How the linear of that name (or its weight or bias) is cut: by "column" (its output), by "row" (its input), or
    not at all.  Megatron-LM's scheme: https://arxiv.org/abs/1909.08053"""
    linear = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    return "column" if linear in _COLUMN else "row" if linear in _ROW else None


def cut_of(name: str, shape: tuple[int, ...], head_sizes: tuple[int, int, int], ranks: Ranks) -> Cut:
    """A parameter's part on this rank.  `shape` is the whole one: [out, in], stacked [experts, out, in], or a bias.

    Fused weights are cut in each of their parts; `head_sizes` are the rows of queries, keys and values.
    """
    style = style_of(name)
    if ranks.tp_size == 1 or style is None or (style == "row" and name.endswith(".bias")):
        return WHOLE
    if style == "row":
        return _even_cut(len(shape) - 1, (shape[-1],), ranks)
    dim = max(0, len(shape) - 2)
    if "qkv_proj" in name:
        return _even_cut(dim, head_sizes, ranks)
    return _even_cut(dim, (shape[dim] // 2,) * 2 if "gate_up_proj" in name else (shape[dim],), ranks)


def _even_cut(dim: int, sections: tuple[int, ...], ranks: Ranks) -> Cut:
    """This rank's equal part of each section of a dimension."""
    begins = accumulate(sections, initial=0)
    return Cut(dim, tuple(_share(begin, size, ranks) for begin, size in zip(begins, sections, strict=False)))


def _share(begin: int, size: int, ranks: Ranks) -> range:
    part = size // ranks.tp_size
    return range(begin + ranks.tp_rank * part, begin + (ranks.tp_rank + 1) * part)


def check_divides(sizes: dict[str, int], tp_size: int) -> None:
    """Every size (number of heads, of KV heads, ...) must be cut into equal parts."""
    uneven = {name: size for name, size in sizes.items() if size % tp_size}
    if not uneven:
        return
    common = gcd(*sizes.values())
    nearest = min((n for n in range(1, common + 1) if common % n == 0), key=lambda n: abs(n - tp_size))
    raise ConfigError(
        f"tensor_parallel_size={tp_size} does not divide "
        f"{', '.join(f'{name}={size}' for name, size in uneven.items())}: the nearest that works is {nearest}"
    )


def parallel_linear(linear: torch.nn.Module, style: str, ranks: Ranks) -> torch.nn.Module:
    """DeepSpeed's layer around a linear that already holds this rank's slice; `style` is style_of's."""
    column, row = _deepspeed_layers()
    layer: torch.nn.Module = column(linear, ranks) if style == "column" else row(linear, ranks)
    return layer


class ParallelExperts(torch.nn.Module):
    """transformers' stacked experts, of each of which this rank holds a part of the intermediate size: the sum over
    the ranks is the whole."""

    def __init__(self, experts: torch.nn.Module, ranks: Ranks) -> None:
        super().__init__()
        self.experts = experts
        self._group = ranks.tp_group

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        from torch import distributed

        partial: torch.Tensor = self.experts(*inputs)
        distributed.all_reduce(partial, group=self._group)
        return partial


@cache
def _deepspeed_layers() -> tuple[Any, Any]:
    """Needs torch.distributed.  DeepSpeed's shared-memory all-reduce is turned off first: it ignores the group (wrong
    sums with several groups), and compiles C++ at first use (docs/04-engine.md)."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    import deepspeed
    from deepspeed.module_inject import LinearAllreduce, LinearLayer, set_autotp_mode

    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, dist_init_required=False)
    set_autotp_mode(training=False)

    class RowSlice(LinearAllreduce):  # type: ignore[misc]
        """LinearAllreduce has no skip_partition: this is the hook by which it decides to cut."""

        def _should_materialize_tp_partition(self) -> bool:
            return False

    # A column-parallel linear communicates nothing in inference; without a group it is exactly that.
    return (
        lambda linear, _: LinearLayer(linear, mp_group=None, skip_partition=True),
        lambda linear, ranks: RowSlice(linear, ranks.tp_group),
    )


def agree_on_minimum(value: int, ranks: Ranks) -> int:
    """The smallest of all ranks' values."""
    if ranks.world_size == 1:
        return value
    from torch import distributed

    agreed = torch.tensor([value], dtype=torch.int64, device=ranks.device)
    distributed.all_reduce(agreed, op=distributed.ReduceOp.MIN, group=ranks.world_group)
    return int(agreed.item())


def broadcast_from_first(tokens: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The first tensor-parallel rank's tensor, on all of them."""
    if ranks.tp_size > 1:
        from torch import distributed

        distributed.broadcast(tokens, group=ranks.tp_group, group_src=0)
    return tokens

"""Places in a group that only tests need; the real ones come from hortator.topology.mesh."""

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class TwoRanks:
    """One of two tensor-parallel ranks."""

    rank: int
    tp_rank: int
    tp_group: Any = None
    world_group: Any = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    world_size: int = 2
    tp_size: int = 2
    pp_rank: int = 0
    pp_size: int = 1


@dataclass(frozen=True)
class Stage:
    """The only rank of one pipeline stage; nothing is sent."""

    pp_rank: int
    pp_size: int
    tp_rank: int = 0
    tp_size: int = 1
    tp_group: None = None
    world_group: None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def rank(self) -> int:
        return self.pp_rank * self.tp_size + self.tp_rank

    @property
    def world_size(self) -> int:
        return self.pp_size * self.tp_size

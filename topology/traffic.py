"""What travels between the ranks of a group, and how much of it.  Pure.

plan        rank 0 to all, once a step: a header, and 4 bytes for each prompt token that is admitted
all-reduce  among the ranks of a stage, twice a layer: the hidden state of every token
hidden      from each rank of a stage to its counterpart in the next, once a step: the hidden state of every token
tokens      from the rank that samples to all, once a step: 8 bytes for each sequence
"""

from dataclasses import dataclass

from .fleet import ModelSpec
from .memory import RankMemory, dtype_of
from .modelshape import DTYPE_BYTES, ModelShape

PLAN_HEADER_BYTES = 40
SAMPLED_TOKEN_BYTES = 8
_ALL_REDUCES = 2  # a layer: after attention, and after the feed-forward part


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one token of a step puts on the wire; None where the model's sizes are not known.

    An all-reduce's bytes are those of its tensor: on a ring of n ranks each sends and receives 2 (n - 1) / n of them.
    """

    all_reduce_bytes: tuple[int | None, ...]  # of each stage
    hidden_bytes: int | None  # between two stages, on each of the tensor parallel ranks


def traffic(shape: ModelShape | None, spec: ModelSpec, ranks: tuple[RankMemory, ...]) -> Traffic:
    """Of one group; `ranks` gives each stage's layers."""
    if shape is None:
        return Traffic((None,) * spec.pipeline_parallel_size, None)
    hidden = DTYPE_BYTES[dtype_of(shape, spec)] * shape.hidden_size
    stages = ranks[:: spec.tensor_parallel_size]
    return Traffic(tuple(_ALL_REDUCES * len(stage.layers) * hidden for stage in stages), hidden)

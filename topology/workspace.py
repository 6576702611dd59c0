"""What a step needs of a rank's memory beside weights and cache.  Pure; planner and engine both count by it.

The factors are those of transformers' layers: how many tensors of each width are there at once, measured
(tests/topology/test_workspace.py).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .modelshape import ModelShape

CUDA_SLACK_BYTES = 1 << 30  # libraries' workspaces, fragmentation
_STREAM = 4  # hidden states of a token: the residual, its norm, what the layer adds, and their sum
_SAMPLING_BYTES = 20  # for each logit, beside itself: copies in float32 and float64


@dataclass(frozen=True, slots=True)
class Feed:
    """A layer's feed-forward, as one token meets it."""

    width: int  # of one expert, or of all where there are none
    experts: int = 0  # to which each token is sent; 0: the layer is dense
    fused: bool = False  # gate and up are computed as one

    def elements(self, hidden_size: int, *, tp_size: int) -> int:
        """Of one token, at the widest moment.

        Gate, its activation and their product with up; or gate and up together, activation and product.  Experts work
        on a copy of the token each; later all their answers are there four times: as computed, weighted, and in the
        tokens' order, beside that copy.
        """
        inner = (4 if self.fused or self.experts else 3) * self.width // tp_size
        if not self.experts:
            return inner
        return self.experts * max(hidden_size + inner, 4 * hidden_size)


def step_bytes(shape: "ModelShape", *, item: int, tp_size: int, num_tokens: int, num_rows: int) -> int:
    """Activations of the widest layer for `num_tokens` tokens, and logits for `num_rows` that sample.  `item`: bytes of
    a number."""
    per_token = _STREAM * shape.hidden_size + max(
        feed.elements(shape.hidden_size, tp_size=tp_size) for feed in shape.feeds
    )
    return num_tokens * per_token * item + num_rows * shape.vocab_size * (item + _SAMPLING_BYTES)

"""What travels between the ranks of a group in a step: hidden states from stage to stage, chosen tokens to everybody.

With one stage the first rank broadcasts its tokens.  With several, the first rank of the last stage samples, sends the
tokens to every rank, and log-probabilities to the leader alone.  Hidden states and tokens have groups of their own:
NCCL runs what shares a communicator in one order, and the two directions would wait for each other.
"""

from typing import TYPE_CHECKING, Any, Protocol

import torch

from .parallel import Ranks, broadcast_from_first

if TYPE_CHECKING:
    from .model import LoadedModel


class Link(Protocol):
    """A rank's place in the flow of one step.  Every rank makes the same calls for the same step, in order."""

    staged: bool
    """Several stages work on different steps at once."""
    receives: bool
    """This rank's input comes from the stage before, not from token ids."""

    def receive(self, num_tokens: int) -> torch.Tensor:
        """Hidden states [tokens, hidden size] of the stage before."""

    def send(self, hidden: torch.Tensor) -> None:
        """Hand hidden states to the stage behind, if there is one."""

    def share(self, ids: torch.Tensor | None, count: int) -> Any:
        """The sampling rank's ids [count], on all ranks."""

    def report(self, scores: torch.Tensor | None, count: int) -> Any:
        """The sampling rank's scores [count], on the leader."""


class OneStage:
    """No pipeline: all ranks hold all layers."""

    staged = False
    receives = False

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def receive(self, num_tokens: int) -> torch.Tensor:
        raise NotImplementedError("the only stage reads token ids")

    def send(self, hidden: torch.Tensor) -> None:
        """There is nobody behind."""

    def share(self, ids: torch.Tensor | None, count: int) -> torch.Tensor:
        if ids is None:
            ids = torch.empty(count, dtype=torch.int64, device=self._ranks.device)
        return broadcast_from_first(ids, self._ranks)

    def report(self, scores: torch.Tensor | None, count: int) -> torch.Tensor | None:
        return scores


def make_link(ranks: Ranks, model: "LoadedModel") -> Link:
    """Collective: every rank of the group makes its link."""
    return OneStage(ranks)

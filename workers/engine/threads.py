"""How many threads a step uses on a CPU: one, and one more for so much work in matrix products.

Threads shorten little else.  Where a step has few such products, more threads gain nothing, spin while they wait for
each other, and keep cores from the front, Redis and other ranks.
"""

from dataclasses import dataclass

import torch

FLOPS_PER_THREAD = 1 << 28
"""Float32 steps with less gain little from a second thread, if anything; what was measured is in docs/04-engine.md."""


@dataclass(frozen=True, slots=True)
class Threads:
    """Of layers whose matrices have so many parameters on this rank; at most `most`."""

    most: int
    num_parameters: int

    @classmethod
    def found(cls, body: torch.nn.Module) -> "Threads":
        """At most as many as torch has now, so before any step.  Embeddings are looked up, not multiplied; of experts
        all count.

        The head does not: only one rank has it, and ranks that compute the same should do so with as many threads, for
        their sums to be the same bit by bit.
        """
        matrices = [
            matrix
            for module in body.modules()
            if not isinstance(module, torch.nn.Embedding)
            for matrix in module.parameters(recurse=False)
            if matrix.dim() > 1
        ]
        return cls(torch.get_num_threads(), sum(matrix.numel() for matrix in matrices))

    def wanted(self, num_tokens: int) -> int:
        """By a step of so many tokens."""
        return min(self.most, 1 + 2 * self.num_parameters * num_tokens // FLOPS_PER_THREAD)

    def use(self, num_tokens: int) -> None:
        """From now on, in the calling thread."""
        torch.set_num_threads(self.wanted(num_tokens))

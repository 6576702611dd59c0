"""How many threads a step uses on a CPU: one for so much work in matrix products.

Threads shorten matrix products and nothing else.  Where a step has few of them, more threads gain nothing, spin while
they wait for each other, and keep cores from the front, Redis and other ranks.
"""

from dataclasses import dataclass

import torch

FLOPS_PER_THREAD = 1 << 28
"""3 to 5 ms of one core: below it one thread is as fast as two, above it two are faster (docs/04-engine.md)."""


@dataclass(frozen=True, slots=True)
class Threads:
    """Of a model whose matrices have so many parameters on this rank; at most `most`."""

    most: int
    num_parameters: int

    @classmethod
    def found(cls, *parts: torch.nn.Module | None) -> "Threads":
        """At most as many as torch has.  Embeddings are looked up, not multiplied."""
        modules = [module for part in parts if part is not None for module in part.modules()]
        matrices = [
            matrix
            for module in modules
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

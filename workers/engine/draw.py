"""One row's next token: what it depends on."""

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .step import SamplingParams

if TYPE_CHECKING:
    from . import scheduler


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row is sampled; `position` is the number of tokens generated before it, journal included.

    `tokens` is the sequence's own array (prompt and what was generated); it matters only to a row that needs history.
    """

    sampling: SamplingParams
    position: int
    handle: int = 0
    tokens: "array[int]" = field(default_factory=lambda: array("i"))
    num_prompt: int = 0
    stops: frozenset[int] = frozenset()

    @classmethod
    def of(cls, sequence: "scheduler.Sequence", *, ahead: int = 0) -> "Draw":
        """The draw of a sequence's next token, when `ahead` more were chosen than the host has seen."""
        return cls(
            sequence.request.sampling,
            sequence.num_generated + ahead,
            sequence.handle,
            sequence.tokens,
            len(sequence.request.prompt),
            sequence.stops,
        )

    @property
    def greedy(self) -> bool:
        return self.sampling.greedy

    @property
    def young(self) -> bool:
        """Too short to end."""
        return self.position < self.sampling.min_tokens

    @property
    def steered(self) -> bool:
        """The request changes this row's logits."""
        sampling = self.sampling
        return sampling.needs_history or bool(sampling.logit_bias) or (self.young and bool(self.stops))

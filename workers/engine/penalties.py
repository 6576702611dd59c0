"""Penalties on tokens that were there before, and biases on tokens that the request names.

With x the logit of token t, and c the number of times that t was generated (the prompt does not count):

    repetition_penalty r   x / r if x > 0 else x * r, for each t of prompt and output.  Keskar et al., 2019, "CTRL",
                           as transformers' RepetitionPenaltyLogitsProcessor has it
    frequency_penalty f    x - f * c                 the OpenAI API's definition
    presence_penalty p     x - p if c > 0            the OpenAI API's definition
    logit_bias b           x + b[t]                  the OpenAI API's definition

in this order.  Only the logits of tokens that a row has seen are read and written: a few hundred of a hundred thousand.
"""

from array import array
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from .step import SamplingParams
from .transfer import to_device

_FIRST_ROOM = 64


class Tally:
    """The distinct tokens of one sequence and how often each was generated; counts only what is new.

    `ids` and `counts` are numpy arrays with room to spare, of which `size` entries count.  A prompt's tokens are in it,
    with count 0, only if `with_prompt`.
    """

    def __init__(self, *, with_prompt: bool) -> None:
        self.size = 0
        self.ids = np.empty(_FIRST_ROOM, dtype=np.int64)
        self.counts = np.empty(_FIRST_ROOM, dtype=np.float32)
        self._with_prompt = with_prompt
        self._places: dict[int, int] = {}
        self._num_counted: int | None = None  # tokens, prompt included

    def catch_up(self, tokens: "array[int]", num_prompt: int) -> None:
        """Count what was appended to `tokens` since the last call."""
        if self._num_counted is None:
            if self._with_prompt:
                self._extend(np.unique(np.frombuffer(tokens, dtype=np.int32, count=num_prompt)))
            self._num_counted = num_prompt
        for token in tokens[self._num_counted :]:
            self._count(token)
        self._num_counted = len(tokens)

    def _count(self, token: int) -> None:
        place = self._places.get(token)
        if place is None:
            place = self.size
            self._extend(np.array([token]))
        self.counts[place] += 1

    def _extend(self, ids: "NDArray[np.generic]") -> None:
        size = self.size + len(ids)
        if size > len(self.ids):
            self.ids = np.resize(self.ids, 2 * size)
            self.counts = np.resize(self.counts, 2 * size)
        self.ids[self.size : size] = ids
        self.counts[self.size : size] = 0
        self._places.update(zip(ids.tolist(), range(self.size, size), strict=True))
        self.size = size


Bias = tuple[NDArray[np.int64], NDArray[np.float32]]


def bias_of(sampling: SamplingParams) -> Bias:
    """logit_bias as arrays of ids and values."""
    ids, values = zip(*sampling.logit_bias, strict=True)
    return np.array(ids, dtype=np.int64), np.array(values, dtype=np.float32)


def penalise(
    logits: torch.Tensor, rows: Sequence[int], params: Sequence[SamplingParams], seen: Sequence[Tally]
) -> None:
    """Change `logits` [*, vocabulary] (float32, contiguous) in place: row rows[i] by params[i] and what seen[i] has."""
    sizes = [tally.size for tally in seen]
    if not sum(sizes):
        return
    device = logits.device
    places = _places(logits, rows, sizes, [tally.ids[: tally.size] for tally in seen])
    counts = to_device(np.concatenate([tally.counts[: tally.size] for tally in seen]), device)
    factors = [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params]
    repetition, frequency, presence = to_device(
        np.ascontiguousarray(np.repeat(np.array(factors, dtype=np.float32), sizes, axis=0).T), device
    )
    flat = logits.view(-1)
    values = flat[places]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values - frequency * counts - presence * (counts > 0)
    flat[places] = values


def add_biases(logits: torch.Tensor, rows: Sequence[int], biases: Sequence[Bias]) -> None:
    """Change `logits` in place, as `penalise` does; a bias names each token once."""
    places = _places(logits, rows, [len(ids) for ids, _ in biases], [ids for ids, _ in biases])
    flat = logits.view(-1)
    flat[places] = flat[places] + to_device(np.concatenate([values for _, values in biases]), logits.device)


def forbid(logits: torch.Tensor, rows: Sequence[int], tokens: Sequence[NDArray[np.int64]]) -> None:
    """Make tokens[i] impossible in row rows[i], in place."""
    places = _places(logits, rows, [len(ids) for ids in tokens], tokens)
    logits.view(-1).index_fill_(0, places, float("-inf"))


def _places(
    logits: torch.Tensor, rows: Sequence[int], sizes: Sequence[int], ids: Sequence[NDArray[np.int64]]
) -> torch.Tensor:
    """Where the tokens `ids` of the rows are in the flat logits."""
    starts = np.repeat(np.array(rows, dtype=np.int64) * logits.shape[1], sizes)
    return to_device(starts + np.concatenate(ids), logits.device)

"""Penalties on tokens that were there before, and biases on tokens that the request names.

With x the logit of token t, and c the number of times that t was generated (the prompt does not count):

    repetition_penalty r   x / r if x > 0 else x * r, for each t of prompt and output.  Keskar et al., 2019, "CTRL",
                           as transformers' RepetitionPenaltyLogitsProcessor has it
    frequency_penalty f    x - f * c                 the OpenAI API's definition
    presence_penalty p     x - p if c > 0            the OpenAI API's definition
    logit_bias b           x + b[t]                  the OpenAI API's definition

in this order.  Only the logits of tokens that a row has seen are read and written, a few hundred of a hundred thousand,
and the counts live on the device: a step brings it each row's newest token, whatever the length of the output.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from .step import SamplingParams
from .transfer import indices, to_device

_FIRST_SLOTS, _FIRST_PLACES = 8, 256
_LARGEST = torch.finfo(torch.float32).max


class Tally:
    """The distinct tokens of one sequence, each at a place of its own; counts only what is new.

    A prompt's tokens are in it, generated no times, only if `with_prompt`.
    """

    def __init__(self, slot: int, *, with_prompt: bool) -> None:
        self.slot = slot
        self.size = 0
        self._with_prompt = with_prompt
        self._places: dict[int, int] = {}
        self._num_counted: int | None = None  # tokens, prompt included

    def catch_up(self, tokens: "array[int]", num_prompt: int, news: "News") -> None:
        """Write down what was appended to `tokens` since the last call."""
        if self._num_counted is None:
            self._num_counted = num_prompt
            if self._with_prompt:
                self._take_prompt(np.unique(np.frombuffer(tokens, dtype=np.int32, count=num_prompt)), news)
        for token in tokens[self._num_counted :]:
            place = self._places.setdefault(token, self.size)
            if place == self.size:
                self.size += 1
                news.first.append(np.array([[self.slot], [place], [token]]))
            news.again.append((self.slot, place))
        self._num_counted = len(tokens)

    def _take_prompt(self, ids: NDArray[np.int32], news: "News") -> None:
        self.size = len(ids)
        self._places = dict(zip(ids.tolist(), range(self.size), strict=True))
        news.first.append(np.stack([np.full_like(ids, self.slot), np.arange(self.size), ids]).astype(np.int64))


@dataclass(frozen=True, slots=True)
class News:
    """What a step adds to the table."""

    first: list[NDArray[np.int64]] = field(default_factory=list)  # [3, n]: slot, place, token
    again: list[tuple[int, int]] = field(default_factory=list)  # slot, place: generated once more


class Table:
    """Every sequence's tally on the device: `ids` and `counts` [slots, places].

    It grows by doubling, up to as many places as the longest of them has distinct tokens.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free = list(range(_FIRST_SLOTS))
        self._ids = torch.zeros(_FIRST_SLOTS, _FIRST_PLACES, dtype=torch.int64, device=device)
        self._counts = torch.zeros(_FIRST_SLOTS, _FIRST_PLACES, dtype=torch.float32, device=device)

    def open(self, *, with_prompt: bool) -> Tally:
        if not self._free:
            num_slots = len(self._ids)
            self._grow(2 * num_slots, self._ids.shape[1])
            self._free = list(range(num_slots, 2 * num_slots))
        return Tally(self._free.pop(), with_prompt=with_prompt)

    def close(self, tally: Tally) -> None:
        self._free.append(tally.slot)

    def add(self, news: News, tallies: Sequence[Tally]) -> None:
        """Take what `tallies` have written down."""
        widest = max(tally.size for tally in tallies)
        if widest > self._ids.shape[1]:
            self._grow(len(self._ids), 2 * widest)
        if news.first:
            slots, places, tokens = to_device(np.concatenate(news.first, axis=1), self._device)
            self._ids[slots, places] = tokens
            self._counts.index_put_((slots, places), torch.zeros_like(places, dtype=torch.float32))
        if news.again:
            slots, places = to_device(np.ascontiguousarray(np.array(news.again).T), self._device)
            self._counts.index_put_((slots, places), torch.ones_like(places, dtype=torch.float32), accumulate=True)

    def read(self, tallies: Sequence[Tally]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and how often each was generated [tallies, widest]; a shorter tally's last place is repeated."""
        rows = [(tally.slot, tally.size - 1) for tally in tallies]
        slots, last = to_device(np.ascontiguousarray(np.array(rows).T), self._device).unsqueeze(-1)
        width = max(tally.size for tally in tallies)
        places = torch.arange(width, device=self._device).minimum(last)
        return self._ids[slots, places], self._counts[slots, places]

    def _grow(self, num_slots: int, num_places: int) -> None:
        for name in ("_ids", "_counts"):
            old = getattr(self, name)
            new = old.new_zeros(num_slots, num_places)
            new[: old.shape[0], : old.shape[1]] = old
            setattr(self, name, new)


Bias = tuple[NDArray[np.int64], NDArray[np.float32]]


def bias_of(sampling: SamplingParams) -> Bias:
    """logit_bias as arrays of ids and values."""
    ids, values = zip(*sampling.logit_bias, strict=True)
    return np.array(ids, dtype=np.int64), np.array(values, dtype=np.float32)


def penalise(
    logits: torch.Tensor, rows: Sequence[int], params: Sequence[SamplingParams], table: Table, seen: Sequence[Tally]
) -> None:
    """Change `logits` [*, vocabulary] (float32) in place: row rows[i] by params[i] and its tally seen[i]."""
    chosen = [i for i, tally in enumerate(seen) if tally.size]
    if not chosen:
        return
    device = logits.device
    ids, counts = table.read([seen[i] for i in chosen])
    at = indices([rows[i] for i in chosen], device).unsqueeze(-1)
    factors = [(params[i].repetition_penalty, params[i].frequency_penalty, params[i].presence_penalty) for i in chosen]
    repetition, frequency, presence = to_device(np.array(factors, dtype=np.float32), device).unsqueeze(-1).unbind(1)
    values = logits[at, ids]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values - frequency * counts - presence * (counts > 0)
    # A large logit times a large penalty may overflow: it stays comparable.  Where a place is repeated, equal values
    # are written to the same spot.
    logits[at, ids] = values.clamp(-_LARGEST, _LARGEST)


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

"""Choosing tokens for a whole batch, each row by its own parameters.

Greedy rows pay for an argmax and nothing else.  A sampled row is decided by ONE number in [0, 1) that depends only on
its seed and on how many tokens it has generated, through the inverse of its cumulative distribution: the same seed
gives the same tokens whatever else is in the batch, and after a resume.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .step import SamplingParams

BAD_ROW = -1  # in place of a token id: the row's logits were not finite

_GREEDY_BELOW = 1e-5  # temperatures below this are greedy: dividing by them leaves one token anyway
_MASK = (1 << 64) - 1
_FIRST_WIDTH = 256  # candidates sorted at first; a row whose nucleus is larger is tried again with more


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row is sampled; `position` is the number of tokens generated before it, journal included."""

    sampling: SamplingParams
    position: int

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature < _GREEDY_BELOW or self.sampling.top_k == 1


def splitmix64(x: int) -> int:
    """One output of the SplitMix64 generator (Steele, Lea and Flood, 2014, "Fast splittable pseudorandom number
    generators") for the state x: a bijection of 64-bit numbers that mixes them well."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, for this seed at this position."""
    return (splitmix64(splitmix64(seed & _MASK) ^ position) >> 11) * 2.0**-53


def choose(logits: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    """Token ids [rows] for `logits` [rows, vocabulary]; BAD_ROW where a row has a NaN or an infinity."""
    tokens = logits.argmax(dim=-1)
    finite = torch.isfinite(logits).all(dim=-1)
    sampled = [i for i, draw in enumerate(draws) if not draw.greedy]
    if sampled:
        rows = torch.tensor(sampled, device=logits.device)
        clean = torch.nan_to_num(logits[rows].float(), nan=0.0)
        tokens[rows] = _sample(clean, [draws[i] for i in sampled])
    return torch.where(finite, tokens, BAD_ROW)


def logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of the probability of `tokens` [rows] under the unmodified distribution."""
    logits = logits.float()
    chosen = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return chosen - logits.logsumexp(dim=-1)


def _sample(logits: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    """Inverse-CDF over the filtered distribution, in the order of the vocabulary, in double precision."""
    temperatures = _column([d.sampling.temperature for d in draws], logits.device).float()
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperatures  # the best token is at 0
    kept = scaled >= _thresholds(scaled, draws)
    cumulative = scaled.masked_fill(~kept, float("-inf")).double().exp().cumsum(dim=-1)
    total = cumulative[:, -1:]
    targets = _column([uniform(d.sampling.seed, d.position) for d in draws], logits.device) * total
    # Rounding must not push a target to the total itself, beyond the last token.
    targets = torch.minimum(targets, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, targets, right=True).squeeze(1)


def _thresholds(scaled: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    """The smallest scaled logit that each row keeps [rows, 1]: top_k, then top_p of what is left, then min_p, as in
    transformers.  Tokens that tie with the last one kept are kept too, so no sort's order of ties matters."""
    floors = [math.log(d.sampling.min_p) if d.sampling.min_p else -math.inf for d in draws]
    thresholds = _column(floors, scaled.device).float()
    todo = [i for i, d in enumerate(draws) if d.sampling.top_k or d.sampling.top_p < 1]
    width = _FIRST_WIDTH
    while todo:
        rows = torch.tensor(todo, device=scaled.device)
        found, settled = _nucleus(scaled[rows], [draws[i].sampling for i in todo], width)
        thresholds[rows] = torch.where(settled, torch.maximum(thresholds[rows], found), thresholds[rows])
        todo = [i for i, done in zip(todo, settled.squeeze(1).tolist(), strict=True) if not done]
        width *= 8
    return thresholds


def _nucleus(scaled: torch.Tensor, params: list[SamplingParams], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The threshold of top_k and top_p from the `width` best candidates, and whether those were enough [rows, 1]."""
    vocab = scaled.shape[1]
    width = min(width, vocab)
    k = _column([min(p.top_k, vocab) or vocab for p in params], scaled.device)
    best = scaled.topk(width, dim=-1).values
    ranks = torch.arange(width, device=scaled.device)
    weights = best.double().exp().masked_fill(ranks >= k, 0.0)
    everything = scaled.double().exp().sum(dim=-1, keepdim=True)
    total = torch.where(k >= vocab, everything, weights.sum(dim=-1, keepdim=True))
    before = weights.cumsum(dim=-1) - weights
    kept = (before < _column([p.top_p for p in params], scaled.device) * total) & (ranks < k)
    count = kept.sum(dim=-1, keepdim=True).clamp(min=1)
    settled = (k <= width) | ((k >= vocab) & (count < width))
    return best.gather(1, count - 1), settled


def _column(values: Sequence[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device).unsqueeze(1)

"""Choosing tokens for a whole batch, each row by its own parameters.

Greedy rows pay for an argmax and nothing else.  A sampled row is decided by ONE number in [0, 1) that depends only on
its seed and on how many tokens it has generated, through the inverse of its cumulative distribution: the same seed
gives the same tokens whatever else is in the batch, and after a resume.
"""

import math
from collections.abc import Sequence

import torch

from hortator.producer.errors import BadRequest

from .draw import Draw
from .scores import Score, scores
from .steering import Steered, Steering
from .step import BAD_LOGITS, Fault, SamplingParams
from .structure import Grammars
from .transfer import column, indices

__all__ = ["BAD_ROW", "BAD_STRUCTURE", "PENDING", "Draw", "Sampler", "Score", "fault_of", "scores"]

# In place of a token id:
BAD_ROW = -1  # the row's logits were not finite
BAD_STRUCTURE = -2  # no output can be, or nobody can compile, what the request described
PENDING = -3  # its structure is still being compiled: compute the row again in the next step

_MASK = (1 << 64) - 1
_FIRST_WIDTH = 256  # candidates sorted at first; a row whose nucleus is larger is tried again with more


class Sampler:
    """Chooses on the first rank of the last stage; what it chose, negative numbers included, is all that other ranks
    need to know."""

    def __init__(self, grammars: Grammars | None = None) -> None:
        """Without `grammars`, rows with a structure fail."""
        self._steering = Steering(grammars)
        self._reasons: dict[int, str] = {}  # handle -> why it got BAD_STRUCTURE

    def choose(self, logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
        """Token ids [rows] for `logits` [rows, vocabulary], or one of the negative numbers above.

        The host waits for the device only if some row has top_p, or a top_k above 256, and no smaller top_k.
        """
        tokens = logits.argmax(dim=-1)
        # As sure as asking each, for both pass NaN on, and far cheaper.
        finite = torch.isfinite(logits.amax(dim=-1)) & torch.isfinite(logits.amin(dim=-1))
        special = [i for i, draw in enumerate(draws) if draw.steered or not draw.greedy]
        if special:
            rows = indices(special, logits.device)
            clean = torch.nan_to_num(logits[rows].float(), nan=0.0)
            tokens[rows] = self._choose(clean, [draws[i] for i in special])
        return torch.where(finite, tokens, BAD_ROW)

    def take_reasons(self) -> dict[int, str]:
        """By handle, why rows got BAD_STRUCTURE since the last call."""
        reasons, self._reasons = self._reasons, {}
        return reasons

    def _choose(self, logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
        """For rows that are sampled or steered, or both; `logits` are theirs to change."""
        steered = [i for i, draw in enumerate(draws) if draw.steered]
        outcome = self._steer(logits, draws, steered) if steered else Steered()
        sampled = [i for i, draw in enumerate(draws) if not draw.greedy]
        if len(sampled) == len(draws):
            tokens = _sample(logits, draws)
        else:
            tokens = logits.argmax(dim=-1)
            if sampled:
                rows = indices(sampled, logits.device)
                tokens[rows] = _sample(logits[rows], [draws[i] for i in sampled])
        for at, reason in outcome.failed:
            self._reasons[draws[steered[at]].handle] = reason
        for rows_at, mark in (([at for at, _ in outcome.failed], BAD_STRUCTURE), (outcome.pending, PENDING)):
            if rows_at:
                tokens.index_fill_(0, indices([steered[at] for at in rows_at], logits.device), mark)
        return tokens

    def _steer(self, logits: torch.Tensor, draws: Sequence[Draw], steered: Sequence[int]) -> Steered:
        if len(steered) == len(draws):
            return self._steering.steer(logits, draws)
        rows = indices(steered, logits.device)
        part = logits[rows]
        outcome = self._steering.steer(part, [draws[i] for i in steered])
        logits[rows] = part
        return outcome


def fault_of(handle: int, mark: int, reason: str | None, *, context: int) -> Fault:
    """What to say of a request that got BAD_ROW or BAD_STRUCTURE after `context` tokens."""
    if mark == BAD_STRUCTURE:
        return Fault(handle, BadRequest.code, reason or "structure: no output can follow it")
    return Fault(handle, BAD_LOGITS, f"the model's logits after token {context} are not finite")


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


def _sample(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Inverse-CDF over the filtered distribution, in the order of the vocabulary, in double precision.

    A row whose distribution is none (all impossible, or not finite) gets BAD_ROW.
    """
    temperatures = column([d.sampling.temperature for d in draws], logits.device).float()
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperatures  # the best token is at 0
    kept = scaled >= _thresholds(scaled, draws)
    cumulative = scaled.masked_fill(~kept, float("-inf")).double().exp().cumsum(dim=-1)
    total = cumulative[:, -1:]
    targets = column([uniform(d.sampling.seed, d.position) for d in draws], logits.device) * total
    # Rounding must not push a target to the total itself, beyond the last token.
    targets = torch.minimum(targets, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, targets, right=True)
    sound = (total > 0) & torch.isfinite(total) & (tokens < logits.shape[1])
    return torch.where(sound, tokens, BAD_ROW).squeeze(1)


def _thresholds(scaled: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """The smallest scaled logit that each row keeps [rows, 1]: top_k, then top_p of what is left, then min_p, as in
    transformers.  Tokens that tie with the last one kept are kept too, so no sort's order of ties matters."""
    floors = [math.log(d.sampling.min_p) if d.sampling.min_p else -math.inf for d in draws]
    thresholds = column(floors, scaled.device).float()
    todo = [i for i, d in enumerate(draws) if d.sampling.top_k or d.sampling.top_p < 1]
    width = _FIRST_WIDTH
    while todo:
        rows = indices(todo, scaled.device)
        found, settled = _nucleus(scaled[rows], [draws[i].sampling for i in todo], width)
        thresholds[rows] = torch.where(settled, torch.maximum(thresholds[rows], found), thresholds[rows])
        if all(0 < draws[i].sampling.top_k <= width for i in todo):
            break  # settled, as can be told without asking the device
        todo = [i for i, done in zip(todo, settled.squeeze(1).tolist(), strict=True) if not done]
        width *= 8
    return thresholds


def _nucleus(scaled: torch.Tensor, params: Sequence[SamplingParams], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The threshold of top_k and top_p from the `width` best candidates, and whether those were enough [rows, 1]."""
    vocab = scaled.shape[1]
    width = min(width, vocab)
    k = column([min(p.top_k, vocab) or vocab for p in params], scaled.device)
    best = scaled.topk(width, dim=-1).values
    ranks = torch.arange(width, device=scaled.device)
    weights = best.double().exp().masked_fill(ranks >= k, 0.0)
    everything = scaled.double().exp().sum(dim=-1, keepdim=True)
    total = torch.where(k >= vocab, everything, weights.sum(dim=-1, keepdim=True))
    before = weights.cumsum(dim=-1) - weights
    kept = (before < column([p.top_p for p in params], scaled.device) * total) & (ranks < k)
    count = kept.sum(dim=-1, keepdim=True).clamp(min=1)
    settled = (k <= width) | ((k >= vocab) & (count < width))
    return best.gather(1, count - 1), settled

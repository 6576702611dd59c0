"""Log-probabilities: what the model itself thought of the chosen token and of the likeliest ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .draw import Draw
from .transfer import indices


@dataclass(frozen=True, slots=True)
class Score:
    """Natural logarithms of probabilities under the unmodified distribution; `top`: token ids with theirs, the
    likeliest first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def scores(logits: torch.Tensor, tokens: torch.Tensor, draws: Sequence[Draw]) -> list[Score | None]:
    """One for each row that asks for it and has a token.  `tokens` [rows] as chosen from `logits` [rows, vocabulary].

    Waits for the device, if any row asks.
    """
    found: list[Score | None] = [None] * len(draws)
    asking = [i for i, draw in enumerate(draws) if draw.sampling.logprobs]
    if not asking:
        return found
    rows = indices(asking, logits.device)
    part = logits[rows].float()
    normaliser = part.logsumexp(dim=-1, keepdim=True)
    chosen = part.gather(1, tokens[rows].clamp(min=0).unsqueeze(1)) - normaliser
    width = min(max(draws[i].sampling.top_logprobs for i in asking), part.shape[1])
    best = part.topk(width, dim=-1)
    ids, values = best.indices.tolist(), (best.values - normaliser).tolist()
    for at, (row, logprob) in enumerate(zip(asking, chosen.squeeze(1).tolist(), strict=True)):
        count = draws[row].sampling.top_logprobs
        found[row] = Score(logprob, tuple(zip(ids[at][:count], values[at][:count], strict=True)))
    return found

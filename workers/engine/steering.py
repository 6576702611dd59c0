"""What requests change in their logits before a token is drawn: penalties, biases, min_tokens, structures.

In this order, so that nothing can bring back what a structure excludes.  Rows that ask for none of it never come here.
"""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass

import llguidance
import numpy as np
import torch
from numpy.typing import NDArray

from hortator.producer.errors import BadRequest

from .draw import Draw
from .penalties import Bias, News, Table, Tally, add_biases, bias_of, forbid, penalise
from .structure import UNWRITABLE, Bits, Grammars, Matcher, without
from .transfer import indices, to_device

PATIENCE_S = 0.005  # a step waits this long for structures that are still being compiled


@dataclass(slots=True, eq=False)
class Past:
    """What is remembered of one sequence because counting it again each step would be dear."""

    bias: Bias | None
    ends: NDArray[np.int64]  # end-of-sequence and stop tokens within the vocabulary
    tally: Tally | None = None
    matcher: "Matcher | Future[llguidance.LLMatcher] | None" = None


@dataclass(frozen=True, slots=True)
class Steered:
    """Rows that get no token in this step: those to try again, and those that never will, with the reason."""

    pending: tuple[int, ...] = ()
    failed: tuple[tuple[int, str], ...] = ()


class Steering:
    """Remembers the sequences of lately; one that was forgotten is counted again from its tokens."""

    def __init__(self, grammars: Grammars | None) -> None:
        self._grammars = grammars
        self._table: Table | None = None
        self._pasts: OrderedDict[int, Past] = OrderedDict()
        self._room = 16

    def steer(self, logits: torch.Tensor, draws: Sequence[Draw]) -> Steered:
        """Change `logits` [draws, vocabulary] (float32, contiguous) in place."""
        pasts = [self._past(draw, logits.shape[1]) for draw in draws]
        self._forget(len(draws))
        self._penalise(logits, draws, pasts)
        biased = [(row, past.bias) for row, past in enumerate(pasts) if past.bias is not None]
        if biased:
            add_biases(logits, [row for row, _ in biased], [bias for _, bias in biased])
        young = [i for i, d in enumerate(draws) if d.young and d.sampling.structure is None and len(pasts[i].ends)]
        if young:
            forbid(logits, young, [pasts[i].ends for i in young])
        structured = [i for i, draw in enumerate(draws) if draw.sampling.structure is not None]
        return self._structure(logits, structured, draws, pasts) if structured else Steered()

    def _past(self, draw: Draw, vocab_size: int) -> Past:
        past = self._pasts.get(draw.handle)
        if past is None:
            sampling = draw.sampling
            ends = np.array(sorted(t for t in draw.stops if t < vocab_size), dtype=np.int64)
            past = self._pasts[draw.handle] = Past(bias_of(sampling) if sampling.logit_bias else None, ends)
        self._pasts.move_to_end(draw.handle)
        return past

    def _forget(self, num_rows: int) -> None:
        self._room = max(self._room, 2 * num_rows)
        while len(self._pasts) > self._room:
            _, past = self._pasts.popitem(last=False)
            if past.tally is not None and self._table is not None:
                self._table.close(past.tally)

    def _penalise(self, logits: torch.Tensor, draws: Sequence[Draw], pasts: Sequence[Past]) -> None:
        rows = [row for row, draw in enumerate(draws) if draw.sampling.penalises]
        if not rows:
            return
        table = self._table = self._table or Table(logits.device)
        news, tallies = News(), []
        for row in rows:
            draw, past = draws[row], pasts[row]
            past.tally = past.tally or table.open(with_prompt=draw.sampling.repetition_penalty != 1)
            past.tally.catch_up(draw.tokens, draw.num_prompt, news)
            tallies.append(past.tally)
        table.add(news, tallies)
        penalise(logits, rows, [draws[row].sampling for row in rows], table, tallies)

    def _structure(
        self, logits: torch.Tensor, rows: Sequence[int], draws: Sequence[Draw], pasts: Sequence[Past]
    ) -> Steered:
        if self._grammars is None:
            reason = "structure: this model names no end-of-sequence token, so no output could end"
            return Steered(failed=tuple((row, reason) for row in rows))
        failed = self._begin(rows, draws, pasts, self._grammars)
        dead = set[int]()
        ready = [(row, m) for row in rows if isinstance(m := pasts[row].matcher, Matcher)]
        for row, matcher in ready:
            matcher.catch_up(draws[row].tokens, draws[row].num_prompt)
        if ready:
            bits = self._grammars.allowed([matcher for _, matcher in ready])
            dead.update(row for at, (row, _) in enumerate(ready) if not bits[at].any())
            for at, (row, _) in enumerate(ready):
                if draws[row].young:
                    bits[at] = without(bits[at], pasts[row].ends.tolist())
            allow_only(logits, [row for row, _ in ready], bits)
        problems = {row: matcher.problem or (UNWRITABLE if row in dead else None) for row, matcher in ready}
        failed |= {row: f"structure: {problem}" for row, problem in problems.items() if problem}
        pending = tuple(row for row in rows if pasts[row].matcher is None or isinstance(pasts[row].matcher, Future))
        return Steered(tuple(row for row in pending if row not in failed), tuple(failed.items()))

    def _begin(
        self, rows: Sequence[int], draws: Sequence[Draw], pasts: Sequence[Past], grammars: Grammars
    ) -> dict[int, str]:
        """Give each row its matcher, if its structure is compiled; what is wrong with those that have none."""
        compiling: dict[int, Future[llguidance.LLMatcher]] = {}
        for row in rows:
            past, structure = pasts[row], draws[row].sampling.structure
            assert structure is not None
            if past.matcher is None:
                past.matcher = grammars.compile(structure)
            if isinstance(past.matcher, Future):
                compiling[row] = past.matcher
        failed: dict[int, str] = {}
        done = wait(compiling.values(), timeout=PATIENCE_S).done if compiling else ()
        for row, future in compiling.items():
            if future not in done:
                continue
            try:
                pasts[row].matcher = Matcher(future.result().deep_copy())
            except BadRequest as error:
                failed[row] = error.message
        return failed


def allow_only(logits: torch.Tensor, rows: Sequence[int], bits: Bits) -> None:
    """Make impossible, in place, what has no bit in `bits` [rows, vocabulary / 32]."""
    words = to_device(bits, logits.device)
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = ((words.unsqueeze(-1) >> shifts) & 1).bool().view(len(rows), -1)[:, : logits.shape[1]]
    places = indices(rows, logits.device)
    logits[places] = logits[places].masked_fill(~allowed, float("-inf"))

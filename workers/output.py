"""What one job has generated: tokens, their text up to a stop string, and the part that the journal lacks."""

from collections.abc import Sequence
from typing import TypeVar

from hortator.producer.schema import Chunk, FinishReason

from .text import Decoder

Top = tuple[tuple[int, float], ...]
T = TypeVar("T")


class Output:
    """Grows token by token, and never takes back text that it has given to the journal.

    Text that may be the beginning of a stop string is held back until it is clear.  The token that completes a stop
    string is the last one; the text ends before the stop string.  Tokens of `ends` end the output and have no text.
    The text of the first `min_tokens` tokens is not searched for stop strings.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        ends: frozenset[int] = frozenset(),
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        journal: Sequence[Chunk] = (),
        logprobs: bool = False,
        top_logprobs: bool = False,
    ) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[float] | None = [] if logprobs else None
        self.top_logprobs: list[Top] | None = [] if top_logprobs else None
        self.stopped = False
        self._decoder = decoder
        self._ends = ends
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._undecoded: list[int] = []
        self._held = ""
        self._safe: list[str] = []  # pieces of text that nothing can change any more
        self._num_journalled = 0
        self._unsent: list[str] = []
        self._replay(journal)

    @property
    def text(self) -> str:
        """Everything that is certain; after `finish`, everything."""
        self._decode()
        return "".join(self._safe)

    def complete(self, *, max_tokens: int) -> FinishReason | None:
        """Why this is a whole output already, or None: more tokens belong to it."""
        if self.stopped or (self.token_ids and self.token_ids[-1] in self._ends):
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.token_ids) >= max_tokens else None

    def feed(self, token_ids: Sequence[int], logprobs: Sequence[float | None] = (), tops: Sequence[Top] = ()) -> bool:
        """Take tokens, up to the one that completes a stop string; True when one does."""
        num = len(token_ids)
        if self._stop and num > 1:
            ones = (slice(at, at + 1) for at in range(num))
            return any(self.feed(token_ids[one], logprobs[one], tops[one]) for one in ones)
        self.token_ids += token_ids
        if self.logprobs is not None:
            self.logprobs += [logprob or 0.0 for logprob in _first(num, logprobs, 0.0)]
        if self.top_logprobs is not None:
            self.top_logprobs += _first(num, tops, ())
        self._undecoded += [token_id for token_id in token_ids if token_id not in self._ends]
        if self._stop:
            self._decode()
        return self.stopped

    def finish(self) -> None:
        """No token follows: what was held back is text after all."""
        self._decode()
        if not self.stopped:
            rest = self._decoder.flush()
            if rest:
                self._add(rest)
        if self._held:
            self._keep(self._held)
            self._held = ""

    def take(self) -> Chunk | None:
        """What came since the last call, for the journal; None without a new token."""
        start = self._num_journalled
        if start == len(self.token_ids):
            return None
        self._decode()
        text = "".join(self._unsent)
        self._num_journalled = len(self.token_ids)
        self._unsent = []
        return Chunk.model_construct(
            index=start,
            token_ids=tuple(self.token_ids[start:]),
            text=text,
            logprobs=None if self.logprobs is None else tuple(self.logprobs[start:]),
            top_logprobs=None if self.top_logprobs is None else tuple(self.top_logprobs[start:]),
        )

    def _decode(self) -> None:
        """Only a stop string needs each token's text at once; else it can wait for the journal."""
        if self._undecoded:
            piece = self._decoder.feed(*self._undecoded)
            self._undecoded.clear()
            if piece:
                self._add(piece)

    def _add(self, piece: str) -> None:
        if not self._stop or len(self.token_ids) <= self._min_tokens:
            self._keep(piece)
            return
        text = self._held + piece
        cut = min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=-1)
        if cut >= 0:
            self.stopped = True
            safe, self._held = text[:cut], ""
        else:
            unclear = self._num_unclear(text)
            safe, self._held = text[: len(text) - unclear], text[len(text) - unclear :]
        if safe:
            self._keep(safe)

    def _keep(self, text: str) -> None:
        self._safe.append(text)
        self._unsent.append(text)

    def _num_unclear(self, text: str) -> int:
        """Length of the longest end of text with which a stop string begins."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        for length in range(longest, 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0

    def _replay(self, journal: Sequence[Chunk]) -> None:
        """Come to the state of the attempt that wrote this journal; its text counts as given out."""
        for chunk in journal:
            self.feed(chunk.token_ids, chunk.logprobs or (), chunk.top_logprobs or ())
        self._decode()
        self._num_journalled = len(self.token_ids)
        self._unsent.clear()  # the same tokens give the same text, and the same end of it was held back


def _first(num: int, values: Sequence[T], missing: T) -> list[T]:
    """The first of them, or what stands for those that are missing."""
    return [*values[:num], *[missing] * (num - len(values))]

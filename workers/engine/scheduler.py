"""Which tokens of which requests the next step computes.

Dynamic SplitFuse (Holmes et al., 2024, DeepSpeed-FastGen): every running decode first, one token each, then prompt
chunks until the step's token budget is spent.  Pure Python and deterministic: ranks that make the same calls hold the
same state, so a step plan carries inputs and never decisions.

Why nothing deadlocks: `running` is always in order of arrival; a sequence that needs a block preempts only younger
ones (or itself); the oldest one alone fits the pool, because admission.py refused everything larger.
"""

from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b

from .blocks import BlockPool
from .step import Finish, Request


@dataclass(eq=False, slots=True)
class Sequence:
    """One request while it waits or runs.  `tokens` is prompt + journal + what was accepted here."""

    request: Request
    limit: int  # len(tokens) at which it ends
    stops: frozenset[int]
    tokens: "array[int]"
    num_computed: int = 0  # tokens whose keys and values are in the cache
    blocks: "array[int]" = field(default_factory=lambda: array("i"))

    @property
    def handle(self) -> int:
        return self.request.handle

    @property
    def num_generated(self) -> int:
        """Accepted tokens, the journal of earlier attempts included."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def remaining(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def decoding(self) -> bool:
        """All but the newest token is in the cache."""
        return self.num_computed > 0 and self.remaining == 1

    def finish(self) -> Finish | None:
        """Why the sequence has ended, judged by its last token and its length."""
        if self.num_generated and self.tokens[-1] in self.stops:
            return Finish.STOP
        return Finish.LENGTH if len(self.tokens) >= self.limit else None


@dataclass(frozen=True, slots=True)
class Row:
    """`count` tokens of one sequence, from position `start`, in one step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def context(self) -> int:
        """Tokens in the cache once the row is computed."""
        return self.start + self.count

    @property
    def samples(self) -> bool:
        """The row reaches the sequence's end, so the next token is chosen from it."""
        return self.context == len(self.sequence.tokens)

    @property
    def tokens(self) -> "array[int]":
        return self.sequence.tokens[self.start : self.context]


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step computes.  Pipeline micro-batches (issue 3) would be several of these from one plan."""

    rows: tuple[Row, ...] = ()
    fresh_blocks: tuple[int, ...] = ()  # taken in this step: their former content must not be seen

    @property
    def num_tokens(self) -> int:
        return sum(row.count for row in self.rows)

    def digest(self, before: int) -> int:
        """63 bits (so that it fits int64) over everything derived, chained on the digest of the step before: ranks
        that ever diverged never agree again."""
        state = blake2b(before.to_bytes(8, "little"), digest_size=8)
        state.update(array("q", [x for r in self.rows for x in (r.sequence.handle, r.start, r.count)]).tobytes())
        for row in self.rows:
            state.update(row.tokens.tobytes())
        state.update(array("q", self.fresh_blocks).tobytes())
        return int.from_bytes(state.digest(), "little") >> 1


class Scheduler:
    """Continuous batching over a block pool.

    Decodes never exceed the token budget: whoever decodes had a row in the step before, as all other decodes did.
    """

    def __init__(self, pool: BlockPool, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.pool = pool
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.preemptions = 0
        self._live: dict[int, Sequence] = {}
        self._fresh: list[int] = []

    def __contains__(self, handle: int) -> bool:
        return handle in self._live

    @property
    def idle(self) -> bool:
        return not self._live

    def add(self, request: Request, *, limit: int, stops: frozenset[int]) -> Finish | None:
        """Queue a request that admission has let pass; returns why it needs no step, if its journal is complete."""
        tokens = array("i", request.prompt + request.generated)
        sequence = Sequence(request, limit, stops, tokens)
        if request.generated and (finish := sequence.finish()):
            return finish
        self._live[request.handle] = sequence
        self.waiting.append(sequence)
        return None

    def drop(self, handle: int) -> None:
        """Forget a request, whatever it does; an unknown handle has just ended by itself."""
        sequence = self._live.pop(handle, None)
        if sequence is None:
            return
        if sequence.blocks:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> Batch:
        """The next step's rows: decodes in order of arrival, then prompt chunks, then admissions."""
        self._fresh = []
        rows = [Row(s, s.num_computed, 1) for s in self._decodes()]
        budget = self.max_num_batched_tokens - len(rows)
        prefills = self._prefills()
        while budget and (sequence := next(prefills, None)):
            rows.append(Row(sequence, sequence.num_computed, min(budget, sequence.remaining)))
            budget -= rows[-1].count
        return Batch(tuple(rows), tuple(self._fresh))

    def advance(self, row: Row, token: int | None) -> Finish | None:
        """The row was computed; `token` is what was chosen if it samples.  Returns why the request ended, if it did."""
        sequence = row.sequence
        sequence.num_computed = row.context
        if token is None:
            return None
        sequence.tokens.append(token)
        finish = sequence.finish()
        if finish is not None:
            self.drop(sequence.handle)
        return finish

    def _decodes(self) -> Iterator[Sequence]:
        for sequence in [s for s in self.running if s.decoding]:
            if sequence.blocks and self._has_room(sequence):
                yield sequence

    def _prefills(self) -> Iterator[Sequence]:
        """Running sequences with more than a token to compute, then waiting ones as they are admitted."""
        yield from [s for s in self.running if not s.decoding]
        while self.waiting and self._may_admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            self._extend(sequence, self.pool.blocks_for(len(sequence.tokens)))
            self.running.append(sequence)
            yield sequence

    def _may_admit(self, sequence: Sequence) -> bool:
        """Room for all its tokens and the next one, and then a block for each that runs: otherwise one that was
        preempted would come back at once and be preempted again."""
        if len(self.running) >= self.max_num_seqs:
            return False
        return self.pool.blocks_for(len(sequence.tokens) + 1) + len(self.running) <= self.pool.num_free

    def _has_room(self, sequence: Sequence) -> bool:
        """Make sure that the newest token has a slot, preempting the youngest; False if that was the sequence."""
        while len(sequence.tokens) > len(sequence.blocks) * self.pool.block_size:
            if self.pool.num_free:
                self._extend(sequence, 1)
            elif self._preempt_youngest() is sequence:
                return False
        return True

    def _preempt_youngest(self) -> Sequence:
        """Take the youngest one's blocks; it keeps its tokens and is prefilled again, before all that wait."""
        victim = self.running.pop()
        self._release(victim)
        self.waiting.appendleft(victim)
        self.preemptions += 1
        return victim

    def _extend(self, sequence: Sequence, count: int) -> None:
        taken = self.pool.take(count)
        sequence.blocks.extend(taken)
        self._fresh.extend(taken)

    def _release(self, sequence: Sequence) -> None:
        self.pool.give_back(sequence.blocks.tolist())
        sequence.blocks = array("i")
        sequence.num_computed = 0

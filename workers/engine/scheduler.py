"""Which tokens of which requests the next step computes.

Dynamic SplitFuse (Holmes et al., 2024, DeepSpeed-FastGen): every running decode first, one token each, then prompt
chunks until the step's token budget is spent.  Pure Python and deterministic: ranks that make the same calls hold the
same state, so a step plan carries inputs and never decisions.

Steps may be in flight: `schedule` is called again before `accept` has told what the step before has chosen.  Ranks and
devices run steps in order, so what a step writes is there for the next one.  A decode whose newest token is not known
yet is scheduled all the same where the device can fill it in (`speculate`), and else sits out until it is.

Why nothing deadlocks: `running` is ordered by priority class and admission; a sequence that needs a block preempts only
those behind it (or itself); the first one alone fits the pool, because admission.py refused everything larger.
"""

from array import array
from bisect import insort
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b

from .blocks import BlockPool, Prefix, prefix_of
from .lines import CLASS_WEIGHTS, Lines
from .step import Finish, Request

RETURN_SPARE = 4
"""Free blocks for each that runs, before one that was preempted comes back: it would be preempted again in a few steps,
and all that it has would be computed again each time."""


@dataclass(eq=False)
class Sequence:
    """One request while it waits or runs.  `tokens` is prompt + journal + what was accepted here."""

    request: Request
    limit: int  # len(tokens) at which it ends
    stops: frozenset[int]
    tokens: "array[int]"
    block_size: int = 16
    num_computed: int = 0  # tokens whose keys and values are in the cache once the steps in flight are done
    num_pending: int = 0  # tokens that steps in flight will choose
    num_published: int = 0  # blocks, from the first
    blocks: "array[int]" = field(default_factory=lambda: array("i"))
    ended: bool = False
    overtaken: int = 0
    rank: tuple[int, int] = (0, 0)  # among the running: priority class, order of admission
    _prefixes: list[Prefix] = field(default_factory=list)

    @property
    def handle(self) -> int:
        return self.request.handle

    @cached_property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @cached_property
    def plain(self) -> bool:
        """The likeliest token, with nothing said about it, is all that is wanted of every step."""
        p = self.request.sampling
        return p.greedy and not (p.needs_history or p.logit_bias or p.min_tokens or p.logprobs)

    @property
    def num_generated(self) -> int:
        """Accepted tokens, the journal of earlier attempts included."""
        return len(self.tokens) - self.num_prompt

    @property
    def length(self) -> int:
        """Tokens, those in flight included."""
        return len(self.tokens) + self.num_pending

    @property
    def remaining(self) -> int:
        return self.length - self.num_computed

    @property
    def decoding(self) -> bool:
        """All but the newest token is in the cache."""
        return self.num_computed > 0 and self.remaining == 1

    def prefixes(self, num_tokens: int) -> list[Prefix]:
        """The names of the full blocks among the first `num_tokens` tokens, which must be known."""
        size = self.block_size
        for index in range(len(self._prefixes), num_tokens // size):
            before = self._prefixes[-1] if index else self.request.salt.to_bytes(8, "little", signed=True)
            self._prefixes.append(prefix_of(before, self.tokens[index * size : (index + 1) * size].tobytes()))
        return self._prefixes[: num_tokens // size]

    def finish(self) -> Finish | None:
        """Why the sequence has ended, judged by its last token and its length."""
        if len(self.tokens) > self.num_prompt and self.tokens[-1] in self.stops:
            return Finish.STOP
        return Finish.LENGTH if len(self.tokens) >= self.limit else None


@dataclass(frozen=True, slots=True)
class Row:
    """`count` tokens of one sequence, from position `start`, in one step."""

    sequence: Sequence
    start: int
    count: int
    samples: bool = False  # it reaches the sequence's end, so the next token is chosen from it
    position: int = 0  # tokens generated before the one that is chosen, those in flight included
    pending: bool = False  # its only token was chosen by the step before, and is known to the device alone

    @property
    def context(self) -> int:
        """Tokens in the cache once the row is computed."""
        return self.start + self.count

    @property
    def tokens(self) -> "array[int]":
        """What is fed, as far as it is known: nothing of a pending row until its token is accepted."""
        return self.sequence.tokens[self.start : self.context]


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step computes."""

    rows: tuple[Row, ...] = ()
    fresh_blocks: tuple[int, ...] = ()  # taken in this step: their former content must not be seen
    shared_blocks: tuple[int, ...] = ()  # found in the prefix cache by those who were admitted in this step

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
        state.update(array("q", self.fresh_blocks + self.shared_blocks).tobytes())
        return int.from_bytes(state.digest(), "little") >> 1


class Scheduler:
    """Continuous batching over a block pool.

    `waves`: how many steps are in flight at once because pipeline stages work on different ones; the running sequences
    are spread over as many.  `speculate`: the device knows the newest token of a decode before this code does.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        waves: int = 1,
        speculate: bool = False,
        prefix_cache: bool = True,
    ) -> None:
        self.pool = pool
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.num_prompt_tokens = 0  # of everything admitted
        self.num_cached_tokens = 0  # of these, found in the prefix cache
        self._waves = waves
        self._speculate = speculate
        self._prefix_cache = prefix_cache
        self._live: dict[int, Sequence] = {}
        self._lines = Lines(lambda sequence: len(self._cached(sequence)))
        self._short_since: dict[int, int] = {}  # class -> admissions before it was its turn and it did not fit
        self._num_admitted = 0
        self._fresh: list[int] = []
        self._shared: list[int] = []

    def __contains__(self, handle: int) -> bool:
        return handle in self._live

    @property
    def idle(self) -> bool:
        return not self._live

    @property
    def waiting(self) -> list[Sequence]:
        """In no particular order beyond: preempted ones first, then by class and arrival."""
        return list(self._lines)

    @property
    def num_waiting(self) -> int:
        return len(self._live) - len(self.running)

    def add(self, request: Request, *, limit: int, stops: frozenset[int]) -> Finish | None:
        """Queue a request that admission has let pass; returns why it needs no step, if its journal is complete."""
        tokens = array("i", request.prompt + request.generated)
        sequence = Sequence(request, limit, stops, tokens, self.pool.block_size)
        if request.generated and (finish := sequence.finish()):
            return finish
        self._live[request.handle] = sequence
        self._lines.join(sequence)
        return None

    def drop(self, handle: int) -> None:
        """Forget a request, whatever it does; an unknown handle has just ended by itself."""
        sequence = self._live.pop(handle, None)
        if sequence is None:
            return
        sequence.ended = True
        if sequence.blocks:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self._lines.leave(sequence)
            if self._lines.is_empty(sequence.request.priority):
                self._short_since.pop(sequence.request.priority, None)

    def retract(self, handle: int) -> None:
        """What this request has computed is not fit to be read by others."""
        if sequence := self._live.get(handle):
            self.pool.retract(sequence.blocks)

    def schedule(self) -> Batch:
        """The next step's rows: decodes first, then prompt chunks, then admissions."""
        self._fresh, self._shared = [], []
        budget = self.max_num_batched_tokens
        rows = [self._row(sequence, 1) for sequence in self._decodes(budget)]
        budget -= len(rows)
        prefills = self._prefills()
        while budget and (sequence := next(prefills, None)):
            rows.append(self._row(sequence, min(budget, sequence.remaining)))
            budget -= rows[-1].count
        return Batch(tuple(rows), tuple(self._fresh), tuple(self._shared))

    def accept(self, row: Row, token: int) -> Finish | None:
        """`token` is what was chosen from a row that samples.  Returns why the request ended, if it did; tokens of
        requests that had ended before are nobody's."""
        sequence = row.sequence
        sequence.num_pending -= 1
        if sequence.ended:
            return None
        sequence.tokens.append(token)
        finish = sequence.finish()
        if finish is not None:
            self.drop(sequence.handle)
        return finish

    def again(self, row: Row) -> None:
        """Nothing could be chosen from a row that samples yet: it is computed again.  No later row of its sequence is
        in flight, because such sequences sit out."""
        sequence = row.sequence
        sequence.num_pending -= 1
        if sequence.blocks:
            sequence.num_computed -= 1

    def recall(self, row: Row) -> None:
        """A row that was scheduled is not computed after all, nor may its sequence keep the blocks that it has: it is
        prefilled again, before all that wait.  No later row of it is in flight."""
        sequence = row.sequence
        sequence.num_pending -= row.samples
        self.pool.retract(sequence.blocks)
        self.running.remove(sequence)
        self._release(sequence)
        self._lines.come_back(sequence, first=False)

    def _row(self, sequence: Sequence, count: int) -> Row:
        """Count the row as computed: whatever is scheduled later runs later."""
        start = sequence.num_computed
        pending = start >= len(sequence.tokens)
        samples = start + count == sequence.length
        row = Row(sequence, start, count, samples, sequence.length - sequence.num_prompt, pending)
        sequence.num_computed += count
        sequence.num_pending += samples
        self._publish(sequence)
        return row

    def _publish(self, sequence: Sequence) -> None:
        if not self._prefix_cache:
            return
        num_known = min(sequence.num_computed, len(sequence.tokens))
        num_full = num_known // sequence.block_size
        if num_full > sequence.num_published:
            prefixes = sequence.prefixes(num_known)
            for index in range(sequence.num_published, num_full):
                self.pool.publish(sequence.blocks[index], prefixes[index])
            sequence.num_published = num_full

    def _decodes(self, budget: int) -> Iterator[Sequence]:
        """At most the budget, and no more than this wave's share, so that every stage always has work."""
        left = min(budget, -(-len(self.running) // self._waves))
        for sequence in [s for s in self.running if s.decoding and not self._sits_out(s)]:
            if not left:
                return
            if sequence.blocks and self._has_room(sequence):
                left -= 1
                yield sequence

    def _sits_out(self, sequence: Sequence) -> bool:
        """The newest token is in flight, and matters for more than the layers; or is the last one."""
        if not sequence.num_pending:
            return False
        return not self._speculate or sequence.request.sampling.needs_history or sequence.length >= sequence.limit

    def _prefills(self) -> Iterator[Sequence]:
        """Running sequences with more than a token to compute, then waiting ones as they are admitted."""
        yield from [s for s in self.running if s.remaining and not s.decoding and not s.num_pending]
        while (sequence := self._admit_next()) is not None:
            yield sequence

    def _admit_next(self) -> Sequence | None:
        """Who does not fit bars its own class and those below it; everybody, once those above who went past it are all
        that it waits for."""
        if len(self.running) >= self.max_num_seqs:
            return None
        barred = len(CLASS_WEIGHTS)
        while (chosen := self._lines.next_class(above=barred)) is not None:
            sequence = self._lines.next_in(chosen)
            if not sequence.num_pending and self._fits(sequence):
                self._admit(sequence)
                return sequence
            since = self._short_since.setdefault(chosen, self._num_admitted)
            past = [s for s in self.running if s.rank[0] < chosen and s.rank[1] > since]
            if (past or sequence.num_pending) and self._fits(sequence, without=past):
                return None
            barred = chosen
        return None

    def _cached(self, sequence: Sequence) -> list[int]:
        """Blocks of its prefix that need not be computed; at least its last token must be."""
        if not self._prefix_cache:
            return []
        return self.pool.find(sequence.prefixes(len(sequence.tokens) - 1))

    def _fits(self, sequence: Sequence, *, without: Collection[Sequence] = ()) -> bool:
        """There is room for all its tokens and the next one, and then some blocks for each that runs; or would be, if
        some did not run."""
        pool, cached = self.pool, self._cached(sequence)
        spare_each = RETURN_SPARE if self._lines.returns(sequence) else 1
        wanted = pool.blocks_for(len(sequence.tokens) + 1) - len(cached)
        wanted += spare_each * (len(self.running) - len(without))
        return wanted <= pool.num_free - pool.num_unused(cached) + sum(len(s.blocks) for s in without)

    def _admit(self, sequence: Sequence) -> None:
        """It is its turn, and it fits."""
        pool, chosen = self.pool, sequence.request.priority
        self._lines.take_turn(sequence)
        self._short_since.pop(chosen, None)
        cached = self._cached(sequence)
        pool.share(cached)
        self._shared += cached
        sequence.blocks.extend(cached)
        sequence.num_published = len(cached)
        sequence.num_computed = len(cached) * pool.block_size
        self._extend(sequence, pool.blocks_for(len(sequence.tokens)) - len(cached))
        self.num_prompt_tokens += len(sequence.tokens)
        self.num_cached_tokens += sequence.num_computed
        self._num_admitted += 1
        sequence.rank = (chosen, self._num_admitted)
        insort(self.running, sequence, key=lambda s: s.rank)

    def _has_room(self, sequence: Sequence) -> bool:
        """Make sure that the newest token has a slot, preempting the last; False if that was the sequence."""
        while sequence.length > len(sequence.blocks) * self.pool.block_size:
            if self.pool.num_free:
                self._extend(sequence, 1)
            elif self._preempt_last() is sequence:
                return False
        return True

    def _preempt_last(self) -> Sequence:
        """Take its blocks; it keeps its tokens and is prefilled again, before all that wait."""
        victim = self.running.pop()
        self._release(victim)
        self._lines.come_back(victim, first=True)
        self.preemptions += 1
        return victim

    def _extend(self, sequence: Sequence, count: int) -> None:
        taken = self.pool.take(count)
        sequence.blocks.extend(taken)
        self._fresh.extend(taken)

    def _release(self, sequence: Sequence) -> None:
        self.pool.give_back(sequence.blocks.tolist())
        sequence.blocks = array("i")
        sequence.num_computed = sequence.num_published = 0

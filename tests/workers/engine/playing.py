"""Plays a workload's phases on an engine, on the leader and on its peers, and keeps the engine's books under watch."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from hortator.workers.engine.engine import PagedEngine
from hortator.workers.engine.step import Request, StepOutput
from hortator.workers.lockstep import Channel, Follower, Inbox, encode_park, encode_plan
from tests.workers.engine.workloads import PER_PHASE, RESUMED, Entry, Workload

MOST_STEPS = 30_000


@dataclass
class Log:
    """What an engine said in one phase, by handle."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)  # each token's, and those of the likeliest
    finished: dict[int, str] = field(default_factory=dict)
    faults: dict[int, tuple[str, str]] = field(default_factory=dict)
    digests: list[int] = field(default_factory=list)
    preemptions: int = 0

    @property
    def seen_by_all(self) -> object:
        """The same on every rank; faults' reasons and log-probabilities are the leader's."""
        return self.tokens, self.finished, self.faults.keys(), self.digests

    def ended(self, handle: int) -> bool:
        """By itself."""
        return handle in self.finished or handle in self.faults

    def end(self, handle: int) -> object:
        """How."""
        return self.finished.get(handle), self.faults.get(handle)

    def note(self, output: StepOutput) -> None:
        for token in output.tokens:
            assert not self.ended(token.handle), f"{token} after the end"
            self.tokens.setdefault(token.handle, []).append(token.token_id)
            if token.logprob is not None:
                self.logprobs.setdefault(token.handle, []).extend([token.logprob, *(p for _, p in token.top)])
        for handle, finish in output.finished:
            assert not self.ended(handle), f"{handle} ended twice"
            self.finished[handle] = finish.value
        for fault in output.faults:
            assert not self.ended(fault.handle), f"{fault} of one that had ended"
            self.faults[fault.handle] = (fault.code, fault.message)


def audit(engine: PagedEngine) -> None:
    """The books of scheduler and pool agree."""
    scheduler, pool = engine._scheduler, engine._scheduler.pool
    refs = Counter(block for sequence in scheduler.running for block in sequence.blocks)
    assert pool._refs == [refs[block] for block in range(pool.num_blocks)], "references"
    free = [*pool._blank, *pool._unused]
    assert sorted(free) == [block for block in range(pool.num_blocks) if not refs[block]], "free blocks"
    assert {block: name for name, block in pool._found.items()} == pool._name, "names"
    live = [sequence.handle for sequence in (*scheduler.running, *scheduler.waiting)]
    assert sorted(live) == sorted(scheduler._live), "live requests"
    assert len(scheduler.running) <= scheduler.max_num_seqs
    assert engine._batch.num_tokens <= scheduler.max_num_batched_tokens
    for sequence in scheduler.running:
        assert len(sequence.blocks) * pool.block_size >= sequence.num_computed, "room"


def audit_end(engine: PagedEngine) -> None:
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, stats.total_blocks), stats


class Script:
    """What the clients of one phase do, step by step."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = {entry.request.handle: entry for entry in entries}
        self._cancelled: set[int] = set()
        self._last = max((max(e.arrives, e.cancelled_at or 0) for e in entries), default=0)

    def more(self, step: int) -> bool:
        return step <= self._last

    def arrivals(self, step: int) -> list[Request]:
        return [entry.request for entry in self._entries.values() if entry.arrives == step]

    def cancels(self, step: int, log: Log) -> Iterator[int]:
        for handle, entry in self._entries.items():
            if handle not in self._cancelled and self._ends(entry, step, log.tokens.get(handle, [])):
                self._cancelled.add(handle)
                yield handle

    def _ends(self, entry: Entry, step: int, tokens: list[int]) -> bool:
        if entry.stop and holds(tokens, entry.stop):
            return True
        return step == entry.cancelled_at or (
            entry.cancelled_after is not None and len(tokens) >= entry.cancelled_after
        )


def holds(tokens: Sequence[int], some: Sequence[int]) -> bool:
    return any(tuple(tokens[at : at + len(some)]) == tuple(some) for at in range(len(tokens)))


def lead(engine: PagedEngine, channel: Channel, entries: Sequence[Entry], epoch: int) -> Log:
    """One phase, as rank 0's loop has it."""
    script, inbox, log = Script(entries), Inbox(), Log()
    before = engine.stats().preemptions
    for step in count(1):
        cancels = list(script.cancels(step - 1, log))
        inbox.put(script.arrivals(step - 1), cancels)
        if not inbox and engine.idle and not script.more(step - 1):
            break
        plan = inbox.take(step)
        log.digests.append(engine.apply(plan))
        audit(engine)
        channel.broadcast_plan(encode_plan(plan, epoch=epoch, digest=log.digests[-1]))
        log.note(engine.execute())
        audit(engine)
        assert step < MOST_STEPS, "the engine makes no progress"
    channel.broadcast_plan(encode_park(epoch=epoch, step=step))
    audit_end(engine)
    log.preemptions = engine.stats().preemptions - before
    return log


def follow(engine: PagedEngine, channel: Channel, rank: int, epoch: int) -> Log:
    """One phase, as a peer's loop has it."""
    follower, log = Follower(rank=rank, epoch=epoch), Log()
    while True:
        header, plan = follower.read(channel.wait())
        if header.park:
            audit_end(engine)
            return log
        log.digests.append(engine.apply(plan))
        follower.check(header, log.digests[-1])
        audit(engine)
        log.note(engine.execute())


def play(engine: PagedEngine, channel: Channel, work: Workload) -> list[Log]:
    """All phases on the leader; whoever was cancelled may come back in the next one."""
    logs: list[Log] = []
    back: list[Entry] = []
    for number, entries in enumerate(work.phases, 1):
        logs.append(lead(engine, channel, [*entries, *back], number))
        back = list(returning(entries, logs[-1]))
    return logs


def returning(entries: Sequence[Entry], log: Log) -> Iterator[Entry]:
    """Those who were cancelled and want the rest, as another attempt at a job has them."""
    for entry in entries:
        handle = entry.request.handle
        if entry.resumed and not log.ended(handle):
            journal = tuple(log.tokens.get(handle, ()))
            again = replace(entry.request, handle=handle_of_return(handle), generated=journal)
            yield Entry(again, arrives=handle % 7)


def handle_of_return(handle: int) -> int:
    """Of the next attempt, in the next phase."""
    return handle + PER_PHASE + RESUMED

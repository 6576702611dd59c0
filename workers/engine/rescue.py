"""A step for which the device has no memory is tried again in halves, down to single rows, with everything freed that
was kept.  What fails alone is too large for the device and fails its request; nobody else notices.

Nothing has to be undone.  The rows of a step depend on each other only by prefixes that one writes and others read, and
those who read come later in the batch; a row that is computed twice writes the same keys and values to the same places.
Only one rank may do this by itself: several would have to do it together.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .runner import Flight, Runner
from .scheduler import Batch, Row, Scheduler
from .shortage import OutOfMemory, lacking
from .step import OUT_OF_MEMORY, Fault


@dataclass(frozen=True, slots=True)
class Lost:
    """A row for which there is no memory even alone."""

    row: Row
    lack: str

    @property
    def fault(self) -> Fault:
        """What to tell its request."""
        row, settings = self.row, "kv_cache_bytes or gpu_memory_utilization"
        if row.count > 1:
            settings = f"max_num_batched_tokens, {settings}"
        return Fault(
            row.sequence.handle,
            OUT_OF_MEMORY,
            f"the device has no memory for {row.count} tokens of this request behind {row.start} others, even alone "
            f"and with all caches freed ({self.lack}): shorten the prompt, or lower the group's {settings}",
        )


def rescue(batch: Batch, runner: Runner, scheduler: Scheduler) -> Iterator[tuple[Batch, Flight] | Lost]:
    """The batch in parts, each launched, to be landed before the next; and the rows that were lost, to be failed.

    Steps launched before must have landed.  Raises OutOfMemory if several rows were lost and none could be computed:
    then it is not they who are too large.
    """
    todo, void = deque(_halves(batch.rows)), set[int]()
    fresh, computed, num_lost = batch.fresh_blocks, False, 0
    while todo:
        rows = tuple(_wanted(todo.popleft(), void, scheduler))
        if not rows:
            continue
        runner.free()
        part = Batch(rows, fresh)
        lack: str | None = None
        try:
            flight = runner.launch(part)
        except Exception as error:
            if (lack := lacking(error)) is None:
                raise
        if lack is None:
            computed, fresh = True, ()  # from now on there is something in them
            yield part, flight
        elif len(rows) > 1:
            todo.extendleft(reversed(_halves(rows)))
        else:
            num_lost += 1
            void.update(_written(rows[0]))
            yield Lost(rows[0], lack)
    if num_lost > 1 and not computed:
        raise OutOfMemory(
            f"no memory for any of {num_lost} requests, even alone ({lack}): what else is on this device?"
        )


def _halves(rows: Sequence[Row]) -> list[tuple[Row, ...]]:
    middle = (len(rows) + 1) // 2
    return [half for half in (tuple(rows[:middle]), tuple(rows[middle:])) if half]


def _wanted(rows: Sequence[Row], void: set[int], scheduler: Scheduler) -> Iterator[Row]:
    """Those of requests that go on.  Who reads a block that was never written is sent back, and so on."""
    for row in rows:
        if row.sequence.ended:
            continue
        if void.isdisjoint(row.sequence.blocks):
            yield replace(row, pending=False)  # the steps that chose its token have landed
        else:
            void.update(_written(row))
            scheduler.recall(row)


def _written(row: Row) -> Sequence[int]:
    """The blocks that it would have filled or begun."""
    size = row.sequence.block_size
    return row.sequence.blocks[row.start // size : -(-row.context // size)]

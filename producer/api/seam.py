"""What the API asks of the store: calls of `producer.store.Store` as coroutines."""

from typing import Protocol

from hortator.producer.aio import AsyncProducerStore
from hortator.producer.store import DeadLetter, SweepReport


class AsyncStore(AsyncProducerStore, Protocol):
    """Same names, same meaning, same errors as `Store`."""

    async def sweep(self, *, limit: int = 1000, expired_before_ms: int | None = None) -> SweepReport: ...

    async def dead_letters(self, *, limit: int = 100, before: str | None = None) -> list[DeadLetter]: ...

    async def count_dead_letters(self) -> int: ...

    async def check(self, *, for_submits: bool = False) -> None: ...

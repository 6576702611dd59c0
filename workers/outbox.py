"""What the store must still be told.  Kept, in order, until Redis has taken it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hortator.producer.schema import Chunk
from hortator.producer.store import Append, Lease, Outcome, ReleaseReason, Signals, Store, Verdict

COMMITS_PER_CALL = 512  # bounds the time that one script holds Redis


@dataclass(slots=True)
class Delivery:
    """What the store answered to one flush."""

    verdicts: list[tuple[Outcome, Verdict]] = field(default_factory=list)
    cancelled: frozenset[str] = frozenset()
    lost: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Letter:
    """A message for the dead letters."""

    message: bytes
    reason: str
    job_id: str


class Outbox:
    """Tokens go before the release or commit of their job, so that no other attempt and no client misses them."""

    def __init__(self, store: Store, *, model: str) -> None:
        self._store = store
        self._model = model
        self._appends: list[Append] = []
        self._releases: list[tuple[Lease, ReleaseReason]] = []
        self._letters: list[Letter] = []
        self._outcomes: list[Outcome] = []
        self._clears: list[Lease] = []

    def __bool__(self) -> bool:
        return bool(self._appends or self._releases or self._letters or self._outcomes or self._clears)

    @property
    def leases(self) -> list[Lease]:
        """Jobs that have ended here but not yet in the store: their leases must live on."""
        return [outcome.lease for outcome in self._outcomes]

    def append(self, lease: Lease, chunk: Chunk | None) -> None:
        if chunk is not None:
            self._appends.append(Append(lease, chunk))

    def release(self, leases: Iterable[Lease], reason: ReleaseReason) -> None:
        self._releases += [(lease, reason) for lease in leases]

    def bury(self, letter: Letter) -> None:
        self._letters.append(letter)

    def commit(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)

    def clear(self, lease: Lease) -> None:
        self._clears.append(lease)

    def drop(self, job_ids: Iterable[str]) -> None:
        """Forget tokens of jobs that are no longer ours.  Outcomes stay: the store fences what comes too late."""
        gone = set(job_ids)
        self._appends = [append for append in self._appends if append.lease.job_id not in gone]

    def flush(self, delivery: Delivery) -> None:
        """Tell everything; StoreUnavailable leaves the rest for the next time.  Answers are added to `delivery`."""
        if self._appends:
            signals: Signals = self._store.append(self._appends)
            self._appends = []
            delivery.cancelled |= signals.cancelled
            delivery.lost |= signals.lost
        while self._clears:  # before their release: a cleared suspect goes back as one of many
            self._store.clear(self._clears[0])
            del self._clears[0]
        self._flush_releases()
        while self._letters:
            letter = self._letters[0]
            self._store.bury(self._model, letter.message, reason=letter.reason, job_id=letter.job_id)
            del self._letters[0]
        while self._outcomes:
            batch: Sequence[Outcome] = self._outcomes[:COMMITS_PER_CALL]
            verdicts = self._store.commit(batch)
            del self._outcomes[: len(batch)]
            delivery.verdicts += zip(batch, verdicts, strict=True)

    def _flush_releases(self) -> None:
        for reason in ReleaseReason:
            leases = [lease for lease, why in self._releases if why is reason]
            if leases:
                self._store.release(leases, reason=reason)
                self._releases = [release for release in self._releases if release[1] is not reason]

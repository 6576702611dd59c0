"""The memory twin's dead letters."""

from dataclasses import dataclass, replace

from .rules import Rules
from .store import LETTER_CUT_BYTES, LETTER_HEAD_BYTES, DeadLetter


@dataclass(frozen=True, slots=True)
class Kept:
    """A letter, and where a replay sends it."""

    letter: DeadLetter
    tenant: str
    step: int

    @property
    def whole(self) -> bool:
        return len(self.letter.message) == self.letter.message_bytes


class Letters:
    """All of them, oldest first, within the rules."""

    def __init__(self) -> None:
        self._kept: list[Kept] = []
        self._num_buried = 0

    def __len__(self) -> int:
        return len(self._kept)

    def bury(
        self,
        model: str,
        raw: bytes,
        reason: str,
        job_id: str | None,
        *,
        tenant: str,
        step: int,
        now: int,
        rules: Rules,
    ) -> str:
        self._num_buried += 1
        size = len(raw)
        if size > max(rules.max_message_bytes, LETTER_CUT_BYTES):
            raw = raw[:LETTER_CUT_BYTES]
            reason = f"{reason}; only its first {LETTER_CUT_BYTES} bytes are kept"
        letter = DeadLetter(f"{now}-{self._num_buried}", model, job_id, reason, raw, now, size)
        self._kept.append(Kept(letter, tenant, step))
        del self._kept[: -rules.max_letters]
        while len(self._kept) > 1 and self._num_bytes() > rules.max_letters_bytes:
            del self._kept[0]
        return letter.letter_id

    def _num_bytes(self) -> int:
        return sum(len(one.letter.message) for one in self._kept)

    def listed(self, limit: int, before: str | None) -> list[DeadLetter]:
        letters = [one.letter for one in reversed(self._kept)]
        older = [letter for letter in letters if before is None or _order(letter.letter_id) < _order(before)]
        return [replace(letter, message=letter.message[:LETTER_HEAD_BYTES]) for letter in older[:limit]]

    def find(self, letter_id: str) -> Kept | None:
        return next((one for one in self._kept if one.letter.letter_id == letter_id), None)

    def drop(self, kept: Kept) -> None:
        self._kept.remove(kept)


def _order(letter_id: str) -> tuple[int, ...]:
    return tuple(int(part) for part in letter_id.split("-"))

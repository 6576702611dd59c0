"""What the memory twin knows of groups: their beats, and which leader has whose name."""

from dataclasses import replace

from .memory_records import Records
from .store import GroupBeat, Holder


class Groups:
    """Whoever calls holds the store's lock."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._beats: dict[str, tuple[int, GroupBeat]] = {}
        self._holders: dict[str, tuple[int, Holder]] = {}  # until when a name is whose

    def beat(self, beat: GroupBeat) -> None:
        queue, now = self._records.queue(beat.model), self._records.now()
        if beat.state == "ready" or queue.known:
            queue.beaten = now
        if beat.room:
            queue.rooms[beat.group] = now, beat.room
        else:
            queue.rooms.pop(beat.group, None)
        if beat.state == "gone":
            self._beats.pop(beat.group, None)
        else:
            self._beats[beat.group] = now, beat

    def since(self, ms: int) -> list[GroupBeat]:
        """The last beats of those that beat at `ms` or later."""
        return [beat for at, beat in self._beats.values() if at >= ms]

    def hold(self, holder: Holder, replacing: str) -> Holder | None:
        now = self._records.now()
        until, found = self._holders.get(holder.group, (0, holder))
        if found.life not in (holder.life, replacing) and now < until:
            return found
        ours = found.life == holder.life and now < until
        kept = replace(holder, renewals=found.renewals + 1 if ours else 0)
        self._holders[holder.group] = now + round(self._records.rules.beat_ttl_s * 1000), kept
        return None

    def let_go(self, holder: Holder) -> None:
        if holder.group in self._holders and self._holders[holder.group][1].life == holder.life:
            del self._holders[holder.group]

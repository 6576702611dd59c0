"""Whether the front has watched its ranks without a gap; pure, the clocks are handed in."""

TOLERATED_SHARE = 0.5  # of the time after which the ranks give up a silent front
BUSY_SHARE = 0.5  # a process that used this much CPU in a gap was busy, not stopped


class Watch:
    """A front that was stopped (SIGSTOP, a suspended machine) has been given up by ranks that it still believes in.

    Until a rank that gave up would have been seen to go, work must not be handed to this group; and if the group turns
    out to be gone, nothing that it ran is to blame.
    """

    def __init__(self, heartbeat_s: float, heartbeat_timeout_s: float) -> None:
        self._heartbeat_s = heartbeat_s
        self._tolerated_s = TOLERATED_SHARE * (heartbeat_timeout_s - heartbeat_s)
        self._looked = self._heard = float("-inf")
        self._cpu_s = 0.0
        self._doubt_until = self._paused_until = float("-inf")

    def look(self, now: float, heard: float, *, cpu_s: float) -> None:
        """The watcher looked at its ranks; `heard`: when the most silent one was last heard of."""
        gap_s = now - self._looked
        if self._tolerated_s < gap_s < float("inf"):
            self._doubt_until = now + self._heartbeat_s
            if cpu_s - self._cpu_s < BUSY_SHARE * gap_s:
                self._paused_until = self._doubt_until
        self._looked, self._heard, self._cpu_s = now, heard, cpu_s

    def steady(self, now: float) -> bool:
        """No gap up to now, none a moment ago, and all ranks have beaten lately."""
        quiet_s = now - self._heard
        return now - self._looked <= self._tolerated_s and now >= self._doubt_until and quiet_s < 2 * self._heartbeat_s

    def paused(self, now: float) -> bool:
        """This process was stopped a moment ago."""
        return now < self._paused_until

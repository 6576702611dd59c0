"""A launcher without processes."""

from collections.abc import Sequence

from hortator.topology.launch import LineSink, RankCommand
from hortator.topology.vitals import Trouble


class FakeLauncher:
    """Twin without processes: a test sees the commands and decides when a rank ends."""

    def __init__(self) -> None:
        self.launches: list[tuple[RankCommand, ...]] = []
        self.kills = 0
        self._exits: dict[int, int] = {}

    def launch(self, commands: Sequence[RankCommand], *, on_line: LineSink) -> None:
        self._exits = {}
        self.launches.append(tuple(commands))

    @property
    def pids(self) -> dict[int, int]:
        return {}

    @property
    def absent(self) -> list[int]:
        return []

    def end(self, rank: int, returncode: int) -> None:
        """Let a rank end."""
        self._exits[rank] = returncode

    def exits(self) -> dict[int, int]:
        return dict(self._exits)

    def troubles(self) -> list[Trouble]:
        return []

    def terminate(self) -> None:
        """Nothing to ask."""

    def kill(self) -> None:
        self.kills += 1

    def close(self) -> None:
        """Nothing to let go of."""

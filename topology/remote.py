"""The launcher for several hosts: this host's ranks are children of this process, all others are children of keepers.

How keepers come to be on their hosts is a `Starter`'s business: ssh.py and deepspeed.py start them, and with `Awaited`
somebody else does (torchrun, Slurm, Kubernetes).
"""

import secrets
from collections.abc import Callable, Sequence
from typing import Protocol

from .frames import KEY_BYTES
from .launch import LineSink, LocalLauncher, RankCommand
from .muster import Muster
from .placement import Share
from .vitals import Trouble


class Starter(Protocol):
    """Gets keepers started; called by the launcher's thread."""

    token: str
    """What tells this start's keepers from those of an earlier one; '': they need not be told apart."""

    def start(self, shares: Sequence[Share], *, address: tuple[str, int], key: bytes, on_line: LineSink) -> None:
        """See to it that a keeper for each share but the first, which is this host's, joins at `address` with `key`."""

    def troubles(self) -> list[Trouble]:
        """What has gone wrong since the last call."""

    def stop(self, *, lost: bool) -> None:
        """A launch is over; `lost`: and some keeper did not survive it."""

    def close(self) -> None:
        """No launch will follow."""


class Awaited:
    """Starts nothing: keepers come by themselves, and come again after each launch."""

    token = ""

    def start(self, shares: Sequence[Share], *, address: tuple[str, int], key: bytes, on_line: LineSink) -> None:
        """They know where to come."""

    def troubles(self) -> list[Trouble]:
        return []

    def stop(self, *, lost: bool) -> None:
        """They stay."""

    def close(self) -> None:
        """They have a patience of their own."""


class RemoteLauncher:
    """Ranks 0 to num_own - 1 run here.  `key`: a lasting one for keepers that outlive a launch; None: one for each."""

    def __init__(
        self,
        open_muster: Callable[[bytes], Muster],
        starter: Starter,
        *,
        num_own: int,
        shares: Sequence[Share] = (),
        key: bytes | None = None,
    ) -> None:
        self._open_muster = open_muster
        self._starter = starter
        self._num_own = num_own
        self._shares = tuple(shares)
        self._key = key
        self._local = LocalLauncher()
        self._muster: Muster | None = None

    def launch(self, commands: Sequence[RankCommand], *, on_line: LineSink) -> None:
        """Raises PortTaken or CannotStart, with nothing left running."""
        key = self._key or secrets.token_bytes(KEY_BYTES)
        muster = self._opened(key)
        own, others = commands[: self._num_own], commands[self._num_own :]
        muster.begin({c.rank: c.env for c in others}, world_size=len(commands), on_line=on_line)
        self._starter.start(self._shares, address=muster.address, key=key, on_line=on_line)
        muster.token = self._starter.token
        self._local.launch(own, on_line=on_line)

    @property
    def pids(self) -> dict[int, int]:
        return self._local.pids

    def exits(self) -> dict[int, int]:
        if self._muster is None:
            return {}
        self._muster.pump()
        return self._local.exits() | self._muster.exits

    def troubles(self) -> list[Trouble]:
        return [*(self._muster.troubles() if self._muster else []), *self._starter.troubles()]

    @property
    def absent(self) -> list[int]:
        """Ranks whose keepers have not come."""
        return self._muster.absent if self._muster else []

    def terminate(self) -> None:
        self._local.terminate()

    def kill(self) -> None:
        """Those out of reach are killed by their own keepers, which miss the front by then."""
        self._local.kill()
        if self._muster is not None:
            self._starter.stop(lost=self._muster.end())

    def close(self) -> None:
        self._starter.close()
        if self._muster is not None:
            self._muster.token = self._starter.token
            self._muster.see_off()
            self._muster.close()
            self._muster = None

    def _opened(self, key: bytes) -> Muster:
        if self._muster is None:
            self._muster = self._open_muster(key)
        elif self._key is None:
            self._muster.rekey(key)
        return self._muster

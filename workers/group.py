"""The front's view of its model group: submit work, get steps, learn when it goes down.  No torch, no Celery.

    group.start()
    hub.add_reader(group.fileno(), lambda: handle(group.poll()))

`Group` belongs to one thread, the hub's; the supervisor has a thread of its own and only posts what happened.
"""

import contextlib
import os
import select
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hortator.producer.errors import ConfigError, GroupFailed
from hortator.topology.errors import TopologyError
from hortator.topology.launch import Launcher
from hortator.topology.vitals import Vitals

from .engine.step import EngineInfo, Request
from .launching import make_launcher
from .pipe import Pipe, PipeBroken, Report, read_report, submissions
from .settings import WorkerSettings
from .supervisor import Down, Live, Outage, Supervisor

__all__ = ["Down", "Event", "Group", "Ready", "Stepped"]


@dataclass(frozen=True, slots=True)
class Ready:
    """The group of this epoch takes requests; starting it took `start_s`."""

    epoch: int
    info: EngineInfo
    start_s: float


@dataclass(frozen=True, slots=True)
class Stepped:
    """What a step gave, or several.  Steps in which nothing happened are not reported."""

    epoch: int
    report: Report


Event = Ready | Stepped | Down


class Group:
    """One model group.  After Down every handle of that epoch is gone, and nothing of that epoch comes any more.

    `environment` is what its ranks inherit, but for HORTATOR_*.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        *,
        launcher: Launcher | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._posts: deque[Live | Down] = deque()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._wakeup, select.EPOLLIN)
        self._supervisor = Supervisor(
            settings, launcher or _launcher(settings, environment), self._post, environment=environment
        )
        self._ready: Ready | None = None
        self._pipe: Pipe | None = None
        self._num_submitted = 0  # admissions and cancels, in this epoch
        self._last: Report | None = None  # of this epoch
        self._closed = False

    def start(self) -> None:
        """Begin; returns at once.  Ready or Down follow."""
        self._supervisor.start()

    def fileno(self) -> int:
        """One descriptor for all epochs: readable when `poll` has something to do."""
        return self._epoll.fileno()

    def poll(self) -> list[Event]:
        """What has happened since, in order; also writes what is left to write.  Never blocks."""
        if self._closed:
            return []
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wakeup)
        events: list[Event] = []
        while self._posts:
            post = self._posts.popleft()
            events += self._come_up(post) if isinstance(post, Live) else self._go_down(post)
        events += self._read()
        self._flush()
        return events

    def submit(self, *, admit: Sequence[Request] = (), cancel: Sequence[int] = ()) -> bool:
        """Hand over requests and cancels; never blocks.  False if rank 0 is gone (Down is on its way): it has certainly
        had none of them.  Raises GroupFailed unless the group is ready."""
        if self._ready is None:
            raise GroupFailed(f"the group is {self.state}: nothing can be submitted")
        if (pipe := self._pipe) is None:
            return False
        delivered = False
        try:
            for message in submissions(admit, cancel):
                pipe.send(message)
                delivered = True
            self._num_submitted += len(admit) + len(cancel)
        except PipeBroken as error:
            self._lose_pipe(error.message)
        self._watch_writing()
        return delivered

    def close(self, *, timeout_s: float = 5.0) -> None:
        """End all ranks: STOP, then SIGTERM, then SIGKILL.  No process is left, and no event comes any more."""
        if self._closed:
            return
        self._closed = True
        self._ready = None
        self._supervisor.close(timeout_s=timeout_s)
        for post in self._posts:
            if isinstance(post, Live):
                post.sock.close()
        self._drop_pipe()
        self._epoll.close()
        os.close(self._wakeup)

    @property
    def epoch(self) -> int:
        """The life that is ready, or else the one that is being started."""
        return self._ready.epoch if self._ready is not None else self._supervisor.epoch

    @property
    def state(self) -> str:
        """starting, ready, down or closed, as far as `poll` has told."""
        if self._closed:
            return "closed"
        if self._ready is not None:
            return "ready"
        return "starting" if self._supervisor.phase == "ready" else self._supervisor.phase

    @property
    def steady(self) -> bool:
        """Ready, and no reason to doubt it: rank 0's pipe is whole, all ranks beat, and we were watching."""
        return self._ready is not None and self._pipe is not None and self._supervisor.steady

    @property
    def empty(self) -> bool:
        """Nothing that was submitted is left in the ranks.  What was cancelled is, until rank 0 has said that a plan
        took the cancel: the group can still die of it."""
        if self._last is None:
            return not self._num_submitted
        return self._last.idle and self._last.taken == self._num_submitted

    @property
    def pids(self) -> dict[int, int]:
        """Rank to process id, of ranks on this host."""
        return dict(self._supervisor.pids)

    @property
    def members(self) -> dict[int, Vitals]:
        """What each rank last said of itself, on whatever host it is; none while the group is down."""
        return {} if self.state in ("down", "closed") else self._supervisor.members

    @property
    def last_failure(self) -> str | None:
        return self._supervisor.last_failure

    @property
    def outage(self) -> Outage | None:
        """How the group last went down; kept while it is up again."""
        return self._supervisor.outage

    @property
    def given_up(self) -> bool:
        """It is down and will not be tried again."""
        return self._supervisor.given_up

    @property
    def rejected(self) -> Mapping[str, int]:
        """Connections to the control port that were turned away, by reason."""
        return self._supervisor.rejected

    # --- from the supervisor's thread

    def _post(self, post: Live | Down) -> None:
        self._posts.append(post)
        with contextlib.suppress(OSError):  # closed meanwhile
            os.eventfd_write(self._wakeup, 1)

    # --- in the hub's thread

    def _come_up(self, live: Live) -> Iterator[Event]:
        self._pipe = Pipe(live.sock)
        self._epoll.register(self._pipe.fileno(), select.EPOLLIN)
        self._num_submitted, self._last = 0, None
        self._ready = Ready(live.epoch, live.info, live.start_s)
        yield self._ready

    def _go_down(self, down: Down) -> Iterator[Event]:
        """What rank 0 had written when it was killed still counts; then the epoch is over."""
        while steps := self._read():
            yield from steps
        self._drop_pipe()
        self._ready = None
        yield down

    def _read(self) -> list[Event]:
        if self._pipe is None or self._ready is None:
            return []
        try:
            messages = self._pipe.receive()
        except PipeBroken as error:
            self._lose_pipe(error.message)
            return []
        reports = [read_report(message) for message in messages]
        self._last = reports[-1] if reports else self._last
        return [Stepped(self._ready.epoch, report) for report in reports]

    def _flush(self) -> None:
        if self._pipe is not None and self._pipe.unsent:
            try:
                self._pipe.flush()
            except PipeBroken as error:
                self._lose_pipe(error.message)
            self._watch_writing()

    def _watch_writing(self) -> None:
        if self._pipe is not None:
            events = select.EPOLLIN | (select.EPOLLOUT if self._pipe.unsent else 0)
            self._epoll.modify(self._pipe.fileno(), events)

    def _lose_pipe(self, reason: str) -> None:
        """Without its pipe the group is useless, whether or not rank 0 is already known to be dead."""
        if self._ready is not None:
            self._supervisor.condemn(self._ready.epoch, f"rank 0: {reason}")
        self._drop_pipe()

    def _drop_pipe(self) -> None:
        if self._pipe is not None:
            self._epoll.unregister(self._pipe.fileno())
            self._pipe.close()
            self._pipe = None


def _launcher(settings: WorkerSettings, environment: Mapping[str, str]) -> Launcher:
    try:
        return make_launcher(settings, environment)
    except TopologyError as error:
        raise ConfigError(str(error)) from error

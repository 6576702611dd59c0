"""The two loops of a group: rank 0 calls every step, the peers take it with it.

An idle group is parked: rank 0 waits on its pipe and the peers on the control connection, nobody in a collective.
"""

import select
import time

from hortator.topology.tether import ControlClient

from .engine.step import Engine, StepOutput, StepPlan
from .lockstep import Channel, Follower, Inbox, encode_park, encode_plan
from .pipe import Pipe, read_submission, report

LINGER_S = 0.02
"""An idle group keeps the peers at the channel this long before it parks, so that a steady trickle costs no WAKE."""

REPORT_EVERY_S = 0.05
"""Steps of a well filled group are told together this often (or after one step, if that is longer), unless rows have
become free that only the front can fill: each message wakes the front, which costs the engine time where they share a
processor."""
MOST_UNTOLD_STEPS = 6

_NOTHING = StepOutput()


def most_untold_steps(probation_tokens: int) -> int:
    """Of one token a row each, until the next report.  Where a group died must be known better than to a probation's
    length: else a suspect is cleared on its way to the point where it kills."""
    return max(1, min(MOST_UNTOLD_STEPS, probation_tokens - 1))


class Leader:
    """Rank 0: takes what the front submits, calls every step, reports what it gave."""

    def __init__(
        self,
        engine: Engine,
        channel: Channel,
        control: ControlClient,
        pipe: Pipe,
        *,
        epoch: int,
        most_untold_steps: int = MOST_UNTOLD_STEPS,
    ) -> None:
        self._engine = engine
        self._channel = channel
        self._control = control
        self._pipe = pipe
        self._epoch = epoch
        self._most_untold_steps = most_untold_steps
        self._inbox = Inbox()
        self._step = 1
        self._untold = _NOTHING
        self._told_at = 0.0
        self._told_step = 0
        self._poller = select.poll()

    def run(self) -> None:
        """Until the process ends."""
        self._park()
        while True:
            self._receive()
            if self._inbox or not self._engine.idle:
                self._beat_drum()
            elif not self._await_front(LINGER_S):
                self._channel.broadcast_plan(encode_park(epoch=self._epoch, step=self._step))
                self._park()

    def _beat_drum(self) -> None:
        plan = self._inbox.take(self._step)
        digest = self._engine.apply(plan)
        self._channel.broadcast_plan(encode_plan(plan, epoch=self._epoch, digest=digest))
        output = self._engine.execute()
        self._control.step = self._step
        self._step += 1
        self._report(plan, output)

    def _report(self, plan: StepPlan, output: StepOutput) -> None:
        """Steps in which nothing happened are not worth a message."""
        idle = self._engine.idle and not self._inbox
        can_wait = not (idle or plan.cancel) and self._can_wait(plan, output)
        self._untold = self._untold + output
        if can_wait:
            if self._pipe.unsent:
                self._pipe.flush()
            return
        taken = self._inbox.num_taken
        self._pipe.send(report(plan.step, self._untold, self._engine.stats(), taken=taken, idle=idle))
        self._untold, self._told_at, self._told_step = _NOTHING, time.monotonic(), plan.step

    def _can_wait(self, plan: StepPlan, output: StepOutput) -> bool:
        """Ends, and who has joined, only while requests wait for a row: then no row waits for the front."""
        if output == _NOTHING:
            return self._untold == _NOTHING and not plan.admit
        many = 2 * len(output.tokens) >= self._engine.info.max_num_seqs
        nothing_to_do = not output.faults and (not (output.finished or plan.admit) or self._engine.stats().waiting > 0)
        few = plan.step - self._told_step < self._most_untold_steps
        return many and nothing_to_do and few and time.monotonic() - self._told_at < REPORT_EVERY_S

    def _park(self) -> None:
        """Wait for the front while the peers wait for WAKE."""
        self._control.busy = False
        while not self._await_front(None):
            pass
        self._control.busy = True
        self._control.wake()

    def _receive(self) -> None:
        for message in self._pipe.receive():
            self._inbox.put(*read_submission(message))

    def _await_front(self, timeout_s: float | None) -> bool:
        """Whether there is something to read; meanwhile the front may take what it has left lying."""
        self._poller.register(self._pipe.fileno(), select.POLLIN | (select.POLLOUT if self._pipe.unsent else 0))
        events = dict(self._poller.poll(None if timeout_s is None else timeout_s * 1000))
        if events.get(self._pipe.fileno(), 0) & select.POLLOUT:
            self._pipe.flush()
        return bool(events.get(self._pipe.fileno(), 0) & ~select.POLLOUT)


class Peer:
    """Every other rank: takes the same plans and checks that it derives the same."""

    def __init__(self, engine: Engine, channel: Channel, control: ControlClient, follower: Follower) -> None:
        self._engine = engine
        self._channel = channel
        self._control = control
        self._follower = follower

    def run(self) -> None:
        """Until the process ends."""
        while True:
            self._control.busy = False
            self._control.wait_wake()
            self._control.busy = True
            while self._pull():
                pass

    def _pull(self) -> bool:
        """One step with everybody; False when the group is parked."""
        header, plan = self._follower.read(self._channel.wait())
        if header.park:
            return False
        self._follower.check(header, self._engine.apply(plan))
        self._engine.execute()
        self._control.step = plan.step
        return True

"""Which failure of a group is told: the one that took it down, with its time, and the latest."""

import time

from hortator.topology.launch import LocalLauncher
from hortator.workers.settings import WorkerSettings
from hortator.workers.supervisor import Failure, Supervisor


def test_the_first_cause_of_an_outage_stays_until_the_next_one() -> None:
    settings = WorkerSettings(engine="echo", model="m")
    supervisor = Supervisor(settings, LocalLauncher(), lambda _: None, environment={})
    began = time.time()
    supervisor.epoch, supervisor._ready_since = 3, 1.0  # it was ready
    supervisor._report(Failure("rank 5 was killed"))
    supervisor.epoch, supervisor._ready_since = 4, None
    supervisor._report(Failure("ssh to h7 ended", permanent=True))
    assert supervisor.outage is not None
    assert (supervisor.outage.reason, supervisor.outage.epoch) == ("rank 5 was killed", 3)
    assert began <= supervisor.outage.at <= time.time()
    assert (supervisor.last_failure, supervisor.given_up) == ("ssh to h7 ended", True)
    supervisor.epoch, supervisor._ready_since = 5, 9.0
    supervisor._report(Failure("rank 1 was killed"))
    assert supervisor.outage.reason == "rank 1 was killed"

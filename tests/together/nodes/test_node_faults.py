"""What happens to one machine of a group that spans two: the group dies as one, leaves nothing, and rises again."""

import os
import signal
import time

import pytest

from tests.together.fleet import alive, assert_all_right, wait_for
from tests.together.nodes.cluster import Cluster
from tests.together.nodes.faults import FAULTS, Fault, downs, readies, suffer, wait_ready

TOKENS = 60  # at 20 ms each
PROMPTS = [f"prompt {i} of the group on two machines;" for i in range(4)]


def ask(cluster: Cluster, tokens: int = TOKENS) -> dict[str, str]:
    """Enqueue, and wait until all are at work."""
    asked = dict(zip(cluster.enqueue(PROMPTS, max_tokens=tokens), PROMPTS, strict=True))
    cluster.progressed(list(asked), 3)
    return asked


@pytest.mark.parametrize("name", ["rank killed", "ssh session killed", "tcp reset", "node killed"])
def test_a_fault_under_load_restarts_the_group_and_loses_no_job(pair: Cluster, name: str) -> None:
    asked = ask(pair)
    struck(pair, FAULTS[name])
    assert_all_right(pair.finished(list(asked)), asked, TOKENS)


@pytest.mark.parametrize("name", ["rank stopped", "keeper killed"])
def test_a_fault_of_an_idle_group_is_noticed_too(pair: Cluster, name: str) -> None:
    struck(pair, FAULTS[name])


def struck(cluster: Cluster, fault: Fault, *, heal_after_s: float = 0.0) -> None:
    (worker,) = cluster.workers
    outcome = suffer(cluster, worker, fault, "nodeB", heal_after_s=heal_after_s)
    assert outcome.detect_s < fault.detect_s
    assert "rank 1" in outcome.reason
    assert "nodeB" in outcome.reason
    assert outcome.orphans == 0


def test_a_link_that_is_down_for_two_seconds_under_load_is_ridden_through(pair: Cluster) -> None:
    (worker,) = pair.workers
    before = downs(worker), readies(worker)
    asked = ask(pair)
    pair.machines["nodeB"].link_down()
    time.sleep(2.0)
    pair.machines["nodeB"].link_up()
    assert_all_right(pair.finished(list(asked)), asked, TOKENS)
    time.sleep(1.0)
    assert (downs(worker), readies(worker)) == before


def test_a_machine_that_is_cut_off_ends_its_ranks_by_itself_and_a_healed_one_is_used_again(pair: Cluster) -> None:
    asked = ask(pair)
    struck(pair, FAULTS["link down"], heal_after_s=6.0)
    assert_all_right(pair.finished(list(asked)), asked, TOKENS)


def test_the_death_of_the_leader_leaves_nothing_on_any_machine_not_even_a_stopped_rank(pair: Cluster) -> None:
    asked = ask(pair)
    (worker,) = pair.workers
    (remote,) = pair.machines["nodeB"].ranks()
    os.kill(remote.pid, signal.SIGSTOP)
    before = [process.pid for process in pair.living()]
    worker.signal(signal.SIGKILL)
    wait_for("everything to end", lambda: not any(map(alive, before)), 2.0)
    worker.stop()
    pair.workers.clear()
    wait_ready(pair.worker("next"))
    assert_all_right(pair.finished(list(asked)), asked, TOKENS)


def test_a_launching_machine_that_loses_power_leaves_nothing_on_the_others(pair: Cluster) -> None:
    """Its kernel says goodbye to nobody: the others only hear silence.  It is the last test of this file."""
    ask(pair, 500)
    before = [process.pid for process in pair.living()]
    pair.machines["nodeA"].link_down()
    pair.machines["nodeA"].power_off()
    wait_for("everything to end", lambda: not any(map(alive, before)), 6.0)

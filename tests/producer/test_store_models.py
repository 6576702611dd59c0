"""Which models a store knows, and for how long."""

import pytest

from hortator.producer.errors import UnknownModel
from hortator.producer.store import GroupBeat
from tests.producer.rig import MODEL, Rig, done


def models(rig: Rig) -> list[str]:
    rig.store.sweep()
    return [queue.model for queue in rig.store.queues()]


def test_a_model_is_forgotten_when_it_is_silent_and_empty_and_nothing_of_it_runs(rig: Rig) -> None:
    rig.rule(result_ttl_s=0.3)
    rig.beat("brief")
    [queued] = rig.enqueue("x")
    assert models(rig) == ["brief", MODEL]
    rig.wait(0.4)
    assert models(rig) == [MODEL]  # something waits
    lease = rig.claim_one()
    assert lease.job_id == queued
    assert models(rig) == [MODEL]  # something runs
    rig.store.commit([done(lease)])
    assert models(rig) == []
    with pytest.raises(UnknownModel):
        rig.enqueue("y")
    rig.beat()
    assert rig.enqueue("z")
    assert models(rig) == [MODEL]


def test_a_model_takes_jobs_only_once_a_group_of_it_was_ready_and_then_while_that_one_restarts(rig: Rig) -> None:
    def say(state: str) -> None:
        rig.store.beat(GroupBeat("new", "new", 0, 8, 1, state))

    rig.rule(result_ttl_s=5)
    for state in ("starting", "down", "gone"):
        say(state)
        with pytest.raises(UnknownModel, match="once it is ready"):
            rig.enqueue("x", model="new")
    say("starting")
    assert models(rig) == ["new", MODEL]  # listed, with its group, although it takes nothing yet
    say("ready")
    assert rig.enqueue("x", model="new")
    for state in ("starting", "down", "draining", "gone"):
        say(state)
        assert rig.enqueue("x", model="new")

"""The faults of the contract (docs/07-promises.md) against real processes: what dies, what must still be true."""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from hortator.producer import Job, Sampling
from hortator.producer.store import ReleaseReason
from tests.together.fleet import REPOSITORY, Fleet, Worker, alive, assert_all_right, wait_for

LONG = 150  # tokens of a job that is killed in its middle: about 3 s of generation
PROMPTS = [f"prompt number {i} is not like the others;" for i in range(8)]


def tokens_of(fleet: Fleet, job_id: str) -> list[int]:
    """The journal."""
    return [token for chunk in fleet.store.chunks(job_id) for token in chunk.token_ids]


def ask(fleet: Fleet, prompts: list[str] = PROMPTS, max_tokens: int = LONG) -> dict[str, str]:
    """Enqueue and remember which id asked what."""
    return dict(zip(fleet.enqueue(prompts, max_tokens=max_tokens), prompts, strict=True))


def test_a_killed_leader_loses_no_job_when_another_group_serves_the_model(fleet: Fleet) -> None:
    groups = [fleet.worker("one"), fleet.worker("two")]
    for group in groups:
        group.ready()
    asked = ask(fleet)
    fleet.progressed(list(asked))
    victim = wait_for("a group that runs most of the jobs", lambda: next((g for g in groups if g.running() >= 4), None))
    journals = {job_id: tokens_of(fleet, job_id) for job_id in asked}
    ranks, held = victim.ranks(), victim.running()
    victim.signal(signal.SIGKILL)
    wait_for("ranks of the killed leader gone", lambda: not any(map(alive, ranks)), 2.0)
    killed = time.monotonic()

    def again() -> int:
        return sum(s.attempt == 2 for s in fleet.store.statuses(list(asked)) if s)

    wait_for("its jobs are run elsewhere", lambda: again() > 0, 5.0)
    assert time.monotonic() - killed < 5.0
    done = fleet.finished(list(asked))
    assert_all_right(done, asked, LONG)
    assert {status.attempt for status in done.values()} <= {1, 2}
    assert again() >= held - 1, "a job may have ended between the look and the kill"
    for job_id, seen in journals.items():
        assert tokens_of(fleet, job_id)[: len(seen)] == seen, "the accepted prefix never changes"


def test_a_killed_leader_that_comes_back_finishes_its_jobs(fleet: Fleet) -> None:
    first = fleet.worker("one").ready()
    asked = ask(fleet)
    fleet.progressed(list(asked))
    os.kill(first.pid, signal.SIGKILL)
    fleet.worker("one-again").ready()
    assert_all_right(fleet.finished(list(asked)), asked, LONG)


def test_a_job_that_arrives_at_a_stopped_leader_outlives_its_death(fleet: Fleet) -> None:
    leader = fleet.worker("one").ready()
    time.sleep(0.5)
    leader.signal(signal.SIGSTOP)
    asked = ask(fleet, PROMPTS[:1], 20)
    time.sleep(0.5)
    leader.signal(signal.SIGKILL)
    fleet.worker("two").ready()
    assert_all_right(fleet.finished(list(asked)), asked, 20)


def test_a_killed_peer_takes_its_group_down_and_up_again(fleet: Fleet) -> None:
    leader = fleet.worker("one").ready()
    epoch = leader.epoch()
    asked = ask(fleet)
    fleet.progressed(list(asked))
    before = leader.ranks()
    os.kill(before[1], signal.SIGKILL)
    wait_for("all ranks of the old epoch gone", lambda: not any(map(alive, before)), 2.0)
    leader.ready(after_epoch=epoch)
    assert_all_right(fleet.finished(list(asked)), asked, LONG)
    assert leader.process.poll() is None


def test_greedy_and_seeded_jobs_end_the_same_with_and_without_a_crash(fleet: Fleet) -> None:
    model: dict[str, Any] = {
        "engine": "paged",
        "model": "demo",
        "model_path": REPOSITORY / "demo" / "model",
        "max_model_len": 512,
    }
    leader = fleet.worker("one", **model).ready()
    jobs = [
        Job(model="demo", prompt="count(744,842)=", sampling=Sampling(max_tokens=400)),
        Job(model="demo", prompt="12+30=", sampling=Sampling(max_tokens=300, temperature=5.0, seed=7, ignore_eos=True)),
    ]
    untouched = texts(fleet, [handle.id for handle in fleet.client.enqueue_many(jobs)])
    assert untouched[0] == " ".join(map(str, range(744, 843)))
    ids = [handle.id for handle in fleet.client.enqueue_many(jobs)]
    fleet.progressed(ids, 40)
    os.kill(leader.ranks()[1], signal.SIGKILL)
    assert texts(fleet, ids) == untouched
    assert {fleet.status(job_id).attempt for job_id in ids} == {2}


def texts(fleet: Fleet, job_ids: list[str]) -> list[str]:
    """The answers, in order, when all are there."""
    done = fleet.finished(job_ids, timeout_s=90)
    results = [done[job_id].result for job_id in job_ids]
    return [result.text for result in results if result is not None]


def test_a_stopped_peer_is_noticed_within_seconds(fleet: Fleet) -> None:
    leader = fleet.worker("one").ready()
    epoch = leader.epoch()
    asked = ask(fleet)
    fleet.progressed(list(asked))
    before = leader.ranks()
    os.kill(before[1], signal.SIGSTOP)
    wait_for("all ranks of the old epoch gone", lambda: not any(map(alive, before)), 6.0)
    leader.ready(after_epoch=epoch)
    assert_all_right(fleet.finished(list(asked)), asked, LONG)


def test_a_stopped_front_that_wakes_charges_and_convicts_nobody(fleet: Fleet) -> None:
    leader = fleet.worker("one", heartbeat_s=0.2, heartbeat_timeout_s=0.8, lease_s=30).ready()
    asked = ask(fleet, max_tokens=60)
    fleet.progressed(list(asked))
    stopped_until_its_ranks_are_gone(leader)
    done = fleet.finished(list(asked))
    assert_all_right(done, asked, 60)
    assert {status.attempt for status in done.values()} == {1}, "handed back uncharged"

    leader.signal(signal.SIGSTOP)
    [suspect] = fleet.enqueue(["innocent;"], max_tokens=20)
    [claimed] = fleet.store.claim("echo", owner="another", limit=1, lease_s=30, idle=True).jobs
    fleet.store.release([claimed.lease], reason=ReleaseReason.CRASHED)
    stopped_until_its_ranks_are_gone(leader)
    assert_all_right(fleet.finished([suspect]), {suspect: "innocent;"}, 20)


def stopped_until_its_ranks_are_gone(leader: Worker) -> None:
    """SIGSTOP, until the ranks have given the front up; then it wakes."""
    ranks = [pid for pid in leader.ranks() if alive(pid)]
    leader.signal(signal.SIGSTOP)
    wait_for("ranks that gave up", lambda: not any(map(alive, ranks)), 5.0)
    leader.signal(signal.SIGCONT)


def test_no_rank_outlives_its_front(fleet: Fleet) -> None:
    leader = fleet.worker("one").ready()
    ranks = leader.ranks()
    assert len(ranks) == 2
    leader.signal(signal.SIGKILL)
    wait_for("no orphan", lambda: not any(map(alive, ranks)), 2.0)


def test_sigterm_finishes_what_fits_into_the_grace(fleet: Fleet) -> None:
    leader = fleet.worker("one", grace_s=30).ready()
    asked = ask(fleet)
    fleet.progressed(list(asked))
    leader.signal(signal.SIGTERM)
    assert leader.wait() == 0
    assert_all_right(fleet.finished(list(asked), timeout_s=1.0), asked, LONG)


def test_sigterm_hands_the_rest_back_uncharged(fleet: Fleet) -> None:
    leader = fleet.worker("one", grace_s=0.5).ready()
    asked = ask(fleet)
    fleet.progressed(list(asked))
    leader.signal(signal.SIGTERM)
    leader.wait()
    assert all(fleet.status(job_id).attempt == 0 for job_id in asked)
    fleet.worker("two").ready()
    done = fleet.finished(list(asked))
    assert_all_right(done, asked, LONG)
    assert {status.attempt for status in done.values()} == {1}


def test_a_second_sigterm_means_now(fleet: Fleet) -> None:
    leader = fleet.worker("one", grace_s=60).ready()
    asked = ask(fleet, max_tokens=2000)
    fleet.progressed(list(asked))
    leader.signal(signal.SIGTERM)
    time.sleep(0.5)
    leader.signal(signal.SIGTERM)
    leader.wait(8)
    assert all(fleet.status(job_id).state == "queued" for job_id in asked)


def test_a_rank_with_other_weights_is_refused_by_name(fleet: Fleet, tmp_path: Path) -> None:
    model = REPOSITORY / "demo" / "model"
    other = shutil.copytree(model, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: value + 0.001 for name, value in weights.items()}, other / "model.safetensors")
    leader = fleet.worker(
        "one",
        engine="paged",
        model_path=model,
        max_model_len=256,
        environment={
            "OTHER_MODEL_PATH": str(other),
            "PYTHONPATH": f"{Path(__file__).parent / 'othermodel'}:{REPOSITORY}",
        },
    )
    assert leader.wait() != 0
    assert "rank 1" in leader.tail()
    assert "weights" in leader.tail()

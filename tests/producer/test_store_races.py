"""Cancel, commit, deadline, sweep and duplicates at the same moment: exactly one terminal state, told once."""

import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial

from hortator.producer.schema import Failure, State
from hortator.producer.store import Lease, Outcome, ReleaseReason, Store, Verdict
from tests.producer.rig import MODEL, MemoryRig, RedisRig, Rig, done

ROUNDS = 4
JOBS = 250  # 1000 races for each store


def together(*actors: Callable[[], None]) -> None:
    """All at once; what any of them raises is raised."""
    barrier = threading.Barrier(len(actors))
    errors: list[BaseException] = []

    def run(actor: Callable[[], None]) -> None:
        barrier.wait()
        try:
            actor()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(actor,)) for actor in actors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def other(rig: Rig) -> Store:
    return rig.another() if isinstance(rig, RedisRig) else rig.store


def test_of_cancel_commit_and_deadline_exactly_one_wins(rig: Rig) -> None:
    rig.rule(deadline_grace_s=0.0)
    announced: Counter[str] = Counter()
    pubsub = rig.redis.pubsub(ignore_subscribe_messages=True) if isinstance(rig, RedisRig) else None
    if pubsub:
        pubsub.psubscribe("*celery-task-meta-*")
    stores = [other(rig) for _ in range(4)]
    random.seed(7)
    for _ in range(ROUNDS):
        ids = rig.enqueue(*["x"] * JOBS, deadline_s=0.06)
        running = [one.lease for one in rig.claim(JOBS // 2).jobs]
        verdicts: dict[str, list[tuple[State, Verdict]]] = {job_id: [] for job_id in ids}

        def commits(store: Store, leases: list[Lease], log: dict[str, list[tuple[State, Verdict]]]) -> None:
            for lease in leases:
                outcome = done(lease)
                if random.random() < 0.3:
                    outcome = Outcome(lease, State.FAILED, failure=Failure(code="c", message="m"))
                log[lease.job_id].append((outcome.state, store.commit([outcome])[0]))

        def claims_and_commits(store: Store, log: dict[str, list[tuple[State, Verdict]]]) -> None:
            for _ in range(10):
                jobs = store.claim(MODEL, owner="b", limit=JOBS // 10, lease_s=60, idle=True).jobs
                commits(store, [one.lease for one in jobs], log)

        def cancels(store: Store, asked: list[str]) -> None:
            for job_id in random.sample(asked, len(asked) // 2):
                store.cancel([job_id])

        def expires(store: Store) -> None:
            for _ in range(40):
                store.sweep()

        def asks(store: Store, asked: list[str]) -> None:
            for _ in range(10):
                store.statuses(asked)

        together(
            partial(commits, stores[0], running, verdicts),
            partial(claims_and_commits, stores[1], verdicts),
            partial(cancels, stores[2], ids),
            partial(expires, stores[3]),
            partial(asks, rig.store, ids),
        )
        rig.wait(0.08)
        rig.store.sweep()
        for status in rig.store.statuses(ids):
            assert status is not None
            assert status.state.terminal
            committed = [state for state, verdict in verdicts[status.id] if verdict is Verdict.COMMITTED]
            assert committed in ([], [status.state])
            assert (status.result is not None) == (status.state is State.SUCCEEDED)
        while pubsub and (told := pubsub.get_message()):
            announced[told["channel"].decode().rpartition("meta-")[2]] += 1
    if pubsub:
        assert len(announced) == ROUNDS * JOBS
        assert set(announced.values()) == {1}
        pubsub.close()
    assert rig.store.queues()[0].running == 0
    rig.claim()
    assert rig.depth() == 0


def test_many_claimers_never_share_a_job(rig: Rig) -> None:
    ids = rig.enqueue(*["x"] * 1500)
    taken: list[list[str]] = [[] for _ in range(4)]

    def claims(store: Store, owner: int) -> None:
        while jobs := store.claim(MODEL, owner=str(owner), limit=7, lease_s=60, idle=True).jobs:
            taken[owner] += [one.lease.job_id for one in jobs]

    together(*(partial(claims, other(rig), n) for n in range(4)))
    assert sorted(itertools.chain.from_iterable(taken)) == sorted(ids)


def test_of_concurrent_submits_with_one_idempotency_key_one_job_comes(rig: Rig) -> None:
    got: list[str] = []
    stores = [other(rig) for _ in range(4)]

    def submits(store: Store) -> None:
        from tests.producer.rig import job

        for i in range(50):
            got.append(f"{i} {store.enqueue([job('x', idempotency_key=str(i))])[0].job_id}")

    together(*(partial(submits, store) for store in stores))
    assert len(set(got)) == 50
    assert rig.depth() == 50


def test_jobs_that_wander_between_leaders_are_all_finished_once(rig: Rig) -> None:
    """Leaders drain, crash (after clearing), lose leases; at the end each job has one result and nothing is left."""
    ids = rig.enqueue(*["x"] * 200)
    finished: Counter[str] = Counter()
    lock = threading.Lock()

    def leads(store: Store, owner: str, seed: int) -> None:
        dice = random.Random(seed)
        while True:
            claim = store.claim(MODEL, owner=owner, limit=5, lease_s=60, idle=True)
            if not claim.jobs:
                return
            for one in claim.jobs:
                fate = dice.random()
                if fate < 0.2:
                    store.release([one.lease], reason=ReleaseReason.DRAINED)
                elif fate < 0.35:
                    store.clear(one.lease)
                    store.release([one.lease], reason=ReleaseReason.CRASHED)
                elif store.commit([done(one.lease)]) == [Verdict.COMMITTED]:
                    with lock:
                        finished[one.lease.job_id] += 1

    together(*(partial(leads, other(rig), str(n), n) for n in range(3)))
    leads(rig.store, "last", 99)
    assert set(finished) == set(ids)
    assert set(finished.values()) == {1}
    assert rig.depth() == 0
    if isinstance(rig, MemoryRig):
        assert rig.memory._records.queues[MODEL].queued.total() == 0

"""Both clients: enqueue, wait, stream, cancel, many at once."""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from hortator.producer import (
    AsyncClient,
    BadRequest,
    Client,
    Job,
    JobCancelled,
    JobExpired,
    JobFailed,
    Priority,
    Sampling,
    State,
    StoreUnavailable,
    UnknownJob,
)
from hortator.producer.embedded import EmbeddedRedis
from hortator.producer.job import Patience
from hortator.producer.memory_async import AsyncMemoryStore
from hortator.producer.redis_store import AsyncRedisStore
from hortator.producer.schema import Failure
from hortator.producer.store import Claimed, Lease, Outcome
from tests.producer.rig import MODEL, NAMESPACE, MemoryRig, RedisRig, Rig, done, job, prompt_of, result, tokens


class Worker:
    """A leader in a thread: echoes each prompt a character at a time; `fail`, `slow` prompts do as they say."""

    def __init__(self, rig: Rig, step_s: float = 0.002) -> None:
        self.store = rig.another() if isinstance(rig, RedisRig) else rig.store
        self.step_s = step_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> "Worker":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _serve(self) -> None:
        while not self._stop.is_set():
            claim = self.store.claim(MODEL, owner="w", limit=50, lease_s=60, idle=True)
            for one in claim.jobs:
                self._run(one)
            time.sleep(self.step_s)

    def _run(self, one: Claimed) -> None:
        prompt = prompt_of(one.message)
        if prompt == "fail":
            failure = Failure(code="engine_error", message="as asked")
            self.store.commit([Outcome(one.lease, State.FAILED, failure=failure)])
            return
        for i, character in enumerate(prompt):
            signals = self.store.append([tokens(one.lease, i, ord(character), text=character)])
            if signals.cancelled:
                self.store.commit([Outcome(one.lease, State.CANCELLED)])
                return
            time.sleep(0.05 if prompt.startswith("slow") else 0)
        self.store.commit([done(one.lease, prompt)])


@pytest.fixture
def client(rig: Rig) -> Client:
    return Client(rig.store)


@pytest.fixture
def working(rig: Rig) -> Iterator[Worker]:
    with Worker(rig) as worker:
        yield worker


def asynchronously(rig: Rig, scenario: Callable[[AsyncClient], Coroutine[Any, Any, None]]) -> None:
    """Run the scenario with an AsyncClient on the rig's store."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[AsyncClient]:
        if isinstance(rig, RedisRig):
            store = AsyncRedisStore(rig.url, namespace=NAMESPACE, rules=rig.store.rules, timeout_s=10)  # type: ignore[attr-defined]
            async with AsyncClient(store) as client:
                yield client
        else:
            assert isinstance(rig, MemoryRig)
            async with AsyncClient(AsyncMemoryStore(rig.memory)) as client:
                yield client

    async def main() -> None:
        async with opened() as client:
            await asyncio.wait_for(scenario(client), 20)

    asyncio.run(main())


@pytest.mark.usefixtures("working")
def test_a_prompt_goes_in_and_its_answer_comes_out(client: Client) -> None:
    handle = client.enqueue("hello", model=MODEL, sampling=Sampling(max_tokens=5), priority="batch")
    assert handle.result(timeout_s=10).text == "hello"
    assert handle.status().state is State.SUCCEEDED
    assert handle.result().text == "hello"


@pytest.mark.usefixtures("working")
def test_a_stream_gives_every_token_once_and_ends(client: Client) -> None:
    handle = client.enqueue("slow tokens", model=MODEL)
    chunks = list(handle.stream(timeout_s=10))
    assert "".join(chunk.text for chunk in chunks) == "slow tokens"
    assert [chunk.index for chunk in chunks] == list(range(len("slow tokens")))
    assert "".join(chunk.text for chunk in handle.stream(after=5)) == "tokens"


def test_a_stream_of_a_job_whose_journal_expired_comes_from_its_result(rig: Rig, client: Client) -> None:
    rig.rule(journal_ttl_s=0.02)
    client = Client(rig.store)
    handle = client.enqueue("x", model=MODEL)
    lease = rig.claim_one()
    rig.store.append([tokens(lease, 0, 1, text="do")])
    rig.store.commit([Outcome(lease, State.SUCCEEDED, result("done", (1, 2)))])
    rig.wait(0.05)
    assert [(chunk.index, chunk.token_ids, chunk.text) for chunk in handle.stream()] == [(0, (1, 2), "done")]
    assert list(handle.stream(after=2)) == []
    with pytest.raises(UnknownJob) as caught:
        list(handle.stream(after=1))
    assert caught.value.gone


def test_a_stream_goes_on_through_a_crash_of_the_leader(rig: Rig, client: Client) -> None:
    from hortator.producer.store import ReleaseReason

    handle = client.enqueue("x", model=MODEL)
    got: list[int] = []
    reader = threading.Thread(target=lambda: got.extend(t for c in handle.stream(timeout_s=10) for t in c.token_ids))
    store = rig.another() if isinstance(rig, RedisRig) else rig.store
    reader.start()
    lease = store.claim(MODEL, owner="a", limit=1, lease_s=60, idle=True).jobs[0].lease
    store.append([tokens(lease, 0, 1, 2)])
    store.release([lease], reason=ReleaseReason.CRASHED)
    [again] = store.claim(MODEL, owner="b", limit=1, lease_s=60, idle=True).jobs
    assert len(again.journal) == 1
    store.append([tokens(again.lease, 2, 3)])
    store.commit([Outcome(again.lease, State.SUCCEEDED, result("t", (1, 2, 3)))])
    reader.join()
    assert got == [1, 2, 3]


@pytest.mark.usefixtures("working")
def test_a_failure_is_raised_with_its_reason(client: Client) -> None:
    handle = client.enqueue("fail", model=MODEL)
    with pytest.raises(JobFailed, match="as asked") as caught:
        handle.result(timeout_s=10)
    assert (caught.value.reason, caught.value.job_id) == ("engine_error", handle.id)
    with pytest.raises(JobFailed):
        list(handle.stream())


@pytest.mark.usefixtures("working")
def test_a_running_job_can_be_cancelled(client: Client) -> None:
    handle = client.enqueue("slow" * 50, model=MODEL)
    next(handle.stream(timeout_s=10))
    assert handle.cancel() is State.RUNNING
    with pytest.raises(JobCancelled) as caught:
        handle.result(timeout_s=10)
    assert str(caught.value) == f"job {handle.id} was cancelled"


def test_a_queued_job_ends_at_its_deadline_with_no_worker_alive(client: Client) -> None:
    handle = client.enqueue("x", model=MODEL, deadline_s=0.05)
    with pytest.raises(JobExpired) as caught:
        handle.result(timeout_s=10)
    assert str(caught.value) == f"job {handle.id} expired: its deadline passed while it was queued"


def test_waiting_ends_when_the_time_is_up(client: Client) -> None:
    handle = client.enqueue("x", model=MODEL)
    for wait in (lambda: handle.result(timeout_s=0.05), lambda: list(handle.stream(timeout_s=0.05))):
        started = time.monotonic()
        with pytest.raises(TimeoutError) as caught:
            wait()
        assert str(caught.value) == f"time is up, still waiting for job {handle.id}"
        assert time.monotonic() - started < 5


def test_of_many_jobs_a_timeout_names_a_few(client: Client) -> None:
    for number, named in ((2, "2 jobs (j0, j1)"), (10, "10 jobs (j0, j1, j2 and 7 more)")):
        handles = [client.enqueue_many([job()])[0] for _ in range(number)]
        with pytest.raises(TimeoutError) as caught:
            list(client.as_completed(handles, timeout_s=0.01))
        found = str(caught.value)
        for place, handle in enumerate(handles):
            found = found.replace(handle.id, f"j{place}")
        assert found == f"time is up, still waiting for {named}"


def test_a_timeout_says_that_redis_did_not_answer() -> None:
    with Client("redis://127.0.0.1:1") as client:
        for wait in (client.job("x").result, lambda timeout_s: list(client.job("x").stream(timeout_s=timeout_s))):
            with pytest.raises(TimeoutError, match=r"for job x: Redis at 127.0.0.1:1 does not answer") as caught:
                wait(timeout_s=0.05)
            assert isinstance(caught.value.__cause__, StoreUnavailable)


def test_a_timeout_does_not_blame_a_redis_that_answers_again() -> None:
    patience = Patience(10)
    patience.bear(StoreUnavailable("away"))
    assert str(patience.too_late("job x")).endswith("job x: away")
    patience.good()
    assert str(patience.too_late("job x")).endswith("job x")


def test_unknown_jobs_are_told_from_gone_ones(rig: Rig) -> None:
    rig.rule(result_ttl_s=0.02)
    client = Client(rig.store)
    handle = client.enqueue("x", model=MODEL)
    handle.cancel()
    rig.wait(0.05)
    for one, gone in ((handle, True), (client.job("never"), False), (client.job(handle.id, tenant="other"), False)):
        for ask in (one.status, one.cancel, one.result, lambda one=one: list(one.stream())):
            with pytest.raises(UnknownJob) as caught:
                ask()
            assert caught.value.gone is gone


@pytest.mark.usefixtures("working")
def test_as_completed_gives_every_handle_once_whatever_became_of_it(client: Client) -> None:
    prompts = ["a", "fail", "b", "c", "fail"] * 20
    handles = client.enqueue_many(job(prompt) for prompt in prompts)
    handles.append(client.enqueue("x", model=MODEL, tenant="acme"))
    handles.append(client.job("never"))
    got = list(client.as_completed(handles, timeout_s=20))
    assert sorted(handle.id for handle in got) == sorted(handle.id for handle in handles)
    texts = []
    for handle in got:
        try:
            texts.append(handle.result().text)
        except (JobFailed, UnknownJob) as error:
            texts.append(error.code)
    assert sorted(texts) == sorted([p if p != "fail" else "job_failed" for p in prompts] + ["x", "unknown_job"])


@pytest.mark.usefixtures("working")
def test_handles_of_one_job_are_each_given_by_as_completed(client: Client) -> None:
    handles = client.enqueue_many([*[job("same", idempotency_key="k")] * 2, job("other")])
    got = list(client.as_completed([*handles, handles[0]], timeout_s=10))
    assert sorted(map(id, got)) == sorted(map(id, handles))
    assert [handle.result(timeout_s=0).text for handle in handles] == ["same", "same", "other"]


@pytest.mark.usefixtures("working")
def test_one_id_of_two_tenants_is_two_jobs_to_as_completed(client: Client) -> None:
    mine = client.enqueue("x", model=MODEL)
    theirs = client.job(mine.id, tenant="acme")
    assert set(client.as_completed([mine, theirs], timeout_s=10)) == {mine, theirs}
    assert mine.result().text == "x"
    with pytest.raises(UnknownJob):
        theirs.result()


def test_results_of_many_come_in_one_call_without_waiting(rig: Rig, client: Client) -> None:
    a, b, c = client.enqueue_many(job(prompt) for prompt in "abc")
    rig.store.commit([done(rig.claim_one(), "A")])
    b.cancel()
    got = client.results([a.id, b.id, c.id, "never"])
    assert got[0] == result("A")
    assert isinstance(got[1], JobCancelled)
    assert got[2] is None
    assert isinstance(got[3], UnknownJob)
    assert [status.state.value if status else None for status in client.statuses([c.id, "never"])] == ["queued", None]


def test_watching_many_jobs_takes_one_question_at_a_time(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(rig.store)
    handles = client.enqueue_many(job() for _ in range(300))
    asked: list[int] = []
    ended = rig.store.ended

    def counted(job_ids: list[str], *, tenant: str | None = None) -> Any:
        asked.append(len(job_ids))
        return ended(job_ids, tenant=tenant)

    monkeypatch.setattr(rig.store, "ended", counted)
    with pytest.raises(TimeoutError):
        list(client.as_completed(handles, timeout_s=0.6))
    assert set(asked) == {300}
    assert len(asked) < 20  # the interval grows while nothing ends


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "^give exactly one of"),
        ({"prompt": "x", "token_ids": [1]}, "exactly one of"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"token_ids": [-1]}, "token_ids.0"),
        ({"token_ids": []}, "token_ids"),
        ({"messages": [{"role": "nobody", "content": "SECRET"}]}, "messages.0.role"),
        ({"prompt": "SECRET", "model": "bad name"}, "model"),
        ({"prompt": "SECRET", "priority": "urgent"}, "priority"),
        ({"prompt": "SECRET", "deadline_s": -1}, "deadline_s"),
        ({"prompt": "SECRET", "deadline_s": float("nan")}, "deadline_s"),
        ({"prompt": "SECRET", "metadata": {"k": 1}}, "metadata.k"),
        ({"prompt": "SECRET", "sampling": {"max_token": 3}}, "sampling.max_token: .*did you mean max_tokens"),
        ({"prompt": "SECRET", "tenant": "../x"}, "tenant"),
        ({"prompt": "SECRET\ud800"}, "prompt"),
    ],
)
def test_a_bad_job_is_refused_naming_the_field_and_not_the_prompt(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(BadRequest, match=named) as caught:
        Client(MemoryRig().store).enqueue(**({"model": MODEL} | fields))
    assert "SECRET" not in str(caught.value)


def test_messages_and_token_ids_are_inputs_too(rig: Rig, client: Client) -> None:
    client.enqueue(messages=[{"role": "user", "content": "hi"}], model=MODEL, priority=Priority.INTERACTIVE)
    client.enqueue(token_ids=[1, 2, 3], model=MODEL, metadata={"a": "b"})
    assert len(rig.claim().jobs) == 2


def test_the_clients_tenant_owns_its_jobs(rig: Rig) -> None:
    client = Client(rig.store, tenant="acme")
    handle = client.enqueue("x", model=MODEL)
    assert handle.status().tenant == "acme"
    assert client.job(handle.id).status().id == handle.id
    with pytest.raises(UnknownJob):
        Client(rig.store).job(handle.id).status()


def test_a_duplicate_is_marked_on_its_handle(client: Client) -> None:
    first = client.enqueue("x", model=MODEL, idempotency_key="k")
    again = client.enqueue("x", model=MODEL, idempotency_key="k")
    assert (again.id, first.duplicate, again.duplicate) == (first.id, False, True)


@pytest.mark.usefixtures("working")
def test_the_asyncio_client_does_the_same(rig: Rig) -> None:
    async def scenario(client: AsyncClient) -> None:
        handle = await client.enqueue("hello", model=MODEL)
        assert (await handle.result(timeout_s=10)).text == "hello"
        assert (await handle.status()).state is State.SUCCEEDED
        assert "".join([chunk.text async for chunk in handle.stream()]) == "hello"
        handles = await client.enqueue_many(job(prompt) for prompt in ("a", "fail", "b"))
        got = [one async for one in client.as_completed(handles, timeout_s=10)]
        assert {one.id for one in got} == {one.id for one in handles}
        with pytest.raises(JobFailed):
            await handles[1].result()
        slow = await client.enqueue("slow" * 50, model=MODEL)
        stream = slow.stream(timeout_s=10)
        await anext(stream)
        assert await slow.cancel() is State.RUNNING
        with pytest.raises(JobCancelled):
            await slow.result(timeout_s=10)
        outcomes = await client.results([handles[0].id, handles[1].id, "never"])
        assert [type(one).__name__ for one in outcomes] == ["Result", "JobFailed", "UnknownJob"]
        assert (await client.statuses(["never"])) == [None]
        for ask in (client.job("never").status, client.job("never").cancel, client.job("never").result):
            with pytest.raises(UnknownJob):
                await ask()
        assert (await client.queues())[0].model == MODEL

    asynchronously(rig, scenario)


@pytest.mark.usefixtures("working")
def test_the_asyncio_client_gives_each_handle_of_one_job_or_id(rig: Rig) -> None:
    async def scenario(client: AsyncClient) -> None:
        handles = await client.enqueue_many([job("same", idempotency_key="k")] * 2)
        handles.append(client.job(handles[0].id, tenant="acme"))
        got = [one async for one in client.as_completed([*handles, handles[0]], timeout_s=10)]
        assert sorted(map(id, got)) == sorted(map(id, handles))
        assert [(await handle.result()).text for handle in handles[:2]] == ["same", "same"]
        with pytest.raises(UnknownJob):
            await handles[2].result()

    asynchronously(rig, scenario)


def test_a_timeout_of_the_asyncio_client_says_that_redis_did_not_answer() -> None:
    async def main() -> None:
        async with AsyncClient("redis://127.0.0.1:1") as client:
            with pytest.raises(TimeoutError, match=r"waiting for job x: Redis at 127.0.0.1:1 does not") as caught:
                await client.job("x").result(timeout_s=0.05)
            assert isinstance(caught.value.__cause__, StoreUnavailable)

    asyncio.run(main())


def test_the_asyncio_client_waits_for_many_at_once(rig: Rig) -> None:
    async def scenario(client: AsyncClient) -> None:
        handles = await client.enqueue_many(Job(model=MODEL, prompt="x") for _ in range(50))
        waiting = [asyncio.create_task(handle.result()) for handle in handles]
        with pytest.raises(TimeoutError):
            await handles[0].result(timeout_s=0.05)
        for one in rig.claim().jobs:
            rig.store.commit([done(Lease(one.lease.job_id, 1))])
        assert len(await asyncio.gather(*waiting)) == 50

    asynchronously(rig, scenario)


def test_waiting_bears_with_a_restart_of_redis() -> None:
    with EmbeddedRedis() as server, Client(server.url, require_known_model=False) as client:
        handle = client.enqueue("x", model=MODEL)
        got: list[str] = []
        waiting = threading.Thread(target=lambda: got.append(handle.result(timeout_s=20).text))
        streaming = threading.Thread(target=lambda: got.extend(chunk.text for chunk in handle.stream(timeout_s=20)))
        waiting.start()
        streaming.start()
        server.kill()
        time.sleep(0.3)
        server.restart()
        store = client.store
        lease = store.claim(MODEL, owner="a", limit=1, lease_s=60, idle=True).jobs[0].lease
        store.append([tokens(lease, 0, 1, 2, text="done")])
        store.commit([done(lease)])
        waiting.join()
        streaming.join()
        assert got == ["done", "done"]


PATIENT: Any = {"require_known_model": False, "timeout_s": 20.0}  # a busy machine is no outage


def patient(server: EmbeddedRedis, **more: Any) -> Client:
    return Client(server.url, **PATIENT, **more)


def commit_one(client: Client) -> None:
    """A worker's part: the oldest job is done."""
    lease = client.store.claim(MODEL, owner="a", limit=1, lease_s=60, idle=True).jobs[0].lease
    client.store.commit([done(lease)])


def test_a_wait_tells_of_each_outage_once_and_at_once() -> None:
    told: queue.Queue[StoreUnavailable] = queue.Queue()
    with EmbeddedRedis() as server, patient(server, on_outage=told.put) as client:
        ended: queue.Queue[str] = queue.Queue()
        handles = client.enqueue_many(job() for _ in range(2))

        def wait() -> None:
            for handle in client.as_completed(handles):
                ended.put(handle.id)

        waiting = threading.Thread(target=wait)
        waiting.start()
        for handle in handles:
            server.kill()
            assert str(told.get(timeout=20)).startswith("Redis at")
            time.sleep(1)  # it is asked again some times
            server.restart()
            commit_one(client)
            assert ended.get(timeout=20) == handle.id
        waiting.join()
        assert told.empty()


def test_a_result_and_a_stream_that_begin_without_redis_tell_so() -> None:
    told: list[StoreUnavailable] = []
    with Client("redis://127.0.0.1:1", on_outage=told.append) as client:
        with pytest.raises(TimeoutError):
            client.job("x").result(timeout_s=0.5)
        assert len(told) == 1
        with pytest.raises(TimeoutError):
            list(client.job("x").stream(timeout_s=0.5))
        assert len(told) == 2


def test_what_on_outage_raises_ends_the_wait() -> None:
    class NoMore(Exception):
        pass

    def give_up(_: StoreUnavailable) -> None:
        raise NoMore

    with Client("redis://127.0.0.1:1", on_outage=give_up) as client, pytest.raises(NoMore):
        client.job("x").result()


def test_waits_of_the_asyncio_client_tell_of_each_outage_once() -> None:
    async def main() -> None:
        told: asyncio.Queue[StoreUnavailable] = asyncio.Queue()
        with EmbeddedRedis() as server, patient(server) as worker:
            async with AsyncClient(server.url, **PATIENT, on_outage=told.put_nowait) as client:
                waiting = client.as_completed(await client.enqueue_many([job(), job()]))
                for _ in range(2):
                    server.kill()
                    next_one = asyncio.ensure_future(anext(waiting))
                    assert "does not answer" in str(await asyncio.wait_for(told.get(), 20))
                    await asyncio.sleep(1)
                    server.restart()
                    commit_one(worker)
                    await asyncio.wait_for(next_one, 20)
                assert told.empty()
                server.kill()
                with pytest.raises(TimeoutError):
                    [_ async for _ in client.job("x").stream(timeout_s=0.5)]
                assert told.qsize() == 1

    asyncio.run(main())


def test_waiting_gives_up_on_a_redis_that_stays_away() -> None:
    with EmbeddedRedis() as server, Client(server.url, require_known_model=False, patience_s=0.2) as client:
        handle = client.enqueue("x", model=MODEL)
        server.kill()
        with pytest.raises(StoreUnavailable):
            handle.result()
        with pytest.raises(StoreUnavailable):
            list(handle.stream())

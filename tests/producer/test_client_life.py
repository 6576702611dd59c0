"""From a client's making to its closing: who may use it, and what it says afterwards."""

import asyncio
import subprocess
import sys
import threading
from typing import Any

import pytest

from hortator.producer import AsyncClient, Client, ClientUnusable
from tests.producer.rig import MODEL, RedisRig, Rig, done
from tests.producer.test_clients import asynchronously

CLOSED = "Client is closed .*: make another one, or close it later"

FORK = """
import os, sys
from hortator.producer import Client

client = Client(sys.argv[1], namespace=sys.argv[2], timeout_s=20)
mine = client.enqueue("x", model=sys.argv[3])
reader, writer = os.pipe()
child = os.fork()
ids = [client.enqueue("x", model=sys.argv[3]).id for _ in range(200)]
assert mine.status().state == "queued"
if child == 0:
    os.write(writer, " ".join(ids).encode())
    os._exit(0)
os.close(writer)
theirs = open(reader).read().split()
assert os.waitpid(child, 0)[1] == 0
print(len({mine.id, *ids, *theirs}))
"""


def test_every_call_of_a_closed_client_says_that_it_is_closed(rig: Rig) -> None:
    with Client(rig.store) as client:
        handle = client.enqueue("x", model=MODEL)
        stream, waiting = handle.stream(), client.as_completed([handle])
    calls: list[Any] = [
        lambda: client.enqueue("x", model=MODEL),
        lambda: client.enqueue_many([]),
        lambda: client.job(handle.id),
        lambda: client.statuses([handle.id]),
        lambda: client.results([handle.id]),
        lambda: next(stream),
        lambda: next(waiting),
        client.queues,
        client.__enter__,
        handle.status,
        handle.cancel,
        handle.result,
    ]
    for call in calls:
        with pytest.raises(ClientUnusable, match=CLOSED):
            call()


def test_every_call_of_a_closed_asyncio_client_says_that_it_is_closed(rig: Rig) -> None:
    async def scenario(client: AsyncClient) -> None:
        handle = await client.enqueue("x", model=MODEL)
        stream, waiting = handle.stream(), client.as_completed([handle])
        await client.aclose()
        calls: list[Any] = [
            lambda: client.enqueue("x", model=MODEL),
            lambda: client.enqueue_many([]),
            lambda: client.statuses([handle.id]),
            lambda: client.results([handle.id]),
            lambda: anext(stream),
            lambda: anext(waiting),
            client.queues,
            client.__aenter__,
            handle.status,
            handle.cancel,
            handle.result,
        ]
        for call in calls:
            with pytest.raises(ClientUnusable, match=CLOSED):
                await call()
        with pytest.raises(ClientUnusable, match=CLOSED):
            client.job(handle.id)

    asynchronously(rig, scenario)


def test_a_client_may_be_closed_twice_and_what_is_known_stays_known(rig: Rig) -> None:
    client = Client(rig.store)
    handle = client.enqueue("x", model=MODEL)
    rig.store.commit([done(rig.claim_one())])
    handle.result()
    client.close()
    client.close()
    assert handle.result().text == "done"


def test_an_asyncio_client_may_be_closed_twice(rig: Rig) -> None:
    async def scenario(client: AsyncClient) -> None:
        await client.enqueue("x", model=MODEL)
        await client.aclose()
        await client.aclose()

    asynchronously(rig, scenario)


def test_a_wait_ends_when_another_thread_closes_the_client(redis_rig: RedisRig) -> None:
    told: list[str] = []
    client = Client(redis_rig.another())
    handle = client.enqueue("x", model=MODEL)

    def wait() -> None:
        try:
            handle.result()
        except ClientUnusable as error:
            told.append(error.code)

    waiting = threading.Thread(target=wait)
    waiting.start()
    client.close()
    waiting.join(timeout=60)
    assert told == ["client_unusable"]


def test_threads_share_a_client(redis_rig: RedisRig) -> None:
    ids: list[str] = []
    client = Client(redis_rig.another())
    threads = [
        threading.Thread(target=lambda: ids.extend(client.enqueue("x", model=MODEL).id for _ in range(50)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == redis_rig.depth() == 400


def test_a_fork_and_its_parent_both_use_a_client_that_was_made_before(redis_rig: RedisRig) -> None:
    argv = [sys.executable, "-c", FORK, redis_rig.url, redis_rig.names.namespace, MODEL]
    ran = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert (ran.stdout, ran.stderr) == ("401\n", "")
    assert redis_rig.depth() == 401


def test_an_asyncio_client_of_another_event_loop_says_so(redis_rig: RedisRig) -> None:
    client = AsyncClient(redis_rig.url, namespace=redis_rig.names.namespace, timeout_s=20)

    async def scenario() -> str:
        return (await client.enqueue("x", model=MODEL)).id

    own = asyncio.new_event_loop()
    try:
        own.run_until_complete(scenario())
        for _ in range(2):
            with pytest.raises(ClientUnusable, match=r"another event loop, and asyncio\.run makes a new one each time"):
                asyncio.run(scenario())
            with pytest.raises(ClientUnusable, match="use and close an AsyncClient in one"):
                asyncio.run(client.aclose())
        own.run_until_complete(scenario())
        own.run_until_complete(client.aclose())
    finally:
        own.close()


def test_handles_of_an_asyncio_client_may_be_made_before_there_is_a_loop(redis_rig: RedisRig) -> None:
    [job_id] = redis_rig.enqueue("x")
    client = AsyncClient(redis_rig.url, namespace=redis_rig.names.namespace, timeout_s=20)
    handle = client.job(job_id)

    async def scenario() -> None:
        async with client:
            assert (await handle.status()).id == job_id

    asyncio.run(scenario())

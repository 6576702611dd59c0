"""Arguments of the clients' calls that are of no use: an error of the tree names each, before anything is done."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import pytest
import redis

from hortator.producer import AsyncClient, BadRequest, Client, Sampling
from hortator.producer.memory import MemoryStore
from hortator.producer.memory_async import AsyncMemoryStore
from tests.producer.rig import MODEL, MemoryRig

NAN = float("nan")
AN_ID = "an id (a str, as `handle.id`)"
NOT_NEGATIVE = "wanted is a number of seconds that is not negative"


def refusal(ask: Callable[[Client | AsyncClient], Any]) -> str:
    """What both clients say to a call, which must be the same but for their names."""
    with Client(MemoryRig().store) as client, pytest.raises(BadRequest) as caught:
        consumed(ask(client))

    async def main() -> str:
        async with AsyncClient(AsyncMemoryStore(MemoryRig().memory)) as client:
            with pytest.raises(BadRequest) as caught:
                await consumed_async(ask(client))
        return str(caught.value)

    said = asyncio.run(main())
    assert str(caught.value) == said.replace("AsyncJobHandle", "JobHandle")
    assert "SECRET" not in said
    return str(caught.value)


def consumed(answer: Any) -> None:
    if isinstance(answer, Iterator):
        list(answer)


async def consumed_async(answer: Any) -> None:
    if isinstance(answer, Coroutine):
        await answer
    elif isinstance(answer, AsyncIterator):
        [_ async for _ in answer]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": 5}, "prompt: Input should be a valid string (got int)"),
        ({"model": None}, "model: Input should be a valid string (got NoneType)"),
        ({"sampling": 5}, "sampling: Input should be a valid dictionary or instance of Sampling (got int)"),
        ({"sampling": "hot"}, "sampling: Input should be a valid dictionary or instance of Sampling"),
        ({"sampling": Sampling}, "instance of Sampling (got ModelMetaclass)"),
        ({"deadline_s": "soon"}, "deadline_s: Input should be a valid number"),
        ({"deadline_s": [1]}, "deadline_s: Input should be a valid number (got list)"),
        ({"priority": 5}, "priority: Input should be 'interactive', 'standard' or 'batch' (got int)"),
        ({"metadata": ["SECRET"]}, "metadata: Input should be a valid dictionary (got list)"),
        ({"messages": "SECRET", "prompt": None}, "messages: Input should be a valid tuple"),
        ({"messages": {"SECRET": 1}, "prompt": None}, "messages: Input should be a valid tuple (got dict)"),
        ({"idempotency_key": 5}, "idempotency_key: Input should be a valid string (got int)"),
        ({"tenant": 5}, "tenant: Input should be a valid string (got int)"),
        ({"tenant": ""}, "tenant: String should match pattern"),
        ({"max_tokens": 5, "top_p": 1}, "max_tokens, top_p: write it inside sampling"),
        ({"promt": "SECRET"}, "promt: Job has no field promt: did you mean prompt?"),
    ],
)
def test_a_field_of_a_wrong_type_or_name_is_named_with_what_is_wanted(fields: dict[str, Any], said: str) -> None:
    assert said in refusal(lambda client: client.enqueue(**({"model": MODEL, "prompt": "SECRET"} | fields)))


def test_none_is_as_good_as_left_out() -> None:
    fields: Any = dict.fromkeys(("messages", "token_ids", "sampling", "priority", "deadline_s", "tenant", "metadata"))
    assert Client(MemoryRig().store, tenant="acme").enqueue("x", model=MODEL, **fields).status().tenant == "acme"


@pytest.mark.parametrize(
    ("timeout_s", "got"), [(-1, "-1"), (-0.5, "-0.5"), (NAN, "nan"), ("5", "str"), ([1], "list"), (-(10**400), "-1000")]
)
@pytest.mark.parametrize("wait", ["result", "stream", "as_completed"])
def test_a_timeout_is_a_number_of_seconds(timeout_s: Any, got: str, wait: str) -> None:
    def ask(client: Client | AsyncClient) -> Any:
        handle: Any = client.job("x")
        if wait == "as_completed":
            return client.as_completed([handle], timeout_s=timeout_s)
        return getattr(handle, wait)(timeout_s=timeout_s)

    assert refusal(ask).startswith(f"timeout_s: {NOT_NEGATIVE}, got {got}")


@pytest.mark.parametrize("timeout_s", [float("inf"), 10**400, None])
def test_a_timeout_may_be_for_ever(timeout_s: Any) -> None:
    client = Client(MemoryRig().store)
    handle = client.enqueue("x", model=MODEL, deadline_s=0.05)
    assert list(client.as_completed([handle], timeout_s=timeout_s)) == [handle]


@pytest.mark.parametrize(("after", "got"), [(-1, "-1"), ("5", "str"), (1.5, "1.5"), (None, "NoneType")])
def test_a_stream_goes_on_after_a_whole_number_of_tokens(after: Any, got: str) -> None:
    said = refusal(lambda client: client.job("x").stream(after=after))
    assert said == f"after: wanted is a whole number that is not negative, got {got}"


@pytest.mark.parametrize(("job_id", "got"), [(5, "5"), (None, "NoneType"), (b"x", "bytes"), (["x"], "list")])
def test_an_id_is_a_text(job_id: Any, got: str) -> None:
    assert refusal(lambda client: client.job(job_id)) == f"job_id: wanted is a str, got {got}"


def test_a_tenant_of_a_handle_is_a_tenant() -> None:
    tenant: Any = 5
    said = refusal(lambda client: client.job("x", tenant=tenant))
    assert said == "tenant: Input should be a valid string (got int)"


@pytest.mark.parametrize("call", ["results", "statuses"])
@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (5, "job_ids: wanted is a list or another iterable, each element an id (a str, as `handle.id`), got 5"),
        (
            "SECRET",
            "job_ids: wanted is a list or another iterable, each element an id (a str, as `handle.id`), got str",
        ),
        (["x", None], f"job_ids[1]: wanted is {AN_ID}, got NoneType"),
        ([Client(MemoryStore()).job("x")], f"job_ids[0]: wanted is {AN_ID}, got JobHandle"),
    ],
)
def test_ids_are_several_texts(call: str, ids: Any, said: str) -> None:
    assert refusal(lambda client: getattr(client, call)(ids)) == said


def test_ids_may_come_from_any_iterable() -> None:
    client = Client(MemoryRig().store)
    handle = client.enqueue("x", model=MODEL)
    for ids in ({handle.id}, iter([handle.id]), (one for one in [handle.id])):
        assert len(client.results(ids)) == 1


@pytest.mark.parametrize(
    ("handles", "said"),
    [
        (5, "handles: wanted is a list or another iterable, each element a handle"),
        (["x"], "handles[0]: wanted is a handle (JobHandle, as of `job(ID)`), got str"),
        ([None], "handles[0]: wanted is a handle (JobHandle, as of `job(ID)`), got NoneType"),
    ],
)
def test_handles_are_awaited_and_nothing_else(handles: Any, said: str) -> None:
    assert refusal(lambda client: client.as_completed(handles)).startswith(said)


def test_a_handle_of_the_other_client_is_told_from_ones_own() -> None:
    theirs: Any = AsyncClient(AsyncMemoryStore()).job("x")
    with pytest.raises(BadRequest, match=r"handles\[0\]: wanted is a handle \(JobHandle.*got AsyncJobHandle"):
        list(Client(MemoryStore()).as_completed([theirs]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tenant": 5}, "tenant: Input should be a valid string (got int)"),
        ({"tenant": "a b"}, "tenant: String should match"),
        ({"patience_s": "x"}, f"patience_s: {NOT_NEGATIVE}, got str"),
        ({"patience_s": NAN}, f"patience_s: {NOT_NEGATIVE}, got nan"),
        ({"on_outage": 5}, "on_outage: wanted is a function of one error, or None, got 5"),
        ({"where": 5}, "where: wanted is a Redis URL, a store, or None for the environment's, got 5"),
        ({"where": redis.Redis()}, "where: wanted is a Redis URL, a store, or None for the environment's, got Redis"),
    ],
)
@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_a_client_is_not_made_with_what_it_cannot_use(client: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequest) as caught:
        client(**options)
    assert str(caught.value).startswith(said)


def test_a_store_of_the_other_kind_is_refused_with_the_client_that_takes_it() -> None:
    asyncs: Any = AsyncMemoryStore()
    with pytest.raises(BadRequest, match="where: wanted is a store, or AsyncClient, got AsyncMemoryStore"):
        Client(asyncs)
    blocking: Any = MemoryStore()
    with pytest.raises(BadRequest, match="where: wanted is a store for asyncio, or Client, got MemoryStore"):
        AsyncClient(blocking)

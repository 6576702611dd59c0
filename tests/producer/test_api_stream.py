"""Tokens as server-sent events: live, resumed, and across a crash of the group that computes them."""

import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from hortator.producer.embedded import EmbeddedRedis
from hortator.producer.errors import StoreUnavailable
from hortator.producer.redis_store import AsyncRedisStore
from hortator.producer.schema import Chunk
from hortator.producer.store import ReleaseReason
from tests.producer.api_process import Api, Event, events, newest, served, wait_for


@pytest.fixture(scope="module")
def server(redis_servers: dict[str, EmbeddedRedis]) -> Iterator[Api]:
    with served(newest(redis_servers), keep_alive_s=0.2) as running:
        yield running


@pytest.fixture
def api(server: Api) -> Api:
    return server.fresh()


def read(api: Api, job_id: str, *, after: int = 0, last_id: str | None = None, limit: int = 1000) -> list[Event]:
    """A client that leaves after `limit` events."""
    headers = {"last-event-id": last_id} if last_id is not None else {}
    found: list[Event] = []
    with api.http.stream("GET", f"/v1/jobs/{job_id}/tokens", params={"after": after}, headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        for event in events(answer.iter_lines()):
            found.append(event)
            if len(found) == limit:
                break
    return found


def text(found: list[Event]) -> str:
    return "".join(event.json["text"] for event in found if event.kind == "message")


def test_a_stream_gives_every_token_and_then_the_status(api: Api) -> None:
    job_id = api.submit()
    words = [f"w{n} " for n in range(30)]
    worker = threading.Thread(target=api.worker.run_one, args=(words,))
    worker.start()
    found = read(api, job_id)
    worker.join()
    assert text(found) == "".join(words)
    assert [event.kind for event in found].count("done") == 1
    assert found[-1].kind == "done"
    assert found[-1].json["state"] == "succeeded"
    assert found[-1].json["result"]["text"] == "".join(words)


def test_tokens_come_while_the_job_runs(api: Api) -> None:
    job_id = api.submit()
    [claimed] = api.worker.claim()
    api.worker.say(claimed, 0, ["4"])
    [first] = read(api, job_id, limit=1)
    assert (first.json["text"], first.id) == ("4", "1")
    assert api.http.get(f"/v1/jobs/{job_id}").json()["state"] == "running"


def test_the_event_id_is_the_number_of_tokens_so_far(api: Api) -> None:
    job_id = api.submit()
    api.worker.run_one(["a", "b", "c"])
    found = read(api, job_id)[:-1]
    assert [int(event.id or 0) for event in found] == [e.json["index"] + len(e.json["token_ids"]) for e in found]
    assert found[-1].id == "3"


@pytest.mark.parametrize("seen", range(7))
def test_after_any_token_a_stream_gives_exactly_the_rest(api: Api, seen: int) -> None:
    job_id = api.submit()
    words = ["a", "bb", "c", "dd", "e", "ff"]
    api.worker.run_one(words)
    assert text(read(api, job_id, after=seen)) == "".join(words[seen:])
    assert text(read(api, job_id, last_id=str(seen))) == "".join(words[seen:])


def test_last_event_id_wins_over_the_first_url(api: Api) -> None:
    job_id = api.submit()
    api.worker.run_one(["a", "b", "c"])
    assert text(read(api, job_id, after=0, last_id="2")) == "c"


def test_a_client_that_loses_the_connection_again_and_again_misses_and_repeats_nothing(api: Api) -> None:
    job_id = api.submit()
    words = [f"{n}," for n in range(40)]

    def work() -> None:
        [claimed] = api.worker.claim()
        for index, word in enumerate(words):
            api.worker.say(claimed, index, [word])
            time.sleep(0.01)
        api.worker.succeed(claimed, words)

    worker = threading.Thread(target=work)
    worker.start()
    found: list[Event] = []
    while not found or found[-1].kind != "done":
        found += read(api, job_id, last_id=found[-1].id if found else None, limit=3)
    worker.join()
    assert text(found) == "".join(words)


def test_a_stream_goes_on_when_another_group_takes_over(api: Api) -> None:
    job_id = api.submit()
    found: list[Event] = []
    reader = threading.Thread(target=lambda: found.extend(read(api, job_id)))
    reader.start()
    [claimed] = api.worker.claim()
    api.worker.say(claimed, 0, ["a", "b"])
    wait_for("the first tokens", lambda: api.app.state.watcher.waiters == 1)
    api.store.release([claimed.lease], reason=ReleaseReason.CRASHED)
    [again] = api.worker.claim()
    assert [chunk.text for chunk in again.journal] == ["a", "b"]
    api.worker.say(again, 2, ["c"])
    api.worker.succeed(again, ["a", "b", "c"])
    reader.join(10)
    assert text(found) == "abc"
    assert found[-1].json["attempt"] == 2


def test_a_silent_stream_is_kept_alive_by_comments(api: Api) -> None:
    job_id = api.submit()
    comments: list[str] = []
    finish = threading.Timer(0.7, api.worker.run_one)
    finish.start()
    with api.http.stream("GET", f"/v1/jobs/{job_id}/tokens") as answer:
        list(events(answer.iter_lines(), comments=comments))
    finish.join()
    assert len(comments) >= 2


def test_the_stream_of_a_failed_job_ends_with_the_reason(api: Api) -> None:
    job_id = api.submit()
    [claimed] = api.worker.claim()
    api.worker.fail(claimed, "poison", "it took two groups down")
    [done] = read(api, job_id)
    assert (done.kind, done.json["failure"]["code"]) == ("done", "poison")


def test_a_browser_that_has_read_everything_is_told_not_to_come_back(api: Api) -> None:
    job_id = api.submit()
    api.worker.run_one()
    last = read(api, job_id)[-1].id
    answer = api.http.get(f"/v1/jobs/{job_id}/tokens", headers={"last-event-id": str(last)})
    assert answer.status_code == 204


@pytest.mark.parametrize("position", ["x", "-1", "1.5", "", "9" * 40])
def test_a_wrong_last_event_id_is_refused(api: Api, position: str) -> None:
    job_id = api.submit()
    answer = api.http.get(f"/v1/jobs/{job_id}/tokens", headers={"last-event-id": position})
    assert answer.status_code == 400


def test_a_journal_that_cannot_be_read_for_a_moment_is_read_again(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = api.submit()
    api.worker.run_one(["a", "b"])
    real, calls = AsyncRedisStore.chunks, []

    async def shaky(self: AsyncRedisStore, job_id: str, *, after: int = 0) -> list[Chunk]:
        calls.append(after)
        if len(calls) <= 2:
            raise StoreUnavailable("away for a moment")
        return await real(self, job_id, after=after)

    monkeypatch.setattr(AsyncRedisStore, "chunks", shaky)
    assert text(read(api, job_id)) == "ab"
    assert len(calls) == 3


def test_when_the_journal_has_expired_the_result_stands_in_for_it(api: Api) -> None:
    job_id = api.submit()
    api.worker.run_one(["a", "b", "c"])
    assert api.redis.delete(f"hortator:journal:{job_id}") == 1
    assert text(read(api, job_id)) == "abc"
    resumed = read(api, job_id, last_id="1")
    assert [event.kind for event in resumed] == ["done"], "a text cannot be cut at tokens; done has all of it"
    assert resumed[0].json["result"]["text"] == "abc"


def test_the_stream_of_an_unknown_job_is_404(api: Api) -> None:
    assert api.http.get("/v1/jobs/never-issued/tokens").status_code == 404


def test_a_reader_that_leaves_is_forgotten(api: Api) -> None:
    job_id = api.submit()
    path = f"/v1/jobs/{job_id}/tokens"
    with pytest.raises(httpx.ReadTimeout), api.http.stream("GET", path, timeout=0.1) as answer:
        list(answer.iter_lines())
    wait_for("the watch to go", lambda: api.app.state.watcher.waiters == 0)


def test_a_stopping_server_answers_long_polls_and_ends_streams_to_be_resumed(newest_redis_url: str) -> None:
    answers: list[object] = []
    with served(newest_redis_url) as api:
        job_id = api.submit()
        [claimed] = api.worker.claim()
        api.worker.say(claimed, 0, ["a"])
        poll = threading.Thread(
            target=lambda: answers.append(
                httpx.get(f"{api.url}/v1/jobs/{job_id}?wait_s=30", timeout=20).json()["state"]
            )
        )
        stream = threading.Thread(target=lambda: answers.append(read(api, job_id)))
        poll.start()
        stream.start()
        wait_for("two waiters", lambda: api.app.state.watcher.waiters == 2)
        time.sleep(0.2)
        began = time.monotonic()
        api.server.should_exit = True
        poll.join(5)
        stream.join(5)
        assert time.monotonic() - began < 2
    assert "running" in answers
    [found] = [answer for answer in answers if isinstance(answer, list)]
    assert [(event.kind, event.id) for event in found] == [("message", "1"), ("interrupted", None)], (
        "no done event, and no id: the client resumes after 1"
    )
    assert found[-1].json["error"]["code"] == "server_stopping"
    assert "Last-Event-ID" in found[-1].json["error"]["message"]


def test_a_stream_that_was_interrupted_goes_on_at_another_server(newest_redis_url: str) -> None:
    """The client that docs/06-polling-api.md describes: whatever ends without `done`, come back with the last id."""
    with served(newest_redis_url) as other:
        with served(newest_redis_url) as first:
            job_id = first.submit()
            [claimed] = first.worker.claim()
            first.worker.say(claimed, 0, ["a", "b"])
            found: list[Event] = []
            reader = threading.Thread(target=lambda: found.extend(read(first, job_id)))
            reader.start()
            wait_for("the reader", lambda: first.app.state.watcher.waiters == 1)
            first.server.should_exit = True
            reader.join(20)
        last = [event.id for event in found if event.id][-1]
        other.worker.say(claimed, 2, ["c"])
        other.worker.succeed(claimed, ["a", "b", "c"])
        found += read(other, job_id, last_id=last)
    assert [event.kind for event in found] == ["message", "message", "interrupted", "message", "done"]
    assert text(found) == "abc"


def damage_journal(api: Api, job_id: str, how: str) -> None:
    """Behind the second of its tokens."""
    key = f"hortator:journal:{job_id}"
    api.redis.xdel(key, "3-0")
    if how == "garbage":
        api.redis.xadd(key, {"c": "{"}, id="4-1")
    elif how == "no chunk":
        api.redis.xadd(key, {"c": '["x", 3, 4]'}, id="4-1")
    elif how == "a gap":
        api.redis.xadd(key, {"c": '[3,[3],"d",null]'}, id="4-1")
    elif how == "another type":
        api.redis.delete(key)
        api.redis.set(key, "x")


@pytest.mark.parametrize("how", ["garbage", "no chunk", "a gap", "nothing", "another type"])
def test_the_stream_of_a_damaged_journal_says_so_and_later_gives_the_whole(api: Api, how: str) -> None:
    job_id = api.submit()
    [claimed] = api.worker.claim()
    api.worker.say(claimed, 0, ["a", "b", "c"])
    damage_journal(api, job_id, how)
    readable = "ab" if how == "nothing" else ""
    found = read(api, job_id)
    assert (text(found), found[-1].kind, found[-1].json["error"]["code"]) == (readable, "interrupted", "damaged")
    assert job_id in found[-1].json["error"]["message"]
    if how != "another type":  # that job fails when its next token comes
        api.worker.succeed(claimed, ["a", "b", "c"])
        assert text(read(api, job_id)) == "abc", "the result has what the journal lacks"
        assert [event.kind for event in read(api, job_id, last_id="2")] == ["done"]

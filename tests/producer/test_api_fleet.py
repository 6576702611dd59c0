"""Queues, dead letters, metrics and health."""

from collections.abc import Iterator

import pytest

from hortator.producer.embedded import EmbeddedRedis
from hortator.producer.store import GroupBeat
from tests.producer.api_process import Api, job, newest, served


@pytest.fixture(scope="module")
def server(redis_servers: dict[str, EmbeddedRedis]) -> Iterator[Api]:
    with served(newest(redis_servers)) as running:
        yield running


@pytest.fixture
def api(server: Api) -> Api:
    return server.fresh()


def test_queues_show_what_waits_what_runs_and_who_is_alive(api: Api) -> None:
    for n in range(3):
        api.submit(str(n))
    api.worker.beat()
    api.worker.claim(1)
    [queue] = api.http.get("/v1/queues").json()["queues"]
    assert (queue["model"], queue["depth"], queue["running"], queue["suspects"]) == ("demo", 2, 1, 0)
    assert 0 <= queue["oldest_age_s"] < 10
    assert [(g["group"], g["state"], g["capacity"], g["epoch"]) for g in queue["groups"]] == [
        ("test-worker", "ready", 8, 1)
    ]
    assert "hindrance" not in queue


def test_a_queue_that_no_group_serves_says_so(api: Api) -> None:
    api.submit("x")
    api.store.beat(GroupBeat("test-worker", "demo", 0, 8, 1, "gone"))
    [queue] = api.http.get("/v1/queues").json()["queues"]
    assert (queue["groups"], queue["hindrance"]["why"]) == ([], "no_group")
    assert "no group is alive" in queue["hindrance"]["text"]


def test_dead_letters_are_shown_with_their_bytes_made_harmless(api: Api) -> None:
    api.store.bury("demo", b"\x1b[31m\xff\x00 not json", reason="not JSON")
    [letter] = api.http.get("/v1/dead-letters").json()["dead_letters"]
    assert (letter["model"], letter["reason"], letter["message_bytes"]) == ("demo", "not JSON", 16)
    assert "\x1b" not in letter["message"]
    assert "\\xff" in letter["message"]


def test_dead_letters_come_newest_first_and_page_by_page(api: Api) -> None:
    for n in range(5):
        api.store.bury("demo", b"x", reason=str(n))
    first = api.http.get("/v1/dead-letters", params={"limit": 2}).json()["dead_letters"]
    then = api.http.get("/v1/dead-letters", params={"before": first[-1]["letter_id"]}).json()["dead_letters"]
    assert [letter["reason"] for letter in first + then] == ["4", "3", "2", "1", "0"]


@pytest.mark.parametrize("before", ["x", "1-1-1", "\u00e9", "-", "(", "9" * 16])
def test_a_wrong_page_mark_is_refused_and_no_500(api: Api, before: str) -> None:
    assert api.http.get("/v1/dead-letters", params={"before": before}).status_code == 422


def test_a_full_queue_says_when_to_come_back(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    from hortator.producer.errors import QueueFull
    from hortator.producer.redis_store import AsyncRedisStore

    async def full(*_: object, **__: object) -> None:
        raise QueueFull("demo has 10 jobs, the limit is 10", retry_after_s=6.2)

    monkeypatch.setattr(AsyncRedisStore, "enqueue", full)
    answer = api.http.post("/v1/jobs", json=job())
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
    assert answer.headers["retry-after"] == "7"


def test_metrics_hold_the_queues_and_the_requests_by_route_not_by_id(newest_redis_url: str) -> None:
    with served(newest_redis_url) as api:
        job_id = api.submit()
        api.http.get(f"/v1/jobs/{job_id}")
        api.http.get("/no/such/route")
        api.store.bury("demo", b"x", reason="not JSON")
        answer = api.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    lines = answer.text.splitlines()
    assert 'hortator_queue_depth{model="demo"} 1.0' in lines
    assert "hortator_dead_letters 1.0" in lines
    assert 'hortator_groups_alive{model="demo"} 1.0' in lines
    assert 'hortator_http_requests_total{method="POST",route="/v1/jobs",status="202"} 1.0' in lines
    assert 'hortator_http_requests_total{method="GET",route="/v1/jobs/{job_id}",status="200"} 1.0' in lines
    assert 'hortator_http_requests_total{method="GET",route="none",status="404"} 1.0' in lines
    assert job_id not in answer.text


def test_the_probes_say_that_all_is_well(api: Api) -> None:
    assert api.http.get("/healthz").json() == {"status": "ok"}
    assert api.http.get("/readyz").json() == {"status": "ready"}


def test_a_bug_is_a_500_that_tells_nothing_of_our_insides(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    from hortator.producer.redis_store import AsyncRedisStore

    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret inside")

    monkeypatch.setattr(AsyncRedisStore, "queues", broken)
    answer = api.http.get("/v1/queues")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")
    assert "secret" not in answer.text

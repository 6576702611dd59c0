"""Redis away, stopped, full, restarted: the API says so at once, and recovers by itself."""

import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from hortator.producer.embedded import EmbeddedRedis
from tests.producer.api_process import Api, events, job, served, wait_for


@pytest.fixture
def redis() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def api(redis: EmbeddedRedis) -> Iterator[Api]:
    with served(redis.url, keep_alive_s=0.2) as running:
        assert running.http.get("/readyz").status_code == 200
        yield running


def refused_within(api: Api, limit_s: float) -> None:
    """Every route that needs Redis answers 503 with a Retry-After, in time."""
    for method, path, body in (
        ("POST", "/v1/jobs", job()),
        ("GET", "/v1/jobs/some-id", None),
        ("GET", "/v1/jobs/some-id?wait_s=10", None),
        ("GET", "/v1/jobs/some-id/tokens", None),
        ("DELETE", "/v1/jobs/some-id", None),
        ("POST", "/v1/jobs:status", {"ids": ["x"]}),
        ("GET", "/v1/queues", None),
        ("GET", "/readyz", None),
    ):
        began = time.monotonic()
        answer = api.http.request(method, path, json=body)
        took = time.monotonic() - began
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable"), path
        assert int(answer.headers["retry-after"]) >= 1
        assert took < limit_s, (path, took)


def test_a_dead_redis_is_said_within_300_ms_and_a_new_one_is_found(redis: EmbeddedRedis, api: Api) -> None:
    job_id = api.submit()
    redis.kill()
    refused_within(api, 0.3)
    assert api.http.get("/healthz").status_code == 200
    assert "hortator_store_up 0.0" in api.http.get("/metrics").text
    redis.restart()
    wait_for("readyz", lambda: api.http.get("/readyz").status_code == 200)
    assert api.http.get(f"/v1/jobs/{job_id}").json()["state"] == "queued", "what was accepted is still there"
    api.submit()
    assert "hortator_store_up 1.0" in api.http.get("/metrics").text


def test_a_stopped_redis_is_said_within_300_ms_and_found_again(redis: EmbeddedRedis, api: Api) -> None:
    redis.pause()
    try:
        refused_within(api, 0.3)
    finally:
        redis.resume()
    wait_for("readyz", lambda: api.http.get("/readyz").status_code == 200)
    api.submit()


def test_a_long_poll_outlives_a_restart_of_redis(redis: EmbeddedRedis, api: Api) -> None:
    job_id = api.submit()
    answers: list[httpx.Response] = []
    poll = threading.Thread(
        target=lambda: answers.append(httpx.get(f"{api.url}/v1/jobs/{job_id}?wait_s=20", timeout=30))
    )
    poll.start()
    wait_for("the poll to wait", lambda: api.app.state.watcher.waiters == 1)
    redis.kill()
    time.sleep(0.3)
    redis.restart()
    api.worker.run_one()
    poll.join(15)
    assert (answers[0].status_code, answers[0].json()["state"]) == (200, "succeeded")


def test_a_long_poll_whose_time_ends_in_an_outage_is_503(redis: EmbeddedRedis, api: Api) -> None:
    job_id = api.submit()
    kill = threading.Timer(0.3, redis.kill)
    kill.start()
    answer = api.http.get(f"/v1/jobs/{job_id}", params={"wait_s": 1})
    kill.join()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")


def test_a_stream_outlives_a_restart_of_redis(redis: EmbeddedRedis, api: Api) -> None:
    job_id = api.submit()
    found: list[str] = []

    def read() -> None:
        with httpx.stream("GET", f"{api.url}/v1/jobs/{job_id}/tokens", timeout=20) as answer:
            found.extend(event.kind for event in events(answer.iter_lines()))

    reader = threading.Thread(target=read)
    reader.start()
    wait_for("the stream to wait", lambda: api.app.state.watcher.waiters == 1)
    redis.kill()
    time.sleep(0.3)
    redis.restart()
    api.worker.run_one(["4", "2"])
    reader.join(15)
    assert found[-1] == "done"
    assert "message" in found


def test_a_stream_whose_outage_is_too_long_says_so_and_goes_on_later(redis: EmbeddedRedis) -> None:
    with served(redis.url, keep_alive_s=0.2, outage_s=0.5) as api:
        job_id = api.submit()
        [claimed] = api.worker.claim()
        api.worker.say(claimed, 0, ["a"])
        with api.http.stream("GET", f"/v1/jobs/{job_id}/tokens") as answer:
            found = events(answer.iter_lines())
            assert next(found).id == "1"
            redis.kill()
            [last] = found
        assert (last.kind, last.id, last.json["error"]["code"]) == ("interrupted", None, "store_unavailable")
        redis.restart()
        wait_for("readyz", lambda: api.http.get("/readyz").status_code == 200)
        with api.http.stream("GET", f"/v1/jobs/{job_id}/tokens", headers={"last-event-id": "1"}) as answer:
            api.worker.say(claimed, 1, ["b"])
            api.worker.succeed(claimed, ["a", "b"])
            assert [event.kind for event in events(answer.iter_lines())] == ["message", "done"]


def test_a_redis_that_evicts_is_not_ready_and_says_why(redis: EmbeddedRedis, api: Api) -> None:
    api.redis.config_set("maxmemory-policy", "allkeys-lru")
    answer = api.http.get("/readyz")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unsuitable")
    assert "allkeys-lru" in answer.json()["error"]["message"]


def test_refused_credentials_are_no_bug_of_the_server(redis: EmbeddedRedis, api: Api) -> None:
    api.redis.config_set("requirepass", "rotated")
    api.redis.client_kill_filter(_type="normal", skipme=True)
    refused_within(api, 0.3)
    assert "wants a password" in api.http.get("/readyz").json()["error"]["message"]
    api.redis.config_set("requirepass", "")
    wait_for("readyz", lambda: api.http.get("/readyz").status_code == 200)


def test_a_full_redis_refuses_jobs_and_the_api_lives(redis: EmbeddedRedis, api: Api) -> None:
    api.redis.config_set("maxmemory", "1")
    answer = api.http.post("/v1/jobs", json=job())
    assert answer.status_code in (429, 503)
    assert int(answer.headers["retry-after"]) >= 1
    assert api.http.get("/readyz").status_code == 503, "jobs cannot be accepted now"
    api.redis.config_set("maxmemory", "0")
    wait_for("a job to be accepted", lambda: api.http.post("/v1/jobs", json=job()).status_code == 202)

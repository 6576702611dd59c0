"""Submit, look, wait, cancel: over a real socket and a real Redis."""

import json
import statistics
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from hortator.producer.embedded import EmbeddedRedis
from hortator.producer.store import ReleaseReason
from tests.producer.api_process import JSON, Api, job, newest, served, wait_for


@pytest.fixture(scope="module")
def server(redis_servers: dict[str, EmbeddedRedis]) -> Iterator[Api]:
    with served(newest(redis_servers)) as running:
        yield running


@pytest.fixture
def api(server: Api) -> Api:
    return server.fresh()


def test_an_accepted_job_has_an_id_a_place_to_look_and_a_state(api: Api) -> None:
    answer = api.http.post("/v1/jobs", json=job())
    assert answer.status_code == 202
    job_id = answer.json()["id"]
    assert answer.json() == {"id": job_id, "state": "queued", "duplicate": False, "ignored": []}
    assert answer.headers["location"] == f"/v1/jobs/{job_id}"
    seen = api.http.get(answer.headers["location"])
    assert seen.status_code == 200
    assert (seen.json()["id"], seen.json()["state"], seen.json()["model"]) == (job_id, "queued", "demo")


def test_a_finished_job_shows_its_result(api: Api) -> None:
    job_id = api.submit(metadata={"line": "7"})
    api.worker.run_one(["4", "2"])
    status = api.http.get(f"/v1/jobs/{job_id}").json()
    assert status["state"] == "succeeded"
    assert status["result"]["text"] == "42"
    assert status["result"]["usage"] == {"prompt_tokens": 6, "completion_tokens": 2}
    assert status["metadata"] == {"line": "7"}
    assert status["timings"]["enqueued_ms"] <= status["timings"]["finished_ms"]


def test_a_failed_job_says_why(api: Api) -> None:
    job_id = api.submit()
    [claimed] = api.worker.claim()
    api.worker.fail(claimed, "prompt_too_long", "90000 tokens, the model takes 4096")
    status = api.http.get(f"/v1/jobs/{job_id}").json()
    assert status["state"] == "failed"
    assert status["failure"] == {"code": "prompt_too_long", "message": "90000 tokens, the model takes 4096"}


def test_the_same_idempotency_key_is_the_same_job(api: Api) -> None:
    first = api.http.post("/v1/jobs", json=job(), headers={"idempotency-key": "k1"}).json()
    again = api.http.post("/v1/jobs", json=job(), headers={"idempotency-key": "k1"}).json()
    in_body = api.http.post("/v1/jobs", json=job(idempotency_key="k1")).json()
    assert again == {**first, "duplicate": True}
    assert in_body["id"] == first["id"]
    assert len(api.worker.claim()) == 1


def test_a_duplicate_of_a_finished_job_says_that_it_is_finished(api: Api) -> None:
    api.submit(idempotency_key="k2")
    api.worker.run_one()
    again = api.http.post("/v1/jobs", json=job(idempotency_key="k2")).json()
    assert (again["duplicate"], again["state"]) == (True, "succeeded")


def test_the_same_key_with_another_body_is_a_conflict(api: Api) -> None:
    api.submit("1+1=", idempotency_key="k3")
    answer = api.http.post("/v1/jobs", json=job("2+2="), headers={"idempotency-key": "k3"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "idempotency_conflict")
    assert "job_id" not in answer.json()["error"]  # the refused job has none


def test_header_and_body_must_not_name_two_keys(api: Api) -> None:
    answer = api.http.post("/v1/jobs", json=job(idempotency_key="a"), headers={"idempotency-key": "b"})
    assert answer.status_code == 422


def test_fields_that_nobody_knows_are_named_in_the_answer(api: Api) -> None:
    answer = api.http.post("/v1/jobs", json=job(colour="red", sampling={"temprature": 1}))
    assert answer.json()["ignored"] == ["colour", "sampling.temprature"]


def test_a_sampling_parameter_beside_the_prompt_is_refused_and_not_ignored(api: Api) -> None:
    answer = api.http.post("/v1/jobs", json=job(max_tokens=5, seed=1))
    assert answer.status_code == 422
    assert answer.json()["error"] == {
        "code": "bad_request",
        "message": "max_tokens, seed: write it inside sampling",
    }
    assert not api.worker.claim()


def test_an_unknown_job_is_404_and_not_queued(api: Api) -> None:
    answer = api.http.get("/v1/jobs/0123456789abcdef")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["code"], error["job_id"]) == ("unknown_job", "0123456789abcdef")


def test_a_job_whose_record_has_expired_is_410(api: Api) -> None:
    job_id = api.submit()
    assert api.redis.delete(f"hortator:job:{job_id}") == 1
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/tokens")):
        answer = api.http.request(method, f"/v1/jobs/{job_id}{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (410, "unknown_job")


@pytest.mark.parametrize("method", ["get", "delete"])
@pytest.mark.parametrize("job_id", ["a%00b", "%ff%fe", "a%0ab", "-x", "x" * 129, "%F0%9F%98%80", "a%2Fb", "a b"])
def test_an_id_that_cannot_be_one_is_refused(api: Api, method: str, job_id: str) -> None:
    answer = api.http.request(method, f"/v1/jobs/{job_id}")
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["code"] in ("malformed", "no_such_route")


def test_a_long_poll_answers_as_soon_as_the_job_is_done(api: Api) -> None:
    job_id = api.submit()
    worker = threading.Timer(0.5, api.worker.run_one)
    worker.start()
    began = time.monotonic()
    status = api.http.get(f"/v1/jobs/{job_id}", params={"wait_s": 30}).json()
    took = time.monotonic() - began
    worker.join()
    assert status["state"] == "succeeded"
    assert 0.4 < took < 15


def test_an_answer_does_not_wait_for_the_clients_acknowledgement(api: Api) -> None:
    job_id = api.submit()
    took = []
    for _ in range(15):
        began = time.perf_counter()
        api.http.get(f"/v1/jobs/{job_id}")
        took.append(time.perf_counter() - began)
    assert statistics.median(took) < 0.03, "40 ms is the delayed acknowledgement of TCP: is TCP_NODELAY set?"


def test_a_long_poll_of_a_finished_job_answers_at_once(api: Api) -> None:
    job_id = api.submit()
    api.worker.run_one()
    began = time.monotonic()
    assert api.http.get(f"/v1/jobs/{job_id}", params={"wait_s": 30}).json()["state"] == "succeeded"
    assert time.monotonic() - began < 15


def test_a_long_poll_shows_the_state_when_the_time_is_up(api: Api) -> None:
    job_id = api.submit()
    api.worker.claim()
    began = time.monotonic()
    answer = api.http.get(f"/v1/jobs/{job_id}", params={"wait_s": 0.3})
    assert (answer.status_code, answer.json()["state"]) == (200, "running")
    assert 0.25 < time.monotonic() - began < 15


def test_a_wait_is_cut_to_the_servers_longest(newest_redis_url: str) -> None:
    with served(newest_redis_url, max_wait_s=0.2) as api:
        job_id = api.submit()
        began = time.monotonic()
        assert api.http.get(f"/v1/jobs/{job_id}", params={"wait_s": 1e9}).json()["state"] == "queued"
        assert time.monotonic() - began < 15


def test_a_hundred_waiters_cost_one_call_at_a_time(api: Api) -> None:
    ids = [api.submit(str(n)) for n in range(100)]
    done: list[str] = []

    def wait(job_id: str) -> None:
        done.append(api.http.get(f"/v1/jobs/{job_id}", params={"wait_s": 15}).json()["state"])

    threads = [threading.Thread(target=wait, args=(job_id,)) for job_id in ids]
    for thread in threads:
        thread.start()
    wait_for("all to wait", lambda: api.app.state.watcher.waiters == 100)
    connected = api.redis.info("clients")["connected_clients"]
    for _ in ids:
        api.worker.run_one()
    for thread in threads:
        thread.join(20)
    assert done == ["succeeded"] * 100
    assert connected < 30, "waiters must not hold a connection each"


def test_beyond_the_bound_a_waiter_is_sent_away(newest_redis_url: str) -> None:
    with served(newest_redis_url, max_waiters=1) as api:
        job_id = api.submit()
        waiting = threading.Thread(target=lambda: api.http.get(f"/v1/jobs/{job_id}", params={"wait_s": 1}))
        waiting.start()
        while api.app.state.watcher.waiters < 1:
            time.sleep(0.01)
        with httpx.Client(base_url=api.url) as second:
            answers = [
                second.get(f"/v1/jobs/{job_id}", params={"wait_s": 1}),
                second.get(f"/v1/jobs/{job_id}/tokens"),
            ]
            plain = second.get(f"/v1/jobs/{job_id}")
        waiting.join()
        assert [(a.status_code, a.json()["error"]["code"]) for a in answers] == [(503, "too_many_waiters")] * 2
        assert all(int(a.headers["retry-after"]) >= 1 for a in answers)
        assert plain.status_code == 200, "a poll without waiting is always answered"


def test_a_client_that_leaves_waits_no_longer(api: Api) -> None:
    job_id = api.submit()
    with pytest.raises(httpx.ReadTimeout):
        api.http.get(f"/v1/jobs/{job_id}", params={"wait_s": 30}, timeout=0.2)
    deadline = time.monotonic() + 2
    while api.app.state.watcher.waiters:
        assert time.monotonic() < deadline, "the watch of a client that left is still there"
        time.sleep(0.01)


def test_many_jobs_are_looked_at_in_one_call_in_the_order_asked(api: Api) -> None:
    ids = [api.submit(str(n)) for n in range(3)]
    finished = api.worker.run_one()
    answer = api.http.post("/v1/jobs:status", json={"ids": [*reversed(ids), "never-issued"]})
    assert answer.status_code == 200
    jobs = answer.json()["jobs"]
    assert [entry and entry["id"] for entry in jobs] == [*reversed(ids), None]
    assert [entry["id"] for entry in jobs if entry and entry["state"] == "succeeded"] == [finished]


def test_too_many_ids_at_once_are_refused(api: Api) -> None:
    answer = api.http.post("/v1/jobs:status", json={"ids": ["x"] * 501})
    assert answer.status_code == 422
    assert "at most 500" in answer.json()["error"]["message"]


def test_a_queued_job_is_cancelled_at_once(api: Api) -> None:
    job_id = api.submit()
    assert api.http.delete(f"/v1/jobs/{job_id}").json() == {"id": job_id, "state": "cancelled"}
    assert api.http.get(f"/v1/jobs/{job_id}").json()["state"] == "cancelled"
    assert api.worker.claim() == ()


def test_cancelling_is_idempotent_and_never_changes_a_terminal_state(api: Api) -> None:
    job_id = api.submit()
    api.worker.run_one()
    answers = [api.http.delete(f"/v1/jobs/{job_id}") for _ in range(2)]
    assert [(a.status_code, a.json()["state"]) for a in answers] == [(200, "succeeded")] * 2


def test_cancelling_an_unknown_job_is_404(api: Api) -> None:
    assert api.http.delete("/v1/jobs/never-issued").status_code == 404


def test_a_job_ends_at_its_deadline_though_no_worker_is_alive(api: Api) -> None:
    job_id = api.submit(deadline_s=0.5)
    status = api.http.get(f"/v1/jobs/{job_id}", params={"wait_s": 10}).json()
    assert status["state"] == "expired"


def test_the_sweeper_ends_jobs_that_nobody_looks_at(newest_redis_url: str) -> None:
    alone = newest_redis_url.removesuffix("/0") + "/1"  # the other API of these tests sweeps database 0
    with served(alone, sweep_s=0.1) as api:
        api.submit(deadline_s=0.2)
        wait_for("the sweep", lambda: "hortator_expired_jobs_total 1.0" in api.http.get("/metrics").text)


def test_a_job_that_was_handed_back_goes_on(api: Api) -> None:
    job_id = api.submit()
    [claimed] = api.worker.claim()
    api.worker.say(claimed, 0, ["4"])
    api.store.release([claimed.lease], reason=ReleaseReason.DRAINED)
    assert api.http.get(f"/v1/jobs/{job_id}").json()["num_tokens"] == 1
    [again] = api.worker.claim()
    api.worker.say(again, 1, ["2"])
    api.worker.succeed(again, ["4", "2"])
    assert api.http.get(f"/v1/jobs/{job_id}").json()["result"]["text"] == "42"


def test_the_openapi_page_describes_every_route(api: Api) -> None:
    paths = api.http.get("/openapi.json").json()["paths"]
    assert set(paths) == {
        "/v1/jobs",
        "/v1/jobs:status",
        "/v1/jobs/{job_id}",
        "/v1/jobs/{job_id}/tokens",
        "/v1/queues",
        "/v1/dead-letters",
        "/healthz",
        "/readyz",
        "/metrics",
    }
    assert "sampling" in json.dumps(paths["/v1/jobs"]["post"]["requestBody"])


def test_an_unknown_route_and_a_wrong_method_have_the_one_error_shape(api: Api) -> None:
    nowhere, wrong = api.http.get("/v2/jobs"), api.http.put("/v1/jobs", content=b"{}", headers=JSON)
    assert (nowhere.status_code, nowhere.json()["error"]["code"]) == (404, "no_such_route")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")

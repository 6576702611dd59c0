"""Keys close every route; another tenant's job is as good as none."""

import re
import statistics
import time
from collections.abc import Iterator

import pytest

from hortator.producer.api.keys import new_key
from hortator.producer.embedded import EmbeddedRedis
from tests.producer.api_process import Api, bearer, job, newest, served

ACME, ACME_LINE = new_key("acme")
BETA, BETA_LINE = new_key("beta")
OPS, OPS_LINE = new_key("ops", operator=True)
LINES = (ACME_LINE, BETA_LINE, OPS_LINE)
ROUTES = [
    ("POST", "/v1/jobs"),
    ("POST", "/v1/jobs:status"),
    ("GET", "/v1/jobs/x"),
    ("DELETE", "/v1/jobs/x"),
    ("GET", "/v1/jobs/x/tokens"),
    ("GET", "/v1/queues"),
    ("GET", "/v1/dead-letters"),
    ("GET", "/metrics"),
    ("GET", "/docs"),
    ("GET", "/redoc"),
    ("GET", "/openapi.json"),
    ("GET", "/"),
    ("GET", "/no/such/route"),
    ("GET", "//healthz"),
    ("GET", "/healthz/"),
    ("PUT", "/v1/jobs"),
    ("OPTIONS", "/v1/jobs"),
]


@pytest.fixture(scope="module")
def server(redis_servers: dict[str, EmbeddedRedis]) -> Iterator[Api]:
    with served(newest(redis_servers), keys=LINES) as running:
        yield running


@pytest.fixture
def api(server: Api) -> Api:
    return server.fresh()


@pytest.mark.parametrize(
    "authorization",
    [None, "Bearer wrong", f"Basic {ACME}", ACME_LINE, "Bearer"],
    ids=["nothing", "wrong key", "other scheme", "the hash itself", "no key"],
)
def test_without_a_key_nothing_but_the_probes_is_open(api: Api, authorization: str | None) -> None:
    headers = {"authorization": authorization} if authorization else {}
    answers = {route: api.http.request(*route, headers=headers) for route in ROUTES}
    assert {route: answer.status_code for route, answer in answers.items()} == dict.fromkeys(ROUTES, 401)
    assert {answer.json()["error"]["code"] for answer in answers.values()} == {"unauthorized"}
    assert [api.http.get(path, headers=headers).status_code for path in ("/healthz", "/readyz")] == [200, 200]


def test_no_page_loads_scripts_from_elsewhere(api: Api) -> None:
    """The description is data; a page around it would run a stranger's code in the origin of the API."""
    headers = {"authorization": f"Bearer {OPS}"}
    assert [api.http.get(path, headers=headers).status_code for path in ("/docs", "/redoc")] == [404, 404]
    assert "/v1/jobs" in api.http.get("/openapi.json", headers=headers).json()["paths"]


def test_a_route_that_the_operator_opened_needs_no_key(newest_redis_url: str) -> None:
    with served(newest_redis_url, keys=LINES, open_paths={"/metrics"}) as api:
        assert api.http.get("/metrics").status_code == 200
        assert api.http.get("/metrics", headers=bearer(ACME)).status_code == 200
        assert api.http.get("/v1/queues").status_code == 401


def test_the_tenant_comes_from_the_key(api: Api) -> None:
    job_id = api.submit(key=ACME)
    assert api.http.get(f"/v1/jobs/{job_id}", headers=bearer(ACME)).json()["tenant"] == "acme"


def test_a_body_may_name_the_keys_own_tenant_and_no_other(api: Api) -> None:
    own = api.http.post("/v1/jobs", json=job(tenant="acme"), headers=bearer(ACME))
    other = api.http.post("/v1/jobs", json=job(tenant="beta"), headers=bearer(ACME))
    default = api.http.post("/v1/jobs", json=job(tenant="default"), headers=bearer(ACME))
    assert (own.status_code, other.status_code, default.status_code) == (202, 403, 403)


def test_without_keys_the_body_names_the_tenant(newest_redis_url: str) -> None:
    with served(newest_redis_url) as api:
        job_id = api.submit(tenant="beta")
        assert api.http.get(f"/v1/jobs/{job_id}").json()["tenant"] == "beta"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/jobs/{id}"),
        ("GET", "/v1/jobs/{id}?wait_s=5"),
        ("DELETE", "/v1/jobs/{id}"),
        ("GET", "/v1/jobs/{id}/tokens"),
    ],
)
def test_another_tenants_job_answers_byte_for_byte_as_an_unknown_one(api: Api, method: str, path: str) -> None:
    theirs = api.submit(key=BETA)
    never_issued = "".join(reversed(theirs.lower()))
    answers = []
    for job_id in (theirs, never_issued):
        answer = api.http.request(method, path.format(id=job_id), headers=bearer(ACME))
        headers = {name: value for name, value in answer.headers.items() if name != "date"}
        answers.append((answer.status_code, headers, answer.content.replace(job_id.encode(), b"ID")))
    assert answers[0] == answers[1]
    assert answers[0][0] == 404
    assert api.http.get(f"/v1/jobs/{theirs}", headers=bearer(BETA)).json()["state"] == "queued", (
        "nothing happened to it"
    )


def test_only_its_own_tenant_learns_that_a_job_is_gone(api: Api) -> None:
    job_id = api.submit(key=ACME)
    api.redis.delete(f"hortator:job:{job_id}")
    codes = [api.http.get(f"/v1/jobs/{job_id}", headers=bearer(key)).status_code for key in (ACME, BETA)]
    assert codes == [410, 404]


def test_among_many_ids_another_tenants_are_null(api: Api) -> None:
    mine, theirs = api.submit(key=ACME), api.submit(key=BETA)
    answer = api.http.post("/v1/jobs:status", json={"ids": [mine, theirs, "never"]}, headers=bearer(ACME))
    assert [entry and entry["id"] for entry in answer.json()["jobs"]] == [mine, None, None]


def test_another_tenants_job_answers_in_about_the_time_of_an_unknown_one(api: Api) -> None:
    theirs = api.submit("x" * 1_000_000, key=BETA)
    never_issued = "".join(reversed(theirs.lower()))
    took: dict[str, list[float]] = {theirs: [], never_issued: []}
    for _ in range(60):
        for job_id, times in took.items():
            began = time.perf_counter()
            api.http.get(f"/v1/jobs/{job_id}", headers=bearer(ACME))
            times.append(time.perf_counter() - began)
    medians = [statistics.median(times) for times in took.values()]
    assert max(medians) < 1.5 * min(medians) + 0.0005, medians


def test_two_tenants_may_use_the_same_idempotency_key(api: Api) -> None:
    assert api.submit(key=ACME, idempotency_key="k") != api.submit(key=BETA, idempotency_key="k")


def test_what_covers_every_tenant_needs_an_operators_key(api: Api) -> None:
    for path in ("/v1/dead-letters", "/metrics"):
        assert api.http.get(path, headers=bearer(ACME)).status_code == 403
        assert api.http.get(path, headers=bearer(OPS)).status_code == 200


def test_a_key_is_not_repeated_in_any_answer(api: Api) -> None:
    answer = api.http.get("/v1/queues", headers={"authorization": f"Bearer {ACME}x"})
    assert not re.search("hk_", answer.text)

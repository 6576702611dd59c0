"""Whatever is sent, the answer says what was wrong, and is never a 500."""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hortator.producer.embedded import EmbeddedRedis
from tests.producer.api_process import JSON, Api, job, served

SECRET = "the-prompt-that-nobody-may-read"


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    with EmbeddedRedis() as redis, served(redis.url, max_body_bytes=2_000_000, body_timeout_s=0.5) as running:
        yield running


def connected(api: Api) -> socket.socket:
    """For what a well-mannered HTTP client would not send."""
    host, port = api.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=5)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (job(model="../etc"[2:]), "model"),
        (job(model=""), "model"),
        (job(model="a\x00b"), "model"),
        (job(model=7), "model"),
        ({"prompt": "x"}, "model"),
        ({"model": "demo"}, "exactly one of prompt, token_ids, messages"),
        (job(token_ids=[1]), "exactly one of prompt, token_ids, messages"),
        (job(""), "prompt"),
        ({"model": "demo", "prompt": 7}, "prompt"),
        ({"model": "demo", "token_ids": []}, "token_ids"),
        ({"model": "demo", "token_ids": [-1]}, "token_ids.0"),
        ({"model": "demo", "token_ids": [2**31]}, "token_ids.0"),
        ({"model": "demo", "token_ids": ["1"]}, "token_ids.0"),
        ({"model": "demo", "messages": []}, "messages"),
        ({"model": "demo", "messages": [{"role": "root", "content": "x"}]}, "messages.0.role"),
        (job(sampling={"max_tokens": 0}), "sampling.max_tokens"),
        (job(sampling={"max_tokens": -5}), "got -5"),
        (job(sampling={"max_tokens": 10**30}), "sampling.max_tokens"),
        (job(sampling={"max_tokens": "12"}), "sampling.max_tokens"),
        (job(sampling={"max_tokens": True}), "sampling.max_tokens"),
        (job(sampling={"max_tokens": 1.5}), "sampling.max_tokens"),
        (job(sampling={"temperature": -1}), "sampling.temperature"),
        (job(sampling={"top_p": 0}), "sampling.top_p"),
        (job(sampling={"stop": ["x"] * 17}), "sampling.stop"),
        (job(sampling={"stop": "x"}), "sampling.stop"),
        (job(sampling=None), "sampling"),
        (job(priority="urgent"), "priority"),
        (job(deadline_s=0), "deadline_s"),
        (job(deadline_s=1e300), "deadline_s"),
        (job(tenant="a b"), "tenant"),
        (job(metadata={"k": 7}), "metadata.k"),
        (job(metadata={str(n): "" for n in range(17)}), "metadata"),
        (job(version=2), "version"),
        (job(idempotency_key=""), "idempotency_key"),
        (job(idempotency_key="a\x00b"), "idempotency_key"),
        (job("\ud800"), "prompt: half of a surrogate pair"),
        (job("\ude00\ud83d"), "prompt: half of a surrogate pair"),
        (job("x" * 300, metadata={"\ud800": "x"}), r"metadata.\ud800: half of a surrogate pair"),
        (job(metadata={"k": "a\udfffb"}), "metadata.k: half of a surrogate pair"),
        (job(sampling={"stop": ["a", "\ud800"]}), "sampling.stop.1: half of a surrogate pair"),
        ({"model": "demo", "messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content: half of"),
        (job(tenant="\ud800"), "tenant: half of a surrogate pair"),
        (job(no_such_field="\ud800"), "no_such_field: half of a surrogate pair"),
    ],
)
def test_a_wrong_field_is_named(api: Api, body: dict[str, Any], field: str) -> None:
    answer = api.http.post("/v1/jobs", content=json.dumps(body), headers=JSON)
    assert answer.status_code in (400, 422), answer.text
    assert set(answer.json()) == {"error"}
    assert field in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[1]",
        b'{"model":"demo","model":"demo","prompt":"x"}',
        b"[" * 100_000,
        b'{"a":NaN}',
        b"\x00",
    ],
)
def test_bytes_that_are_no_job_are_400(api: Api, raw: bytes) -> None:
    answer = api.http.post("/v1/jobs", content=raw, headers=JSON)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "malformed")


def test_infinity_written_as_a_number_is_refused(api: Api) -> None:
    raw = b'{"model":"demo","prompt":"x","sampling":{"temperature":1e999}}'
    assert api.http.post("/v1/jobs", content=raw, headers=JSON).status_code == 422


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_that_does_not_say_json_is_415(api: Api, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    assert api.http.post("/v1/jobs", content=json.dumps(job()), headers=headers).status_code == 415


@pytest.mark.parametrize(
    "body",
    [
        job(SECRET * 10, sampling={"max_tokens": -1}),
        {"model": SECRET + " ", "prompt": "x"},
        job(SECRET, stop=1, version=SECRET),
    ],
)
def test_an_error_does_not_repeat_what_the_client_wrote(api: Api, body: dict[str, Any]) -> None:
    answer = api.http.post("/v1/jobs", json=body)
    assert answer.status_code == 422
    assert SECRET not in answer.text


@pytest.mark.parametrize(
    "wrong",
    [{"token_ids": [-1] * 600_000}, {"messages": [1] * 900_000}, {"stop": [1] * 900_000}],
    ids=["token_ids", "messages", "stop"],
)
def test_of_a_million_wrong_values_others_hear_nothing(api: Api, wrong: dict[str, Any]) -> None:
    raw = json.dumps({"model": "demo"} | wrong, separators=(",", ":")).encode()
    began = time.process_time()
    assert api.http.post("/v1/jobs", content=raw, headers=JSON).status_code in (400, 422)
    assert time.process_time() - began < 3.0, "well below a second; an error of each took ten"


def test_a_ten_megabyte_prompt_is_413(api: Api) -> None:
    answer = api.http.post("/v1/jobs", content=b"x" * 10_000_000, headers=JSON)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert "2000000" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("expect", "limit_s"), [("", 3.0), ("expect: 100-continue\r\n", 0.5)])
def test_a_length_beyond_the_limit_is_413_before_the_body_is_sent(api: Api, expect: str, limit_s: float) -> None:
    began = time.monotonic()
    with connected(api) as link:
        link.sendall(f"POST /v1/jobs HTTP/1.1\r\nhost: x\r\n{expect}content-length: 10000000\r\n\r\n".encode())
        assert link.recv(100).startswith(b"HTTP/1.1 413")
    assert time.monotonic() - began < limit_s


def test_a_ten_megabyte_prompt_without_a_length_is_413(api: Api) -> None:
    answer = api.http.post("/v1/jobs", content=(b"x" * 100_000 for _ in range(100)), headers=JSON)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_a_body_within_the_limit_but_too_long_a_prompt_is_refused_by_its_field(newest_redis_url: str) -> None:
    with served(newest_redis_url) as api:
        answer = api.http.post("/v1/jobs", content=json.dumps(job("x" * 8_000_001)), headers=JSON)
        assert answer.status_code == 422
        assert "prompt: String should have at most 8000000 characters" in answer.json()["error"]["message"]


def test_a_large_prompt_within_the_limits_is_accepted(newest_redis_url: str) -> None:
    with served(newest_redis_url) as api:
        assert api.http.post("/v1/jobs", content=json.dumps(job("x" * 7_900_000)), headers=JSON).status_code == 202


def test_a_prompt_may_hold_any_character_even_nul(api: Api) -> None:
    assert api.http.post("/v1/jobs", json=job("a\x00b\x1b[31m\u2028😀")).status_code == 202


def test_whole_surrogate_pairs_and_words_that_look_like_halves_are_text(api: Api) -> None:
    raw = rb'{"model": "demo", "prompt": "\ud83d\ude00 and \\ud83d"}'
    assert api.http.post("/v1/jobs", content=raw, headers=JSON).status_code == 202


def test_a_body_that_never_comes_is_given_up(api: Api) -> None:
    with connected(api) as link:
        link.sendall(
            b"POST /v1/jobs HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"
        )
        began = time.monotonic()
        assert link.recv(100).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began < 2


@pytest.mark.parametrize("query", ["wait_s=-1", "wait_s=nan", "wait_s=x", "wait_s=", "wait_s=%00"])
def test_a_wrong_parameter_is_named(api: Api, query: str) -> None:
    answer = api.http.get(f"/v1/jobs/{api.submit()}?{query}")
    assert answer.status_code == 422
    assert "query.wait_s" in answer.json()["error"]["message"]


@pytest.mark.parametrize("query", ["after=-1", "after=x", "after=1e400", f"after={'9' * 5000}"])
def test_a_wrong_position_is_refused(api: Api, query: str) -> None:
    assert api.http.get(f"/v1/jobs/{api.submit()}/tokens?{query}").status_code == 422


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
FIELDS = ["model", "prompt", "token_ids", "messages", "sampling", "priority", "deadline_s", "idempotency_key", "tenant"]
SAMPLING = ["max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stop_token_ids"]
almost_jobs = st.builds(
    lambda fields, sampling: {"model": "demo", "prompt": "x", **fields, **({"sampling": sampling} if sampling else {})},
    st.dictionaries(st.sampled_from([*FIELDS, "version", "metadata"]), json_values, max_size=3),
    st.dictionaries(st.sampled_from(SAMPLING), json_values, max_size=2),
)
bodies = (
    st.binary(max_size=200) | almost_jobs.map(json.dumps).map(str.encode) | json_values.map(json.dumps).map(str.encode)
)
quiet = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quiet
@given(raw=bodies, path=st.sampled_from(["/v1/jobs", "/v1/jobs:status"]))
def test_no_body_makes_a_500(api: Api, raw: bytes, path: str) -> None:
    answer = api.http.post(path, content=raw, headers=JSON)
    assert answer.status_code in (200, 202, 400, 422), (raw, answer.text)
    assert answer.json()


@quiet
@given(raw=st.binary(min_size=1, max_size=30), method=st.sampled_from(["GET", "DELETE", "POST", "HEAD"]))
def test_no_path_makes_a_500(api: Api, raw: bytes, method: str) -> None:
    path = "".join(f"%{byte:02x}" for byte in raw)
    answer = api.http.request(method, f"/v1/jobs/{path}")
    assert answer.status_code < 500


@quiet
@given(
    name=st.sampled_from(["idempotency-key", "last-event-id", "authorization", "content-length", "accept"]),
    value=st.binary(min_size=0, max_size=40).filter(lambda v: not set(v) & set(b"\r\n\0")),
)
def test_no_header_makes_a_500(api: Api, name: str, value: bytes) -> None:
    with connected(api) as link:
        link.sendall(b"GET /v1/jobs/x/tokens HTTP/1.1\r\nhost: x\r\nconnection: close\r\n")
        link.sendall(name.encode() + b": " + value + b"\r\n\r\n")
        assert link.recv(100).startswith((b"HTTP/1.1 4", b"HTTP/1.1 2")), (name, value)

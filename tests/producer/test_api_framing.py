"""Requests of which two readers could see different ends, and bytes that are no request, on a real socket."""

import json
import logging
import re
import socket
from collections.abc import Iterator

import pytest

from hortator.producer.api.framing import Framing, repeats_length
from hortator.producer.embedded import EmbeddedRedis
from tests.producer.api_process import Api, job, newest, served, wait_for

BODY = json.dumps(job()).encode()
POST = b"POST /v1/jobs HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
OLD_POST = POST.replace(b"HTTP/1.1", b"HTTP/1.0")
LENGTH = b"content-length: %d\r\n" % len(BODY)
CHUNKED = b"transfer-encoding: chunked\r\n"
CHUNK = b"%x\r\n%b\r\n" % (len(BODY), BODY)


@pytest.fixture(scope="module")
def server(redis_servers: dict[str, EmbeddedRedis]) -> Iterator[Api]:
    with served(newest(redis_servers), max_body_bytes=200_000, body_timeout_s=0.5) as running:
        yield running


@pytest.fixture
def api(server: Api) -> Api:
    return server.fresh()


def sent(api: Api, *parts: bytes) -> socket.socket:
    host, port = api.url.removeprefix("http://").split(":")
    link = socket.create_connection((host, int(port)), timeout=20)
    for part in parts:
        link.sendall(part)
    return link


def answer(api: Api, *parts: bytes) -> tuple[int, str, str]:
    """Status, code and message of the one answer, after which the server has closed the connection."""
    with sent(api, *parts) as link:
        head, _, body = everything(link).partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    return int(head.split()[1]), error["code"], error["message"]


def everything(link: socket.socket) -> bytes:
    """Until the server closes."""
    found = b""
    while some := link.recv(65_536):
        found += some
    return found


@pytest.mark.parametrize(
    ("head", "problem"),
    [
        (POST + LENGTH + LENGTH, "Content-Length is given more than once"),
        (POST + LENGTH + b"Content-Length: 5\r\n", "Content-Length is given more than once"),
        (POST + b"content-length: 30, 30\r\n", "Content-Length is given more than once"),
        (POST + LENGTH + CHUNKED, "both given"),
        (POST + CHUNKED + LENGTH, "both given"),
        (OLD_POST + CHUNKED, "does not exist in HTTP/1.0"),
    ],
    ids=["equal lengths", "unequal lengths", "a list of lengths", "length and coding", "coding and length", "HTTP/1.0"],
)
def test_a_request_that_says_its_length_twice_is_400_before_its_body_is_sent(
    api: Api, head: bytes, problem: str
) -> None:
    status, code, message = answer(api, head + b"\r\n")
    assert (status, code) == (400, "malformed")
    assert problem in message


def test_nothing_of_such_a_request_is_accepted_and_what_follows_it_is_no_request(api: Api) -> None:
    smuggled = POST + LENGTH + b"\r\n" + BODY
    with sent(api, POST + LENGTH + CHUNKED + b"\r\n0\r\n\r\n" + smuggled) as link:
        assert everything(link).count(b"HTTP/1.1 ") == 1
    assert api.store.queues()[0].depth == 0


def test_a_second_request_of_a_connection_is_looked_at_as_the_first(api: Api) -> None:
    with sent(api, POST + LENGTH + b"\r\n" + BODY + POST + LENGTH + LENGTH + b"\r\n" + BODY) as link:
        found = everything(link)
    assert re.findall(rb"HTTP/1.1 (\d+)", found) == [b"202", b"400"]


@pytest.mark.parametrize("head", [POST + LENGTH, POST + CHUNKED], ids=["length", "chunks"])
def test_a_request_that_says_its_length_once_is_accepted(api: Api, head: bytes) -> None:
    body = BODY if b"length" in head else CHUNK + b"0\r\n\r\n"
    with sent(api, head + b"connection: close\r\n\r\n" + body) as link:
        assert everything(link).startswith(b"HTTP/1.1 202")


def test_a_body_may_speak_of_lengths() -> None:
    assert not repeats_length(POST + LENGTH + b"\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n")
    assert not repeats_length(b"GET / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 1\r\n"), "no whole head yet"


def test_also_behind_another_server_a_repeated_length_is_refused() -> None:
    scope = {"type": "http", "http_version": "1.1", "headers": [(b"content-length", b"5")] * 2}
    told = []

    async def app(scope: object, receive: object, send: object) -> None:
        raise AssertionError("it got through")

    async def send(message: dict[str, object]) -> None:
        told.append(message.get("status"))

    with pytest.raises(StopIteration):
        Framing(app)(scope, None, send).send(None)  # type: ignore[arg-type]  # it waits for nothing
    assert told[0] == 400


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
        (POST + b"content-length: -5\r\n\r\n", 400),
        (POST + b"transfer-encoding: gzip\r\n\r\n", 400),
        (POST + CHUNKED + b"\r\nno number\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 20_000, 431),
    ],
    ids=["TLS", "no host", "a negative length", "another coding", "a bad chunk", "a flood of headers"],
)
def test_bytes_that_are_no_request_are_answered_in_the_shape_of_every_error(api: Api, raw: bytes, status: int) -> None:
    with sent(api) as link:
        link.sendall(raw)
        head = link.recv(4096)
    assert int(head.split()[1]) == status
    assert json.loads(head.partition(b"\r\n\r\n")[2])["error"]["code"] == "malformed"


def waiting(api: Api, more: bytes) -> socket.socket:
    """A GET that waits, with a body that is to come."""
    target = f"/v1/jobs/{api.submit()}".encode() + more
    return sent(api, b"GET " + target + b" HTTP/1.1\r\nhost: x\r\n" + CHUNKED + b"\r\n")


@pytest.mark.parametrize("what", [b"/tokens", b"?wait_s=20"])
@pytest.mark.parametrize(
    ("body", "status"), [(b"", 408), (b"30d40\r\n" + b"x" * 200_000 + b"\r\n1\r\nx\r\n0\r\n\r\n", 413), (b"?\r\n", 400)]
)
def test_the_body_of_a_get_that_waits_is_bounded_as_any_other(
    api: Api, caplog: pytest.LogCaptureFixture, what: bytes, body: bytes, status: int
) -> None:
    with caplog.at_level(logging.ERROR):
        with waiting(api, what) as link:
            link.sendall(body)
            head = link.recv(4096)
        assert int(head.split()[1]) == status
        wait_for("the end of all waiting", lambda: api.app.state.watcher.waiters == 0)
    assert not caplog.records, "nothing that a client sends is a traceback in the log"


def test_a_request_that_turns_bad_after_its_answer_has_no_second_one_and_leaves_no_traceback(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), sent(api, b"GET /nowhere HTTP/1.1\r\nhost: x\r\n" + CHUNKED + b"\r\n") as link:
        assert link.recv(4096).startswith(b"HTTP/1.1 404")
        link.sendall(b"?\r\n")
        assert b"HTTP/1.1 " not in everything(link)
    assert not caplog.records

"""What a connection may cost before it has asked anything: one of the places that descriptors suffice for, and that for
a while only.  And what it is told if what it sends is no HTTP.

uvicorn keeps a connection that stays silent, or sends its headers a byte at a time, for ever; and when descriptors run
out asyncio serves nobody and logs every try.
"""

import asyncio
import resource
import sys

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .failures import error_body
from .framing import REPEATED, repeats_length

HEADERS_TIMEOUT_S = 10.0
MAX_DESCRIPTORS = 65_536
TOO_LARGE_HINT = 431  # of h11
_RESERVE = 32  # descriptors: Redis, the loop, what libraries open


def whole_answer(status: bytes, body: bytes, *more_headers: bytes) -> bytes:
    """For a connection that is closed behind it."""
    headers = (
        b"connection: close",
        b"content-type: application/json",
        b"content-length: %d" % len(body),
        *more_headers,
    )
    return b"\r\n".join((b"HTTP/1.1 " + status, *headers, b"", body))


_FULL = whole_answer(
    b"503 Service Unavailable",
    error_body("too_many_connections", "too many connections at a time; try again"),
    b"retry-after: 1",
)
_ANSWERABLE = (h11.IDLE, h11.SEND_RESPONSE)


class Connection(H11Protocol):
    """Refused at once if there are too many; ended if no request comes in time."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > max_connections():
            transport.write(_FULL)
            transport.close()
        else:
            self._look()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def handle_events(self) -> None:
        if self.conn.their_state is h11.IDLE and repeats_length(self.conn.trailing_data[0]):
            self._refuse(b"400 Bad Request", REPEATED)
        else:
            super().handle_events()

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls it while it handles h11's error."""
        problem = sys.exception()
        if isinstance(problem, h11.RemoteProtocolError) and problem.error_status_hint == TOO_LARGE_HINT:
            self._refuse(b"431 Request Header Fields Too Large", "the headers are longer than 16 KiB")
        else:
            self._refuse(b"400 Bad Request", "this is no HTTP/1.1 request, or its headers or chunks are malformed")

    def _refuse(self, status: bytes, message: str) -> None:
        """The last word on this connection; where an answer has begun it is only closed."""
        if self.conn.our_state in _ANSWERABLE:
            self.transport.write(whole_answer(status, error_body("malformed", message)))
        if self.cycle is not None:
            self.cycle.disconnected = True  # what is still computed for it must not be written behind this
            self.cycle.message_event.set()
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest()
        super().connection_lost(exc)

    def _look(self) -> None:
        """Patience runs from the connection, or the first byte of a further request, to the end of the headers."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._rest()
        elif self._patience is None:
            self._patience = self.loop.call_later(HEADERS_TIMEOUT_S, self.transport.close)

    def _rest(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


def raise_limit() -> None:
    """As many descriptors as this process may have; the usual 1,024 are fewer than the API's waiters may need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def max_connections() -> int:
    """At a time, so that descriptors are left."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    return max(1, limit - max(_RESERVE, limit // 10))


def accepted_at_a_time() -> int:
    """asyncio accepts so many before it hands the first one over; a quarter leaves room to refuse them."""
    return max(1, min(2048, max_connections() // 4))

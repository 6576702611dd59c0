"""What a connection may cost before it has asked anything: one of the places that descriptors suffice for, and that for
a while only.

uvicorn keeps a connection that stays silent, or sends its headers a byte at a time, for ever; and when descriptors run
out asyncio serves nobody and logs every try.
"""

import asyncio
import resource

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_TIMEOUT_S = 10.0
MAX_DESCRIPTORS = 65_536
_RESERVE = 32  # descriptors: Redis, the loop, what libraries open
_FULL = b'{"error": {"code": "too_many_connections", "message": "too many connections at a time; try again"}}'
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\n"
    b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(_FULL), _FULL)
)


class Connection(H11Protocol):
    """Refused at once if there are too many; ended if no request comes in time."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > max_connections():
            transport.write(_REFUSAL)
            transport.close()
        else:
            self._look()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

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

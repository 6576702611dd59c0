"""Where a request ends.  One that says it twice is refused before its body is read: a proxy in front of this server may
have believed the other length, and what it took for a body would be read here as the next request."""

import re

from starlette.types import ASGIApp, Receive, Scope, Send

from .failures import BadFraming, refusal

_LENGTH_LINE = re.compile(rb"^content-length[ \t]*:(.*)$", re.IGNORECASE | re.MULTILINE)
_END_OF_HEAD = re.compile(rb"\n\r?\n")

REPEATED = "Content-Length is given more than once: send it once"
BOTH = "Content-Length and Transfer-Encoding are both given: send one of them"
TOO_OLD = "Transfer-Encoding does not exist in HTTP/1.0: send Content-Length"


class Framing:
    """ASGI: refuses a request whose headers leave open how long its body is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = framing_problem(scope) if scope["type"] == "http" else None
        if problem is None:
            await self._app(scope, receive, send)
        else:
            await refusal(BadFraming(problem))(scope, receive, send)


def framing_problem(scope: Scope) -> str | None:
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    coded = any(name == b"transfer-encoding" for name, _ in scope["headers"])
    if len(lengths) > 1 or b"," in b"".join(lengths):
        return REPEATED
    if coded and lengths:
        return BOTH
    return TOO_OLD if coded and scope["http_version"] == "1.0" else None


def repeats_length(received: bytes) -> bool:
    """True when these bytes begin with a whole head that has several lengths, be they equal: h11 makes one of such,
    and then no application can see them."""
    end = _END_OF_HEAD.search(received)
    values = _LENGTH_LINE.findall(received, 0, end.start() + 1) if end else []
    return len(values) > 1 or b"," in b"".join(values)

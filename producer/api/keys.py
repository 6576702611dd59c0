"""API keys: who may ask, and as which tenant.  Only hashes are stored; with any key configured, every route is closed.

A key line is `sha256-of-the-key tenant [operator]`.  Keys hold 256 random bits, so a plain SHA-256 of them cannot be
searched.  Operators also see what belongs to no single tenant: dead letters and metrics.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from hortator.producer.errors import ConfigError
from hortator.producer.schema import Tenant

from .failures import Unauthorized, refusal

ALWAYS_OPEN = frozenset({"/healthz", "/readyz"})
_TENANT: TypeAdapter[str] = TypeAdapter(Tenant)
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks.  tenant None: no keys are configured, the caller sees everything."""

    tenant: str | None = None
    operator: bool = True


@dataclass(frozen=True, slots=True)
class Key:
    """One accepted key."""

    digest: bytes
    caller: Caller

    @classmethod
    def parse(cls, line: str, *, where: str) -> Self:
        """Raises ConfigError that names `where`, never the line: it might hold a key in clear by mistake."""
        match line.split():
            case [digest, tenant]:
                operator = False
            case [digest, tenant, "operator"]:
                operator = True
            case _:
                raise ConfigError(f"{where}: want `SHA256 TENANT [operator]`, as `hortator keys new` prints it")
        if not _HASH.fullmatch(digest):
            raise ConfigError(f"{where}: the first word is not a SHA-256 in hex; never store the key itself")
        return cls(bytes.fromhex(digest), Caller(tenant_name(tenant, where=where), operator))


def tenant_name(name: str, *, where: str) -> str:
    """The name if it is one."""
    try:
        return _TENANT.validate_python(name)
    except ValidationError:
        raise ConfigError(f"{where}: {name!r} is no tenant name: letters, digits, . _ -, at most 64") from None


def new_key(tenant: str, *, operator: bool = False) -> tuple[str, str]:
    """A fresh key, to be shown once, and its line for the key file."""
    key = "hk_" + secrets.token_urlsafe(32)
    line = f"{hashlib.sha256(key.encode()).hexdigest()} {tenant_name(tenant, where='TENANT')}"
    return key, line + (" operator" if operator else "")


@dataclass(frozen=True, slots=True)
class KeyRing:
    """All accepted keys.  An empty ring lets everybody in."""

    keys: tuple[Key, ...] = ()

    @classmethod
    def read(cls, lines: Iterable[str], *, file: Path | None = None) -> Self:
        """Keys of the setting and of the file; blank lines and lines that open with # do not count."""
        named = [(f"HORTATOR_API_KEYS, entry {n}", line) for n, line in enumerate(lines, 1)]
        if file is not None:
            named += [(f"{file}:{n}", line) for n, line in enumerate(read_text(file).splitlines(), 1)]
        keys = tuple(
            Key.parse(line, where=where) for where, line in named if line.strip() and not line.lstrip().startswith("#")
        )
        if file is not None and not keys:
            raise ConfigError(f"{file} holds no key, so the API would be open: add one with `hortator keys new TENANT`")
        return cls(keys)

    def caller(self, presented: str | None) -> Caller | None:
        """Who holds this key; None if nobody does.  Looks at every key, so time does not tell which one matched."""
        if not self.keys:
            return Caller()
        digest = hashlib.sha256((presented or "").encode("utf-8", "surrogateescape")).digest()
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.digest, digest):
                found = key.caller
        return found


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(f"cannot read the key file {file}: {problem}") from None


class KeyGate:
    """ASGI: nothing behind it is reached without a key, also no unknown path.  Puts the Caller in the scope's state."""

    def __init__(self, app: ASGIApp, *, ring: KeyRing, open_paths: frozenset[str]) -> None:
        self._app, self._ring, self._open = app, ring, ALWAYS_OPEN | open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        caller = self._ring.caller(bearer(Headers(scope=scope)))
        if caller is None and scope["path"] not in self._open:
            await refusal(Unauthorized("send a valid key: Authorization: Bearer KEY"))(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send)


def bearer(headers: Headers) -> str | None:
    """The key of the Authorization header."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None

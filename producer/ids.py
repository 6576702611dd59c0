"""Job ids that prove who issued them: an expired id (410) is told from a never-issued one (404) without storage.

An id is a version 8 UUID: 74 random bits, then 48 bits of a keyed hash over these and the tenant.  Another tenant's id
does not check out, so it answers exactly as one that never was.
"""

import hashlib
import hmac
import os
import uuid

MAC_BYTES = 6


class Mint:
    """Issues and recognises the ids of one namespace; the secret is kept in its store."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def issue(self, tenant: str) -> str:
        random = bytearray(os.urandom(10))
        random[6] = 0x80 | random[6] & 0x0F  # version 8
        random[8] = 0x80 | random[8] & 0x3F  # the RFC's variant
        text = (bytes(random) + self._mac(bytes(random), tenant)).hex()
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"

    def issued(self, job_id: str, tenant: str) -> bool:
        """True when this mint made the id for this tenant; ids that callers chose themselves are not recognised."""
        try:
            raw = uuid.UUID(job_id).bytes
        except ValueError:
            return False
        return str(uuid.UUID(bytes=raw)) == job_id and hmac.compare_digest(raw[10:], self._mac(raw[:10], tenant))

    def _mac(self, random: bytes, tenant: str) -> bytes:
        return hashlib.blake2b(random + tenant.encode(), key=self._secret, digest_size=MAC_BYTES).digest()


def new_secret() -> bytes:
    return os.urandom(32).hex().encode()

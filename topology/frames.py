"""Frames of the control connections: what ranks and front say to each other beside the collectives.

    offset  size  field
    0       4     magic "HRTC"
    4       1     version
    5       1     kind
    6       2     rank of the sender (FRONT for the front)
    8       4     epoch
    12      4     length of the payload
    16      n     payload: one JSON object
    16+n    32    HMAC-SHA256 over direction, sequence number, header and payload

The key is drawn for every launch.  On accept the front sends CHALLENGE with a nonce; from then on both ends use a key
derived from it, and count frames.  So a frame that was recorded elsewhere, or earlier, or in the other direction, does
not verify.  Nothing is parsed before its MAC is checked, and never more than `max_payload_bytes` are held for a sender.
"""

import hashlib
import hmac
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from .errors import BadFrame

MAGIC = b"HRTC"
VERSION = 1
KEY_BYTES = 32
FRONT = 0xFFFF
MAX_PAYLOAD_BYTES = 1 << 20

_HEADER = struct.Struct("!4sBBHII")
_SEQUENCE = struct.Struct("!BQ")
_COUNTER = struct.Struct("!Q")
_MAC_BYTES = 32


class Kind(IntEnum):
    """Who says it, and what it means."""

    CHALLENGE = 1  # front: a nonce for this connection
    HELLO = 2  # rank: who I am, and the fingerprint of what I am about to run
    WELCOME = 3  # front: everybody is here and agrees; where to meet
    REFUSED = 4  # front: the group cannot start, and why
    READY = 5  # rank: loaded
    BEAT = 6  # both: alive; from a rank with busy, step, progress, still_s
    WAKE = 7  # rank 0, relayed to the peers: the next plan is coming
    FAILED = 8  # rank: why I am about to exit
    STOP = 9  # front: exit now
    PROBE = 10  # rank or keeper, on a connection of its own: a beat past one that waits for TCP to try again
    ENLIST = 11  # keeper: who I am, and the ranks that I can start
    LAUNCH = 12  # front: start these ranks; veiled, for it holds the key of the launch
    LINES = 13  # keeper: what ranks have printed
    EXITED = 14  # keeper: a rank has ended
    END = 15  # front: kill your ranks


@dataclass(frozen=True, slots=True)
class Frame:
    """One verified frame."""

    kind: Kind
    rank: int
    payload: dict[str, Any] = field(default_factory=dict)


class Framer:
    """One end of a control connection: seals what goes out, verifies what comes in.  Pure, no socket."""

    def __init__(self, key: bytes, *, epoch: int, front: bool) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"the control key has {len(key)} bytes, not {KEY_BYTES}")
        self._key = key
        self._epoch = epoch
        self._outgoing, self._incoming = (0, 1) if front else (1, 0)
        self._sent = self._received = 0
        self._buffer = bytearray()
        self.max_payload_bytes = MAX_PAYLOAD_BYTES
        """Of what comes in."""

    def rekey(self, nonce: bytes) -> None:
        """Both ends call this after CHALLENGE."""
        self._key = hmac.digest(self._key, b"hortator control" + nonce, hashlib.sha256)
        self._sent = self._received = 0

    def seal(self, kind: Kind, *, rank: int, payload: dict[str, Any] | None = None) -> bytes:
        """The frame's bytes; every call is one step of the outgoing sequence, so send all of them, in order."""
        body = json.dumps(payload or {}, separators=(",", ":")).encode()
        if len(body) > MAX_PAYLOAD_BYTES:
            raise ValueError(f"a control frame of {len(body)} bytes: the limit is {MAX_PAYLOAD_BYTES}")
        message = _HEADER.pack(MAGIC, VERSION, kind, rank, self._epoch, len(body)) + body
        mac = self._mac(self._outgoing, self._sent, message)
        self._sent += 1
        return message + mac

    def veil(self, data: bytes) -> bytes:
        """Encrypt, or decrypt at the other end: XOR with HMAC-SHA256 of a counter, under this connection's own key.

        Good for one message of a connection; its integrity is the frame's.
        """
        blocks = range(-(-len(data) // _MAC_BYTES))
        stream = b"".join(hmac.digest(self._key, b"hortator veil" + _COUNTER.pack(i), hashlib.sha256) for i in blocks)
        return bytes(a ^ b for a, b in zip(data, stream, strict=False))

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield the frames that `data` completes; raise BadFrame at the first byte that cannot be right."""
        self._buffer += data
        while (frame := self._next()) is not None:
            yield frame

    def _next(self) -> Frame | None:
        if len(self._buffer) < _HEADER.size:
            if not MAGIC.startswith(self._buffer[:4]):
                raise BadFrame("bad magic")
            return None
        kind, rank, length = self._header()
        size = _HEADER.size + length
        if len(self._buffer) < size + _MAC_BYTES:
            return None
        message, mac = bytes(self._buffer[:size]), bytes(self._buffer[size : size + _MAC_BYTES])
        if not hmac.compare_digest(mac, self._mac(self._incoming, self._received, message)):
            raise BadFrame("wrong HMAC")
        self._received += 1
        del self._buffer[: size + _MAC_BYTES]
        return Frame(kind, rank, _parse(message[_HEADER.size :]))

    def _header(self) -> tuple[Kind, int, int]:
        magic, version, kind, rank, epoch, length = _HEADER.unpack_from(self._buffer)
        if magic != MAGIC:
            raise BadFrame("bad magic")
        if version != VERSION:
            raise BadFrame(f"version {version}, not {VERSION}")
        if epoch != self._epoch:
            raise BadFrame(f"epoch {epoch}, not {self._epoch}")
        if length > self.max_payload_bytes:
            raise BadFrame(f"{length} bytes announced, {self.max_payload_bytes} allowed")
        try:
            return Kind(kind), rank, length
        except ValueError:
            raise BadFrame(f"unknown kind {kind}") from None

    def _mac(self, direction: int, sequence: int, message: bytes) -> bytes:
        return hmac.digest(self._key, _SEQUENCE.pack(direction, sequence) + message, hashlib.sha256)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadFrame(f"payload is not JSON: {error}") from None
    if not isinstance(payload, dict):
        raise BadFrame("payload is not an object")
    return payload

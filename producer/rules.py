"""Limits and lifetimes that every store keeps to."""

from dataclasses import dataclass, fields

from hortator.ceilings import MAX_BYTES, MAX_COUNT, MAX_LIFETIME_S, MAX_STRING_BYTES

from .errors import ConfigError

CLAIM_JOBS = 1000  # of one reply, which is unpacked on a stack of 8000; a group with more rows asks again
CLAIM_BYTES = 32 * 2**20  # likewise, of messages and journals; one job may be more
ROOM_COUNTS_S = 3.0  # after a beat, how long others leave a group its share


@dataclass(frozen=True)
class Rules:
    """All producers and leaders of one namespace should have the same ones.  ConfigError names the one that no store
    could keep to."""

    result_ttl_s: float = 86_400.0  # records and results, from the job's end
    journal_ttl_s: float = 3_600.0  # streams, from the job's end; cut to result_ttl_s: none outlives its record
    idempotency_ttl_s: float = 86_400.0  # from acceptance
    require_known_model: bool = True  # refuse models that no group has beaten for in result_ttl_s
    max_queued_per_model: int = 1_000_000
    max_queued_per_tenant: int = 1_000_000  # of one model
    max_message_bytes: int = 16 * 2**20
    max_letters: int = 10_000
    max_letters_bytes: int = 256 * 2**20  # of all messages in dead letters; the oldest letters fall out
    max_attempts: int = 20
    default_deadline_s: float = 7 * 86_400.0  # of a job that names none, so that it ends even if no worker ever comes
    deadline_grace_s: float = 5.0  # how long a leader may take to end a running job that is past its deadline
    beat_ttl_s: float = 5.0  # a group silent for longer is not alive
    conviction_grace_s: float = 12.0  # beyond its lease, for a leader that is silent while it runs a suspect alone
    memory_headroom: float = 0.1  # share of maxmemory that submits leave to running jobs and results

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name == "memory_headroom":  # a share, of which no store makes a whole number
                continue
            value, most = getattr(self, field.name), ceiling(field.name)
            if not 0 <= value <= most:  # NaN is neither
                raise ConfigError(f"{field.name}={value:g}: a rule is at least 0 and at most {most}")
        object.__setattr__(self, "journal_ttl_s", min(self.journal_ttl_s, self.result_ttl_s))


def ceiling(name: str) -> int:
    """The most that a rule of this name may be."""
    if name == "max_message_bytes":
        return MAX_STRING_BYTES
    if name.endswith("_s"):
        return MAX_LIFETIME_S
    return MAX_BYTES if name.endswith("_bytes") else MAX_COUNT

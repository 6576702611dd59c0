"""Settings of a producer, and the rules that it shares with leaders.  Read once at the edge: keyword > HORTATOR_*."""

from dataclasses import fields

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from hortator.ceilings import MAX_STRING_BYTES, Bytes, Count, Lifetime, Timeout

from .redis_url import RedisUrl
from .rules import Rules
from .schema import MAX_DEADLINE_S

# A submit must fail within 300 ms when Redis is away: connecting and one answer together stay below that.
CONNECT_TIMEOUT_S = 0.1
TIMEOUT_S = 0.15


class RuleSettings(BaseSettings):
    """The rules of a namespace, in seconds.  All its parties should have the same: put them into every environment."""

    result_ttl_s: Lifetime = Field(default=Rules.result_ttl_s, ge=1)
    journal_ttl_s: Lifetime = Field(default=Rules.journal_ttl_s, ge=1, description="cut to result_ttl_s")
    idempotency_ttl_s: Lifetime = Field(default=Rules.idempotency_ttl_s, ge=1)
    require_known_model: bool = Rules.require_known_model
    max_queued_per_model: Count = Field(default=Rules.max_queued_per_model, ge=1)
    max_queued_per_tenant: Count = Field(default=Rules.max_queued_per_tenant, ge=1)
    max_message_bytes: int = Field(default=Rules.max_message_bytes, ge=4096, le=MAX_STRING_BYTES)
    max_letters: Count = Field(default=Rules.max_letters, ge=1)
    max_letters_bytes: Bytes = Field(default=Rules.max_letters_bytes, ge=1)
    max_attempts: Count = Field(default=Rules.max_attempts, ge=1)
    default_deadline_s: float = Field(
        default=Rules.default_deadline_s, gt=0, le=MAX_DEADLINE_S, description="of jobs that name none"
    )
    memory_headroom: float = Field(default=Rules.memory_headroom, ge=0, lt=1)

    def rules(self) -> Rules:
        """The part that every store keeps to."""
        return Rules(**self.model_dump(include={field.name for field in fields(Rules)}))


class NamespaceSettings(RuleSettings):
    """Where a namespace is, and its rules: what all its parties must agree on."""

    model_config = SettingsConfigDict(
        env_prefix="HORTATOR_",
        frozen=True,
        extra="ignore",
        hide_input_in_errors=True,  # a URL may hold a password
    )

    redis_url: RedisUrl = "redis://127.0.0.1:6379/0"
    namespace: str = Field(default="", description="prefix of every key; the same as Celery's global_keyprefix")


class StoreSettings(NamespaceSettings):
    """What a producer needs: the namespace, and for how long it waits."""

    connect_timeout_s: Timeout = Field(default=CONNECT_TIMEOUT_S, gt=0)
    timeout_s: Timeout = Field(default=TIMEOUT_S, gt=0, description="longest wait for one answer of Redis")

"""Settings of the API, read once at the edge: keyword > environment (HORTATOR_API_*)."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from hortator.ceilings import MAX_STRING_BYTES, Count, Patience, Timeout

from .keys import KeyRing


def _read_list(value: Any) -> Any:
    """pydantic-settings would read it as well, and say neither which variable is wrong nor how it is written."""
    if not isinstance(value, str):
        return value
    with suppress(ValueError):
        found = json.loads(value)
        if isinstance(found, list):
            return found
    raise ValueError('a list is written as JSON: ["one", "two"]')


JSON_LIST = (NoDecode, BeforeValidator(_read_list))


class ApiSettings(BaseSettings):
    """Sizes in bytes, times in seconds."""

    model_config = SettingsConfigDict(env_prefix="HORTATOR_API_", frozen=True, extra="ignore")

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65_535, description="0: any free port")

    keys: Annotated[tuple[str, ...], *JSON_LIST] = Field(
        default=(), description="lines as `hortator keys new` prints them"
    )
    keys_file: Path | None = Field(default=None, description="the same lines in a file")
    open_paths: Annotated[frozenset[Literal["/metrics", "/openapi.json", "/v1/queues"]], *JSON_LIST] = Field(
        default=frozenset(), description="paths that need no key, beside /healthz and /readyz"
    )

    max_body_bytes: int = Field(default=16 * 2**20, ge=1024, le=MAX_STRING_BYTES)
    max_json_depth: int = Field(default=16, ge=4, le=200)
    max_json_containers: Count = Field(default=4096, ge=16, description="objects and arrays in one body")
    body_timeout_s: Timeout = Field(default=30.0, gt=0, description="a body must be complete after this")
    send_timeout_s: Timeout = Field(default=30.0, gt=0, description="a stream that nobody reads ends after this")
    store_timeout_s: Timeout = Field(default=0.2, gt=0, description="longest wait for one call of the store")

    max_ids: Count = Field(default=500, ge=1, description="ids in one POST /v1/jobs:status")
    max_wait_s: Patience = Field(default=60.0, ge=0, description="longest long poll")
    max_waiters: Count = Field(default=1000, ge=1, description="long polls and streams at a time")
    poll_s: Timeout = Field(default=0.02, gt=0, description="how often awaited jobs are looked at")
    keep_alive_s: Timeout = Field(default=10.0, gt=0, description="a silent stream gets a comment after this")
    outage_s: Patience = Field(
        default=60.0, gt=0, description="streams end, to be resumed, when Redis is away for longer"
    )
    sweep_s: Timeout = Field(default=1.0, gt=0, description="how often jobs past their deadline are ended")
    drain_s: Patience = Field(default=10.0, gt=0, description="SIGTERM: time for answers under way")

    def key_ring(self) -> KeyRing:
        """The keys of both sources.  Raises ConfigError naming the line that is wrong."""
        return KeyRing.read(self.keys, file=self.keys_file)

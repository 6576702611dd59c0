"""What can be said of a model group wherever it runs: names, limits and defaults, for a worker's settings and for a
model of the fleet file alike.  Pure."""

from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator

from hortator.ceilings import MAX_BYTES, MAX_TOKENS, Count, Patience, Timeout, Tokens

LOOK_S = 0.1  # how often the front looks at its ranks, and so hears of them
MIN_MARGIN_S = 4 * LOOK_S  # beyond one beat; half of it is borne between two looks, and one of them may come late
ROUNDING_S = 1e-9


class GroupSettings(BaseModel):
    """Names are the field's standard ones; times are in seconds, sizes in tokens unless they say."""

    # the model
    engine: str = Field(
        default="paged",
        max_length=512,
        pattern=r"^(paged|echo|[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*)$",
        description="paged, echo, or module:factory, called as factory(RankConfig, Mesh) -> Engine on every rank",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    load_format: Literal["safetensors", "dummy"] = Field(
        default="safetensors", description="dummy: random weights, for benchmarks of a model that is not there"
    )
    tensor_parallel_size: int = Field(default=1, ge=1, le=1024)
    pipeline_parallel_size: int = Field(default=1, ge=1, le=1024)
    max_num_seqs: int = Field(default=64, ge=1, le=65_536)
    max_model_len: int | None = Field(default=None, ge=1, le=MAX_TOKENS, description="default: the model's own")
    max_num_batched_tokens: Tokens = Field(default=2048, ge=16, description="token budget of one step")
    block_size: int = Field(default=16, ge=1, le=1024, description="tokens in one KV block")
    kv_cache_bytes: int | None = Field(
        default=None, ge=1, le=MAX_BYTES, description="per rank; default: from free memory"
    )
    gpu_memory_utilization: float = Field(
        default=0.9, gt=0, le=1, description="share of a GPU's memory for weights, KV pool and all else"
    )
    prefix_caching: bool = Field(default=True, description="reuse the KV blocks of prompts that begin alike")
    echo_latency_s: Timeout = Field(default=0.0, ge=0, description="engine=echo: time until a job's first token")

    # the group
    heartbeat_s: float = Field(default=1.0, ge=LOOK_S, le=600)
    heartbeat_timeout_s: Timeout = Field(
        default=3.0, gt=0, description="a silent rank is dead after this; at least 0.4 more than heartbeat_s"
    )
    stall_timeout_s: Patience = Field(default=5.0, gt=0, description="a busy rank without progress is hung after this")
    start_timeout_s: Patience = Field(default=600.0, gt=0)
    restart_backoff_s: Patience = Field(default=0.5, gt=0, description="doubles up to 30 s while starts fail")
    restart_budget: Count = Field(default=0, ge=0, description="restarts in restart_window_s, then give up; 0: never")
    restart_window_s: Patience = Field(default=600.0, gt=0)
    collective_timeout_s: Patience = Field(default=1800.0, gt=0)

    # the queue
    lease_s: Patience = Field(default=3.0, ge=1.0)
    outage_s: Patience = Field(
        default=15.0, ge=1.0, description="a leader that cannot renew its leases goes on computing for so long"
    )
    grace_s: Patience = Field(default=30.0, ge=0, description="SIGTERM: time to finish what runs")
    probation_tokens: Tokens = Field(default=8, ge=1, description="a suspect that gets this far is batched again")

    @model_validator(mode="after")
    def _beats_in_time(self) -> Self:
        """Else the front could never be sure of its ranks, and would claim nothing."""
        if self.heartbeat_timeout_s - self.heartbeat_s < MIN_MARGIN_S - ROUNDING_S:
            raise ValueError(
                f"heartbeat_s={self.heartbeat_s:g} leaves no time for a beat within heartbeat_timeout_s="
                f"{self.heartbeat_timeout_s:g}: set heartbeat_timeout_s to {self.heartbeat_s + MIN_MARGIN_S:g} or more,"
                " better to three times heartbeat_s"
            )
        return self

    @property
    def world_size(self) -> int:
        """Ranks, and so GPUs, of one replica."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

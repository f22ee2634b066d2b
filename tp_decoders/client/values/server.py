"""What a server says of itself, as values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tp_decoders.client.values.from_message import named


class ServingState(StrEnum):
    """In the order of the protocol's numbers."""

    SERVING = "serving"
    RECOVERING = "recovering"  # no replica has an engine, a new one is awaited; open streams pause
    DRAINING = "draining"
    FAILED = "failed"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Parallelism:
    tensor_parallel_size: int
    data_parallel_size: int


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """One replica and what is open there; `outstanding_tokens` counts all that may yet be written to those prompts."""

    replica: int
    has_engine: bool
    ready: bool
    reason: str  # why it is out, or not ready
    held: bool  # it is about to be restarted
    restarts: int
    open_requests: int
    outstanding_tokens: int
    routed_by_prefix: int
    routed_by_load: int


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The server, its limits and whether it is ready; bytes and seconds as named."""

    server_version: str
    api_version: str
    state: ServingState | None
    parallelism: Parallelism
    uptime_seconds: float
    fault: str
    max_open_requests: int
    max_prompts_per_call: int
    max_n: int
    max_logprobs: int
    max_message_bytes: int
    ready: bool
    not_ready: str  # why not
    restarts: int
    replicas: tuple[ReplicaInfo, ...]
    kernels: str  # of rank 0: instruction set and order of bfloat16 sums; empty without them


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model that is served."""

    model_id: str
    family: str
    dtype: str
    device: str
    numerics: str
    vocab_size: int
    max_context: int
    kv_capacity_tokens: int
    eos_token_ids: tuple[int, ...]
    supports_text_input: bool
    supports_token_ids_input: bool
    task: str
    labels: tuple[str, ...]
    quantization: str  # of the weights: int8, int4, or empty for none


@dataclass(frozen=True, slots=True)
class Load:
    """How busy it is; of several replicas the sums. Each rank's and replica's share: `tp-decoders status`."""

    running: int
    waiting: int
    open_requests: int
    kv_blocks_total: int
    kv_blocks_free: int
    kv_blocks_cached: int
    preemptions: int
    steps: int
    step_seconds: float
    generated_tokens: int
    prompt_tokens: int
    finished_requests: int
    aborted_requests: int
    prefix_tokens_looked_up: int
    prefix_tokens_reused: int
    draft_tokens: int
    accepted_draft_tokens: int
    weight_version: int
    guided_requests: int
    guide_compiles: int
    guide_compile_seconds: float
    guide_masks: int
    guide_mask_seconds: float
    fault: str = named("canary_fault")

from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ServingState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SERVING_STATE_UNSPECIFIED: _ClassVar[ServingState]
    SERVING_STATE_SERVING: _ClassVar[ServingState]
    SERVING_STATE_RECOVERING: _ClassVar[ServingState]
    SERVING_STATE_DRAINING: _ClassVar[ServingState]
    SERVING_STATE_FAILED: _ClassVar[ServingState]
    SERVING_STATE_CLOSED: _ClassVar[ServingState]
SERVING_STATE_UNSPECIFIED: ServingState
SERVING_STATE_SERVING: ServingState
SERVING_STATE_RECOVERING: ServingState
SERVING_STATE_DRAINING: ServingState
SERVING_STATE_FAILED: ServingState
SERVING_STATE_CLOSED: ServingState

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ServerInfo(_message.Message):
    __slots__ = ("server_version", "api_version", "state", "parallelism", "uptime_seconds", "fault", "max_open_requests", "max_prompts_per_call", "max_n", "max_logprobs", "max_message_bytes", "ready", "not_ready", "restarts", "replicas", "kernels")
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    API_VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PARALLELISM_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    MAX_OPEN_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPTS_PER_CALL_FIELD_NUMBER: _ClassVar[int]
    MAX_N_FIELD_NUMBER: _ClassVar[int]
    MAX_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    NOT_READY_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    KERNELS_FIELD_NUMBER: _ClassVar[int]
    server_version: str
    api_version: str
    state: ServingState
    parallelism: ParallelismInfo
    uptime_seconds: float
    fault: str
    max_open_requests: int
    max_prompts_per_call: int
    max_n: int
    max_logprobs: int
    max_message_bytes: int
    ready: bool
    not_ready: str
    restarts: int
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaInfo]
    kernels: str
    def __init__(self, server_version: _Optional[str] = ..., api_version: _Optional[str] = ..., state: _Optional[_Union[ServingState, str]] = ..., parallelism: _Optional[_Union[ParallelismInfo, _Mapping]] = ..., uptime_seconds: _Optional[float] = ..., fault: _Optional[str] = ..., max_open_requests: _Optional[int] = ..., max_prompts_per_call: _Optional[int] = ..., max_n: _Optional[int] = ..., max_logprobs: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., ready: _Optional[bool] = ..., not_ready: _Optional[str] = ..., restarts: _Optional[int] = ..., replicas: _Optional[_Iterable[_Union[ReplicaInfo, _Mapping]]] = ..., kernels: _Optional[str] = ...) -> None: ...

class ReplicaInfo(_message.Message):
    __slots__ = ("replica", "has_engine", "ready", "reason", "held", "restarts", "open_requests", "outstanding_tokens", "routed_by_prefix", "routed_by_load")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    HAS_ENGINE_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    OPEN_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    OUTSTANDING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROUTED_BY_PREFIX_FIELD_NUMBER: _ClassVar[int]
    ROUTED_BY_LOAD_FIELD_NUMBER: _ClassVar[int]
    replica: int
    has_engine: bool
    ready: bool
    reason: str
    held: bool
    restarts: int
    open_requests: int
    outstanding_tokens: int
    routed_by_prefix: int
    routed_by_load: int
    def __init__(self, replica: _Optional[int] = ..., has_engine: _Optional[bool] = ..., ready: _Optional[bool] = ..., reason: _Optional[str] = ..., held: _Optional[bool] = ..., restarts: _Optional[int] = ..., open_requests: _Optional[int] = ..., outstanding_tokens: _Optional[int] = ..., routed_by_prefix: _Optional[int] = ..., routed_by_load: _Optional[int] = ...) -> None: ...

class ParallelismInfo(_message.Message):
    __slots__ = ("tensor_parallel_size", "data_parallel_size")
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    DATA_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    tensor_parallel_size: int
    data_parallel_size: int
    def __init__(self, tensor_parallel_size: _Optional[int] = ..., data_parallel_size: _Optional[int] = ...) -> None: ...

class GetModelInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("model_id", "family", "dtype", "device", "numerics", "vocab_size", "max_context", "kv_capacity_tokens", "eos_token_ids", "supports_text_input", "supports_token_ids_input", "task", "labels", "quantization")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    KV_CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SUPPORTS_TEXT_INPUT_FIELD_NUMBER: _ClassVar[int]
    SUPPORTS_TOKEN_IDS_INPUT_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    family: str
    dtype: str
    device: str
    numerics: str
    vocab_size: int
    max_context: int
    kv_capacity_tokens: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    supports_text_input: bool
    supports_token_ids_input: bool
    task: str
    labels: _containers.RepeatedScalarFieldContainer[str]
    quantization: str
    def __init__(self, model_id: _Optional[str] = ..., family: _Optional[str] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., numerics: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_context: _Optional[int] = ..., kv_capacity_tokens: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., supports_text_input: _Optional[bool] = ..., supports_token_ids_input: _Optional[bool] = ..., task: _Optional[str] = ..., labels: _Optional[_Iterable[str]] = ..., quantization: _Optional[str] = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Load(_message.Message):
    __slots__ = ("running", "waiting", "kv_blocks_total", "kv_blocks_free", "preemptions", "steps", "generated_tokens", "prompt_tokens", "finished_requests", "aborted_requests", "weight_version", "step_seconds", "forward_seconds", "open_requests", "schedule_seconds", "sample_seconds", "commit_seconds", "prefix_tokens_looked_up", "prefix_tokens_reused", "kv_blocks_cached", "canaries", "canary_fault", "ranks", "collectives", "drafts", "draft_tokens", "accepted_draft_tokens", "replicas", "replayed_steps", "guided_requests", "guide_compiles", "guide_compile_seconds", "guide_masks", "guide_mask_seconds")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    ABORTED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FORWARD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    OPEN_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COMMIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_TOKENS_LOOKED_UP_FIELD_NUMBER: _ClassVar[int]
    PREFIX_TOKENS_REUSED_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    CANARIES_FIELD_NUMBER: _ClassVar[int]
    CANARY_FAULT_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVES_FIELD_NUMBER: _ClassVar[int]
    DRAFTS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_STEPS_FIELD_NUMBER: _ClassVar[int]
    GUIDED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    GUIDE_COMPILES_FIELD_NUMBER: _ClassVar[int]
    GUIDE_COMPILE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    GUIDE_MASKS_FIELD_NUMBER: _ClassVar[int]
    GUIDE_MASK_SECONDS_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    kv_blocks_total: int
    kv_blocks_free: int
    preemptions: int
    steps: int
    generated_tokens: int
    prompt_tokens: int
    finished_requests: int
    aborted_requests: int
    weight_version: int
    step_seconds: float
    forward_seconds: float
    open_requests: int
    schedule_seconds: float
    sample_seconds: float
    commit_seconds: float
    prefix_tokens_looked_up: int
    prefix_tokens_reused: int
    kv_blocks_cached: int
    canaries: int
    canary_fault: str
    ranks: _containers.RepeatedCompositeFieldContainer[RankReport]
    collectives: _containers.RepeatedCompositeFieldContainer[CollectiveCount]
    drafts: int
    draft_tokens: int
    accepted_draft_tokens: int
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaLoad]
    replayed_steps: int
    guided_requests: int
    guide_compiles: int
    guide_compile_seconds: float
    guide_masks: int
    guide_mask_seconds: float
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., kv_blocks_free: _Optional[int] = ..., preemptions: _Optional[int] = ..., steps: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., finished_requests: _Optional[int] = ..., aborted_requests: _Optional[int] = ..., weight_version: _Optional[int] = ..., step_seconds: _Optional[float] = ..., forward_seconds: _Optional[float] = ..., open_requests: _Optional[int] = ..., schedule_seconds: _Optional[float] = ..., sample_seconds: _Optional[float] = ..., commit_seconds: _Optional[float] = ..., prefix_tokens_looked_up: _Optional[int] = ..., prefix_tokens_reused: _Optional[int] = ..., kv_blocks_cached: _Optional[int] = ..., canaries: _Optional[int] = ..., canary_fault: _Optional[str] = ..., ranks: _Optional[_Iterable[_Union[RankReport, _Mapping]]] = ..., collectives: _Optional[_Iterable[_Union[CollectiveCount, _Mapping]]] = ..., drafts: _Optional[int] = ..., draft_tokens: _Optional[int] = ..., accepted_draft_tokens: _Optional[int] = ..., replicas: _Optional[_Iterable[_Union[ReplicaLoad, _Mapping]]] = ..., replayed_steps: _Optional[int] = ..., guided_requests: _Optional[int] = ..., guide_compiles: _Optional[int] = ..., guide_compile_seconds: _Optional[float] = ..., guide_masks: _Optional[int] = ..., guide_mask_seconds: _Optional[float] = ...) -> None: ...

class ReplicaLoad(_message.Message):
    __slots__ = ("replica", "load", "refused")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    replica: int
    load: Load
    refused: str
    def __init__(self, replica: _Optional[int] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., refused: _Optional[str] = ...) -> None: ...

class RankReport(_message.Message):
    __slots__ = ("rank", "node", "pid", "memory_bytes", "device_memory_bytes", "collectives", "collective_bytes", "collective_seconds")
    RANK_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVES_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVE_BYTES_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    node: str
    pid: int
    memory_bytes: int
    device_memory_bytes: int
    collectives: int
    collective_bytes: int
    collective_seconds: float
    def __init__(self, rank: _Optional[int] = ..., node: _Optional[str] = ..., pid: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., device_memory_bytes: _Optional[int] = ..., collectives: _Optional[int] = ..., collective_bytes: _Optional[int] = ..., collective_seconds: _Optional[float] = ...) -> None: ...

class CollectiveCount(_message.Message):
    __slots__ = ("kind", "count", "bytes", "seconds")
    KIND_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    count: int
    bytes: int
    seconds: float
    def __init__(self, kind: _Optional[str] = ..., count: _Optional[int] = ..., bytes: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("request_ids",)
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    request_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, request_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ("aborted",)
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    aborted: int
    def __init__(self, aborted: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("grace_seconds",)
    GRACE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    grace_seconds: float
    def __init__(self, grace_seconds: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("aborted",)
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    aborted: int
    def __init__(self, aborted: _Optional[int] = ...) -> None: ...

class RestartRequest(_message.Message):
    __slots__ = ("grace_seconds",)
    GRACE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    grace_seconds: float
    def __init__(self, grace_seconds: _Optional[float] = ...) -> None: ...

class RestartResponse(_message.Message):
    __slots__ = ("replicas", "handed_over")
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    HANDED_OVER_FIELD_NUMBER: _ClassVar[int]
    replicas: int
    handed_over: int
    def __init__(self, replicas: _Optional[int] = ..., handed_over: _Optional[int] = ...) -> None: ...

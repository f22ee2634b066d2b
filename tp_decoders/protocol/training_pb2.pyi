from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TrainSequence(_message.Message):
    __slots__ = ("token_ids", "loss_weights", "old_logprobs", "advantages", "reference_logprobs", "labels", "values", "chosen", "mark")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOSS_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    OLD_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ADVANTAGES_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    MARK_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    loss_weights: _containers.RepeatedScalarFieldContainer[float]
    old_logprobs: _containers.RepeatedScalarFieldContainer[float]
    advantages: _containers.RepeatedScalarFieldContainer[float]
    reference_logprobs: _containers.RepeatedScalarFieldContainer[float]
    labels: _containers.RepeatedScalarFieldContainer[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    chosen: bool
    mark: int
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., loss_weights: _Optional[_Iterable[float]] = ..., old_logprobs: _Optional[_Iterable[float]] = ..., advantages: _Optional[_Iterable[float]] = ..., reference_logprobs: _Optional[_Iterable[float]] = ..., labels: _Optional[_Iterable[int]] = ..., values: _Optional[_Iterable[float]] = ..., chosen: _Optional[bool] = ..., mark: _Optional[int] = ...) -> None: ...

class LossOptions(_message.Message):
    __slots__ = ("clip_low", "clip_high", "beta", "label_smoothing", "num_choices", "questions", "language_weight", "choice_weight")
    CLIP_LOW_FIELD_NUMBER: _ClassVar[int]
    CLIP_HIGH_FIELD_NUMBER: _ClassVar[int]
    BETA_FIELD_NUMBER: _ClassVar[int]
    LABEL_SMOOTHING_FIELD_NUMBER: _ClassVar[int]
    NUM_CHOICES_FIELD_NUMBER: _ClassVar[int]
    QUESTIONS_FIELD_NUMBER: _ClassVar[int]
    LANGUAGE_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    CHOICE_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    clip_low: float
    clip_high: float
    beta: float
    label_smoothing: float
    num_choices: int
    questions: float
    language_weight: float
    choice_weight: float
    def __init__(self, clip_low: _Optional[float] = ..., clip_high: _Optional[float] = ..., beta: _Optional[float] = ..., label_smoothing: _Optional[float] = ..., num_choices: _Optional[int] = ..., questions: _Optional[float] = ..., language_weight: _Optional[float] = ..., choice_weight: _Optional[float] = ...) -> None: ...

class OptimizerOptions(_message.Message):
    __slots__ = ("learning_rate", "beta1", "beta2", "epsilon", "weight_decay", "max_grad_norm")
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    MAX_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    max_grad_norm: float
    def __init__(self, learning_rate: _Optional[float] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., epsilon: _Optional[float] = ..., weight_decay: _Optional[float] = ..., max_grad_norm: _Optional[float] = ...) -> None: ...

class SequenceLogprobs(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...

class TrainTimings(_message.Message):
    __slots__ = ("forward_backward", "optimizer", "collectives")
    FORWARD_BACKWARD_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVES_FIELD_NUMBER: _ClassVar[int]
    forward_backward: float
    optimizer: float
    collectives: float
    def __init__(self, forward_backward: _Optional[float] = ..., optimizer: _Optional[float] = ..., collectives: _Optional[float] = ...) -> None: ...

class TrainStepRequest(_message.Message):
    __slots__ = ("sequences", "loss", "loss_options", "optimizer", "expected_step", "idempotency_key", "normaliser", "dropout_seed", "session", "expected_incarnation")
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    LOSS_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_STEP_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    NORMALISER_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_SEED_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedCompositeFieldContainer[TrainSequence]
    loss: str
    loss_options: LossOptions
    optimizer: OptimizerOptions
    expected_step: int
    idempotency_key: str
    normaliser: float
    dropout_seed: int
    session: str
    expected_incarnation: int
    def __init__(self, sequences: _Optional[_Iterable[_Union[TrainSequence, _Mapping]]] = ..., loss: _Optional[str] = ..., loss_options: _Optional[_Union[LossOptions, _Mapping]] = ..., optimizer: _Optional[_Union[OptimizerOptions, _Mapping]] = ..., expected_step: _Optional[int] = ..., idempotency_key: _Optional[str] = ..., normaliser: _Optional[float] = ..., dropout_seed: _Optional[int] = ..., session: _Optional[str] = ..., expected_incarnation: _Optional[int] = ...) -> None: ...

class TrainStepResponse(_message.Message):
    __slots__ = ("step", "loss", "grad_norm", "tokens", "learning_rate", "weight_version", "logprobs", "timings", "metrics", "replayed", "incarnation")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    step: int
    loss: float
    grad_norm: float
    tokens: int
    learning_rate: float
    weight_version: int
    logprobs: _containers.RepeatedCompositeFieldContainer[SequenceLogprobs]
    timings: TrainTimings
    metrics: _containers.ScalarMap[str, float]
    replayed: bool
    incarnation: int
    def __init__(self, step: _Optional[int] = ..., loss: _Optional[float] = ..., grad_norm: _Optional[float] = ..., tokens: _Optional[int] = ..., learning_rate: _Optional[float] = ..., weight_version: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[SequenceLogprobs, _Mapping]]] = ..., timings: _Optional[_Union[TrainTimings, _Mapping]] = ..., metrics: _Optional[_Mapping[str, float]] = ..., replayed: _Optional[bool] = ..., incarnation: _Optional[int] = ...) -> None: ...

class ForwardBackwardRequest(_message.Message):
    __slots__ = ("sequences", "loss", "loss_options", "expected_step", "idempotency_key", "normaliser", "dropout_seed", "session", "expected_incarnation")
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    LOSS_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_STEP_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    NORMALISER_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_SEED_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedCompositeFieldContainer[TrainSequence]
    loss: str
    loss_options: LossOptions
    expected_step: int
    idempotency_key: str
    normaliser: float
    dropout_seed: int
    session: str
    expected_incarnation: int
    def __init__(self, sequences: _Optional[_Iterable[_Union[TrainSequence, _Mapping]]] = ..., loss: _Optional[str] = ..., loss_options: _Optional[_Union[LossOptions, _Mapping]] = ..., expected_step: _Optional[int] = ..., idempotency_key: _Optional[str] = ..., normaliser: _Optional[float] = ..., dropout_seed: _Optional[int] = ..., session: _Optional[str] = ..., expected_incarnation: _Optional[int] = ...) -> None: ...

class ForwardBackwardResponse(_message.Message):
    __slots__ = ("step", "loss", "tokens", "weight_version", "logprobs", "timings", "metrics", "replayed", "incarnation", "waiting_calls")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    WAITING_CALLS_FIELD_NUMBER: _ClassVar[int]
    step: int
    loss: float
    tokens: int
    weight_version: int
    logprobs: _containers.RepeatedCompositeFieldContainer[SequenceLogprobs]
    timings: TrainTimings
    metrics: _containers.ScalarMap[str, float]
    replayed: bool
    incarnation: int
    waiting_calls: int
    def __init__(self, step: _Optional[int] = ..., loss: _Optional[float] = ..., tokens: _Optional[int] = ..., weight_version: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[SequenceLogprobs, _Mapping]]] = ..., timings: _Optional[_Union[TrainTimings, _Mapping]] = ..., metrics: _Optional[_Mapping[str, float]] = ..., replayed: _Optional[bool] = ..., incarnation: _Optional[int] = ..., waiting_calls: _Optional[int] = ...) -> None: ...

class OptimStepRequest(_message.Message):
    __slots__ = ("optimizer", "expected_step", "idempotency_key", "session", "expected_incarnation")
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_STEP_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    optimizer: OptimizerOptions
    expected_step: int
    idempotency_key: str
    session: str
    expected_incarnation: int
    def __init__(self, optimizer: _Optional[_Union[OptimizerOptions, _Mapping]] = ..., expected_step: _Optional[int] = ..., idempotency_key: _Optional[str] = ..., session: _Optional[str] = ..., expected_incarnation: _Optional[int] = ...) -> None: ...

class OptimStepResponse(_message.Message):
    __slots__ = ("step", "grad_norm", "learning_rate", "weight_version", "timings", "replayed", "incarnation")
    STEP_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    step: int
    grad_norm: float
    learning_rate: float
    weight_version: int
    timings: TrainTimings
    replayed: bool
    incarnation: int
    def __init__(self, step: _Optional[int] = ..., grad_norm: _Optional[float] = ..., learning_rate: _Optional[float] = ..., weight_version: _Optional[int] = ..., timings: _Optional[_Union[TrainTimings, _Mapping]] = ..., replayed: _Optional[bool] = ..., incarnation: _Optional[int] = ...) -> None: ...

class EvaluateRequest(_message.Message):
    __slots__ = ("sequences", "loss", "loss_options", "expected_step", "normaliser", "expected_incarnation")
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    LOSS_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_STEP_FIELD_NUMBER: _ClassVar[int]
    NORMALISER_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedCompositeFieldContainer[TrainSequence]
    loss: str
    loss_options: LossOptions
    expected_step: int
    normaliser: float
    expected_incarnation: int
    def __init__(self, sequences: _Optional[_Iterable[_Union[TrainSequence, _Mapping]]] = ..., loss: _Optional[str] = ..., loss_options: _Optional[_Union[LossOptions, _Mapping]] = ..., expected_step: _Optional[int] = ..., normaliser: _Optional[float] = ..., expected_incarnation: _Optional[int] = ...) -> None: ...

class EvaluateResponse(_message.Message):
    __slots__ = ("step", "loss", "tokens", "weight_version", "logprobs", "timings", "metrics", "incarnation")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    step: int
    loss: float
    tokens: int
    weight_version: int
    logprobs: _containers.RepeatedCompositeFieldContainer[SequenceLogprobs]
    timings: TrainTimings
    metrics: _containers.ScalarMap[str, float]
    incarnation: int
    def __init__(self, step: _Optional[int] = ..., loss: _Optional[float] = ..., tokens: _Optional[int] = ..., weight_version: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[SequenceLogprobs, _Mapping]]] = ..., timings: _Optional[_Union[TrainTimings, _Mapping]] = ..., metrics: _Optional[_Mapping[str, float]] = ..., incarnation: _Optional[int] = ...) -> None: ...

class SaveStateRequest(_message.Message):
    __slots__ = ("name", "expected_step", "idempotency_key", "expected_incarnation")
    NAME_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_STEP_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    expected_step: int
    idempotency_key: str
    expected_incarnation: int
    def __init__(self, name: _Optional[str] = ..., expected_step: _Optional[int] = ..., idempotency_key: _Optional[str] = ..., expected_incarnation: _Optional[int] = ...) -> None: ...

class SaveStateResponse(_message.Message):
    __slots__ = ("step", "name", "bytes", "weight_version", "replayed", "incarnation")
    STEP_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    step: int
    name: str
    bytes: int
    weight_version: int
    replayed: bool
    incarnation: int
    def __init__(self, step: _Optional[int] = ..., name: _Optional[str] = ..., bytes: _Optional[int] = ..., weight_version: _Optional[int] = ..., replayed: _Optional[bool] = ..., incarnation: _Optional[int] = ...) -> None: ...

class LoadStateRequest(_message.Message):
    __slots__ = ("name", "expected_step", "idempotency_key", "expected_incarnation")
    NAME_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_STEP_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    expected_step: int
    idempotency_key: str
    expected_incarnation: int
    def __init__(self, name: _Optional[str] = ..., expected_step: _Optional[int] = ..., idempotency_key: _Optional[str] = ..., expected_incarnation: _Optional[int] = ...) -> None: ...

class LoadStateResponse(_message.Message):
    __slots__ = ("step", "name", "weight_version", "replayed", "incarnation")
    STEP_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    step: int
    name: str
    weight_version: int
    replayed: bool
    incarnation: int
    def __init__(self, step: _Optional[int] = ..., name: _Optional[str] = ..., weight_version: _Optional[int] = ..., replayed: _Optional[bool] = ..., incarnation: _Optional[int] = ...) -> None: ...

class ExportRequest(_message.Message):
    __slots__ = ("name", "expected_step", "idempotency_key", "expected_incarnation")
    NAME_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_STEP_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    expected_step: int
    idempotency_key: str
    expected_incarnation: int
    def __init__(self, name: _Optional[str] = ..., expected_step: _Optional[int] = ..., idempotency_key: _Optional[str] = ..., expected_incarnation: _Optional[int] = ...) -> None: ...

class ExportResponse(_message.Message):
    __slots__ = ("step", "name", "bytes", "weight_version", "replayed", "incarnation")
    STEP_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    step: int
    name: str
    bytes: int
    weight_version: int
    replayed: bool
    incarnation: int
    def __init__(self, step: _Optional[int] = ..., name: _Optional[str] = ..., bytes: _Optional[int] = ..., weight_version: _Optional[int] = ..., replayed: _Optional[bool] = ..., incarnation: _Optional[int] = ...) -> None: ...

class DropGradientsRequest(_message.Message):
    __slots__ = ("caller", "session")
    CALLER_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    caller: str
    session: str
    def __init__(self, caller: _Optional[str] = ..., session: _Optional[str] = ...) -> None: ...

class DropGradientsResponse(_message.Message):
    __slots__ = ("step", "dropped_calls", "incarnation")
    STEP_FIELD_NUMBER: _ClassVar[int]
    DROPPED_CALLS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    step: int
    dropped_calls: int
    incarnation: int
    def __init__(self, step: _Optional[int] = ..., dropped_calls: _Optional[int] = ..., incarnation: _Optional[int] = ...) -> None: ...

class GetTrainStateRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SavedState(_message.Message):
    __slots__ = ("name", "bytes", "step")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    name: str
    bytes: int
    step: int
    def __init__(self, name: _Optional[str] = ..., bytes: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class TrainSession(_message.Message):
    __slots__ = ("caller", "name", "calls", "open_seconds", "idle_seconds")
    CALLER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    OPEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    IDLE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    caller: str
    name: str
    calls: int
    open_seconds: float
    idle_seconds: float
    def __init__(self, caller: _Optional[str] = ..., name: _Optional[str] = ..., calls: _Optional[int] = ..., open_seconds: _Optional[float] = ..., idle_seconds: _Optional[float] = ...) -> None: ...

class TrainState(_message.Message):
    __slots__ = ("step", "weight_version", "waiting_calls", "saved", "saving", "incarnation", "sessions")
    STEP_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    WAITING_CALLS_FIELD_NUMBER: _ClassVar[int]
    SAVED_FIELD_NUMBER: _ClassVar[int]
    SAVING_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    step: int
    weight_version: int
    waiting_calls: int
    saved: _containers.RepeatedCompositeFieldContainer[SavedState]
    saving: str
    incarnation: int
    sessions: _containers.RepeatedCompositeFieldContainer[TrainSession]
    def __init__(self, step: _Optional[int] = ..., weight_version: _Optional[int] = ..., waiting_calls: _Optional[int] = ..., saved: _Optional[_Iterable[_Union[SavedState, _Mapping]]] = ..., saving: _Optional[str] = ..., incarnation: _Optional[int] = ..., sessions: _Optional[_Iterable[_Union[TrainSession, _Mapping]]] = ...) -> None: ...

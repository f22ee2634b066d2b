"""What a training client asks for and gets, as plain values: no tensor, no protocol, so that they travel anywhere.

Numbers per token are one for each token after the first (what the token before it predicts), as scores are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from parallel.errors import TpError

CROSS_ENTROPY, IMPORTANCE_SAMPLING, PPO, DPO = "cross_entropy", "importance_sampling", "ppo", "dpo"


class StepConflict(TpError, RuntimeError):
    """A call that does not belong to the present step; nothing of it was applied."""


class NotApplied(TpError, RuntimeError):
    """A step whose numbers were not finite; no weight was changed."""


class TrainingUnavailable(TpError, RuntimeError):
    """The engine behind this server cannot train."""


class Kind(Enum):
    """Which call."""

    TRAIN_STEP = "TrainStep"
    FORWARD_BACKWARD = "ForwardBackward"
    OPTIM_STEP = "OptimStep"
    EVALUATE = "Evaluate"
    STATE = "GetTrainState"

    @property
    def takes_sequences(self) -> bool:
        return self in (Kind.TRAIN_STEP, Kind.FORWARD_BACKWARD, Kind.EVALUATE)

    @property
    def applies_step(self) -> bool:
        return self in (Kind.TRAIN_STEP, Kind.OPTIM_STEP)


@dataclass(frozen=True, kw_only=True)
class TrainSequence:
    """One document. An empty tuple of weights means 1 each; of anything else, that it was not given."""

    token_ids: tuple[int, ...]
    loss_weights: tuple[float, ...] = ()
    old_logprobs: tuple[float, ...] = ()
    advantages: tuple[float, ...] = ()
    reference_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TrainCall:
    """One call. `loss_options` and `optimizer` hold only what differs from the defaults."""

    kind: Kind
    sequences: tuple[TrainSequence, ...] = ()
    loss: str = CROSS_ENTROPY
    loss_options: Mapping[str, float] = field(default_factory=dict)
    optimizer: Mapping[str, float] = field(default_factory=dict)
    normaliser: float | None = None
    expected_step: int | None = None
    idempotency_key: str = ""


@dataclass(frozen=True, kw_only=True)
class TrainAnswer:
    """What a call did; what does not concern its kind stays empty."""

    step: int
    weight_version: int
    loss: float = 0.0
    grad_norm: float = 0.0
    tokens: int = 0
    learning_rate: float = 0.0
    logprobs: tuple[tuple[float, ...], ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    forward_seconds: float = 0.0
    optimizer_seconds: float = 0.0
    waiting_calls: int = 0
    replayed: bool = False

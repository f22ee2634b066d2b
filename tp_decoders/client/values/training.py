"""Training as values: what is sent of a sequence, and the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tp_decoders.access.errors import SettingsError
from tp_decoders.client.values.answers import Sample
from tp_decoders.client.values.from_message import named
from tp_decoders.client.values.requests import filled
from tp_decoders.protocol import training_pb2 as training


@dataclass(frozen=True, kw_only=True)
class TrainSequence:
    """One sequence to learn from. Numbers per token are one for each token AFTER THE FIRST, as those of a Score."""

    token_ids: Sequence[int] = ()  # at least two
    loss_weights: Sequence[float] = ()  # none: 1 each
    old_logprobs: Sequence[float] = ()  # for importance_sampling and ppo
    advantages: Sequence[float] = ()  # for importance_sampling and ppo
    reference_logprobs: Sequence[float] = ()  # for dpo, whose sequences come in pairs: chosen, rejected
    labels: Sequence[int] = ()  # as in transformers: one per token, not shifted, -100 where nothing is learned
    values: Sequence[float] = ()  # of a regression or multi-label head
    chosen: bool = False  # double-heads: the right choice of its question
    mark: int | None = None  # double-heads with cls_index

    @staticmethod
    def of_sample(prompt_ids: Sequence[int], sample: Sample, advantage: float) -> TrainSequence:
        """What a policy-gradient step takes of a sample that was generated with logprobs: the prompt's tokens have no
        advantage and no weight. SettingsError without log-probabilities.
        """
        if not sample.token_ids or len(sample.logprobs) != len(sample.token_ids):
            raise SettingsError("the sample has no log-probabilities; generate with logprobs=0")
        if not prompt_ids:
            raise SettingsError("prompt_ids is empty; give the token ids of the prompt")
        before, new = [0.0] * (len(prompt_ids) - 1), len(sample.token_ids)
        return TrainSequence(
            token_ids=(*prompt_ids, *sample.token_ids),
            loss_weights=(*before, *([1.0] * new)),
            old_logprobs=(*before, *sample.logprobs),
            advantages=(*before, *([advantage] * new)),
        )


Trainable = Sequence[int] | TrainSequence | Mapping[str, Any]
"""Token ids alone, a TrainSequence, or the protocol's fields by name."""


@dataclass(frozen=True, slots=True)
class TrainTimings:
    """Seconds; `collectives` of both others together, as rank 0 saw it."""

    forward_backward: float
    optimizer: float
    collectives: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Loss and log-probabilities (per sequence, one per token after the first) at the present weights."""

    step: int
    loss: float
    tokens: int
    weight_version: int
    logprobs: tuple[tuple[float, ...], ...]
    metrics: Mapping[str, float]
    timings: TrainTimings
    incarnation: int


@dataclass(frozen=True, slots=True)
class ForwardBackward:
    """Gradients that wait for their step; `waiting_calls` of the session, this one included."""

    step: int
    loss: float
    tokens: int
    weight_version: int
    logprobs: tuple[tuple[float, ...], ...]
    metrics: Mapping[str, float]
    timings: TrainTimings
    replayed: bool  # the stored answer to an earlier call of this idempotency_key
    incarnation: int
    waiting_calls: int


@dataclass(frozen=True, slots=True)
class OptimStep:
    """A step that was applied; `step` counts it."""

    step: int
    grad_norm: float  # before clipping
    learning_rate: float
    weight_version: int
    timings: TrainTimings
    replayed: bool
    incarnation: int


@dataclass(frozen=True, slots=True)
class TrainStep:
    """ForwardBackward and OptimStep in one; `logprobs` are under the weights before the step."""

    step: int
    loss: float
    grad_norm: float
    tokens: int
    learning_rate: float
    weight_version: int
    logprobs: tuple[tuple[float, ...], ...]
    metrics: Mapping[str, float]
    timings: TrainTimings
    replayed: bool
    incarnation: int


@dataclass(frozen=True, slots=True)
class Saved:
    """A state or a checkpoint that is complete on the server's disk."""

    name: str
    step: int
    size: int = named("bytes")
    weight_version: int = 0
    replayed: bool = False
    incarnation: int = 0


@dataclass(frozen=True, slots=True)
class Loaded:
    """A state that was gone back to."""

    name: str
    step: int
    weight_version: int
    replayed: bool
    incarnation: int


@dataclass(frozen=True, slots=True)
class Dropped:
    """Gradients that are forgotten: those of so many calls."""

    step: int
    dropped_calls: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class SavedState:
    """Of the server's folder; step None: weights alone."""

    name: str
    size: int = named("bytes")
    step: int | None = None


@dataclass(frozen=True, slots=True)
class TrainSession:
    """Whose gradients wait, and for how long."""

    caller: str
    name: str
    calls: int
    open_seconds: float
    idle_seconds: float


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where training stands. Another `incarnation`: the ranks' memory was made anew, gradients and keys are gone."""

    step: int
    weight_version: int
    waiting_calls: int
    saved: tuple[SavedState, ...]
    saving: str
    incarnation: int
    sessions: tuple[TrainSession, ...]


def train_sequences(sequences: Sequence[Trainable]) -> list[training.TrainSequence]:
    """As messages; what does not fit a field is a SettingsError that names it."""
    return [_message(index, sequence) for index, sequence in enumerate(sequences)]


def _message(index: int, sequence: Trainable) -> training.TrainSequence:
    if isinstance(sequence, TrainSequence):
        values: Mapping[str, Any] = {field.name: getattr(sequence, field.name) for field in fields(sequence)}
    else:
        values = sequence if isinstance(sequence, Mapping) else {"token_ids": sequence}
    return filled(training.TrainSequence(), values, f"sequences[{index}].")

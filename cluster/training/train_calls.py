"""What a training client asks for and gets, as plain values: no tensor, no protocol, so that they travel anywhere.

Numbers per token are one for each token after the first (what the token before it predicts), as scores are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from parallel.errors import TpError

CROSS_ENTROPY, IMPORTANCE_SAMPLING, PPO, DPO = "cross_entropy", "importance_sampling", "ppo", "dpo"
TASK = "task"
"""The loss of the head that the model was loaded with."""
IGNORED_LABEL = -100
STATE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
RESERVED_NAMES = frozenset({"latest"})


class StepConflict(TpError, RuntimeError):
    """A call that does not belong to the present step; nothing of it was applied."""


class NotApplied(TpError, RuntimeError):
    """A step whose numbers were not finite; no weight was changed."""


class TrainingUnavailable(TpError, RuntimeError):
    """The engine behind this server cannot train."""


class NoSaveRoot(TpError, RuntimeError):
    """This server was given no folder for training states."""


class NoSuchState(TpError, LookupError):
    """No complete training state of this name."""


class StateExists(TpError, FileExistsError):
    """Something of this name is there already; nothing is ever written over."""


class SaveUnderWay(TpError, RuntimeError):
    """Another state is being written; one at a time."""


class SessionOpen(TpError, RuntimeError):
    """Somebody else's gradients wait for their OptimStep; one accumulation at a time."""


class AnswerDropped(StepConflict):
    """A call that was applied, and whose answer is no longer stored."""


class TrainingFailed(TpError, RuntimeError):
    """A call that raised an error of its own inside the ranks; nothing of it was applied."""


class TrainingCancelled(TpError, RuntimeError):
    """A call whose client left before it was applied; nothing of it was."""


def name_rule(name: str) -> str | None:
    """What is wrong with a state's name; None where it may be one, and can then lead nowhere but into the root."""
    if not STATE_NAME.fullmatch(name):
        shown = repr(name[:40]) + ("..." if len(name) > 40 else "")
        return f"{shown} is no name; give 1 to 100 of A-Z a-z 0-9 . _ -, beginning with a letter or a digit"
    return f"{name!r} is reserved; choose another name" if name in RESERVED_NAMES else None


class Kind(Enum):
    """Which call."""

    TRAIN_STEP = "TrainStep"
    FORWARD_BACKWARD = "ForwardBackward"
    OPTIM_STEP = "OptimStep"
    EVALUATE = "Evaluate"
    SAVE = "SaveState"
    LOAD = "LoadState"
    EXPORT = "Export"
    STATE = "GetTrainState"
    DROP = "DropGradients"

    @property
    def takes_sequences(self) -> bool:
        return self in (Kind.TRAIN_STEP, Kind.FORWARD_BACKWARD, Kind.EVALUATE)

    @property
    def applies_step(self) -> bool:
        return self in (Kind.TRAIN_STEP, Kind.OPTIM_STEP)

    @property
    def in_session(self) -> bool:
        """Adds to, applies or drops the gradients that wait."""
        return self in (Kind.TRAIN_STEP, Kind.FORWARD_BACKWARD, Kind.OPTIM_STEP, Kind.LOAD)

    @property
    def takes_name(self) -> bool:
        return self in (Kind.SAVE, Kind.LOAD, Kind.EXPORT)

    @property
    def writes(self) -> bool:
        return self in (Kind.SAVE, Kind.EXPORT)

    @property
    def changes_weights(self) -> bool:
        return self.applies_step or self is Kind.LOAD


@dataclass(frozen=True, kw_only=True)
class TrainSequence:
    """One document. An empty tuple of weights means 1 each; of anything else, that it was not given. Labels are one per
    token, as transformers has them (shifted here, not by the caller): what each token should have been, or -100. With
    the loss of a task they are that task's: one class of the sequence, one per token, or start and end of a span.
    """

    token_ids: tuple[int, ...]
    loss_weights: tuple[float, ...] = ()
    old_logprobs: tuple[float, ...] = ()
    advantages: tuple[float, ...] = ()
    reference_logprobs: tuple[float, ...] = ()
    labels: tuple[int, ...] = ()
    values: tuple[float, ...] = ()  # of a task whose labels are numbers: one per label
    chosen: bool = False  # of double heads: the right choice of its question
    mark: int | None = None  # of double heads, cls_index: the place that stands for the sequence; None: its last token

    @property
    def targets(self) -> tuple[int, ...]:
        """What each token but the last should predict; -100 where nothing is learned."""
        return (self.labels or self.token_ids)[1:]

    @property
    def weights(self) -> tuple[float, ...]:
        """Of each target; 0 where it is ignored."""
        weights = self.loss_weights or (1.0,) * len(self.targets)
        return tuple(0.0 if t == IGNORED_LABEL else w for w, t in zip(weights, self.targets, strict=False))


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
    expected_incarnation: int | None = None  # of the ranks' memory, as answers say it
    idempotency_key: str = ""
    caller: str = ""  # whose key and session it is
    session: str = ""  # whose gradients it adds to or applies, among the caller's
    owner: str | None = None  # DropGradients: whose session, None: the caller's own
    name: str = ""  # of a state
    dropout_seed: int | None = None  # None: no dropout

    @property
    def takes_blame(self) -> bool:
        """Whether numbers that are not finite are some sequence's fault."""
        return self.kind.takes_sequences and self.kind is not Kind.EVALUATE


@dataclass(frozen=True)
class SavedName:
    """What lies under one name of the root. `step` of a state that LoadState takes, None of a plain checkpoint."""

    name: str
    step: int | None
    size: int  # bytes


@dataclass(frozen=True)
class OpenSession:
    """Gradients that wait for an OptimStep: whose, of how many calls, since when and since the last of them."""

    caller: str
    name: str
    calls: int
    open_seconds: float
    idle_seconds: float


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
    collective_seconds: float = 0.0  # of both together, on rank 0
    waiting_calls: int = 0
    replayed: bool = False
    name: str = ""
    size: int = 0  # bytes written
    saved: tuple[SavedName, ...] = ()
    saving: str = ""  # the name that is being written
    incarnation: int = 0  # of the ranks' memory: another number, gradients and keys of before are gone
    sessions: tuple[OpenSession, ...] = ()
    dropped: int = 0  # calls whose gradients were dropped


@dataclass(frozen=True)
class RestorePoint:
    """A saved state, and the weight_version by which its weights are to be known."""

    name: str
    weight_version: int


@dataclass(frozen=True)
class Later:
    """An answer that is not there yet. Once `done` is, `finish` makes it, in the engine's thread; it may raise. An
    `exclusive` one waits until no other call is under way.
    """

    done: Future[Any]
    finish: Callable[[], TrainAnswer]
    exclusive: bool = False


@dataclass(frozen=True)
class InParts:
    """A call that is under way. `advance`, in the engine's thread, does the next part of it, and returns the answer
    after the last; `cancel` leaves everything as it was before the call.
    """

    advance: Callable[[], TrainAnswer | None]
    cancel: Callable[[], None]


class TrainFuture(Future[TrainAnswer]):
    """The answer to a call. `cancel` of one that has begun asks to give it up; the answer says whether it was."""

    unwanted = False

    def cancel(self) -> bool:
        self.unwanted = True
        return super().cancel()

"""Training of the model that serves, between engine steps: what every rank does, and what rank 0 decides.

    rank 0: TrainLead(call) -- seen before? the present step? --> command stream --> TrainSide on every rank
            --> weight_version rises, cached prefixes of the old weights are dropped

The trainer (optimiser state, gradients) is made at the first call that needs it. All ranks get the same call and see
the same numbers, so they apply or refuse it alike. Saving is not done here.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from cluster.engine.commands import Commands
from cluster.engine.runner import ModelRunner
from cluster.training.calls import DPO, Kind, NotApplied, StepConflict, TrainAnswer, TrainCall, TrainSequence
from cluster.training.losses import LossOptions
from cluster.training.trainer import PassResult, TrainBatch, Trainer, TrainerConfig
from parallel.errors import ConfigError, RequestError
from parallel.loss import IGNORE_INDEX
from parallel.mesh import Groups

TRAIN = "train"
"""The name of the command."""
STORED_ANSWERS = 64
REFUSALS = (RequestError, ConfigError, FloatingPointError)
"""What every rank finds alike, from numbers all of them have; anything else ends the group."""


class TrainSide:
    """One rank's part: the trainer over the runner's own model."""

    def __init__(self, runner: ModelRunner, groups: Groups, config: TrainerConfig | None = None) -> None:
        self._runner, self._groups = runner, groups
        self._config = config or TrainerConfig(micro_batch_tokens=2048)
        self._trainer: Trainer | None = None
        self._waiting = 0

    def state(self) -> TrainAnswer:
        """Where training stands; makes no trainer."""
        step = self._trainer.step if self._trainer is not None else 0
        return TrainAnswer(step=step, weight_version=self._runner.weight_version, waiting_calls=self._waiting)

    def follow(self, call: TrainCall) -> None:
        """A follower's handler of the command: what the call's owner is told by rank 0 does not end this rank."""
        try:
            self.execute(call)
        except (RequestError, NotApplied):
            return

    def execute(self, call: TrainCall) -> TrainAnswer:
        """On every rank at once. A refused call leaves no gradient behind, and no weight changed."""
        trainer = self._ready()
        try:
            answer = self._pass(trainer, call) if call.kind.takes_sequences else self.state()
            if call.kind.applies_step:
                answer = self._apply(trainer, call, answer)
        except REFUSALS as error:
            if call.kind is not Kind.EVALUATE:
                trainer.optimizer.zero_grad()
                self._waiting = 0
            if isinstance(error, RequestError):
                raise
            raise NotApplied(f"{call.kind.value} was not applied, waiting gradients were dropped: {error}") from error
        return replace(answer, waiting_calls=self._waiting)

    def _ready(self) -> Trainer:
        if self._trainer is None:
            self._trainer = Trainer(self._runner.model, self._groups, self._config)
        return self._trainer

    def _pass(self, trainer: Trainer, call: TrainCall) -> TrainAnswer:
        run = trainer.evaluate if call.kind is Kind.EVALUATE else trainer.forward_backward
        result = run(batch_of(call, self._runner.device), call.loss, LossOptions(**call.loss_options))
        if call.kind is Kind.FORWARD_BACKWARD:
            self._waiting += 1
        return replace(
            self.state(), loss=result.loss, tokens=result.tokens, logprobs=_by_sequence(result, call.sequences),
            metrics=dict(result.metrics), forward_seconds=result.seconds,
        )  # fmt: skip

    def _apply(self, trainer: Trainer, call: TrainCall, answer: TrainAnswer) -> TrainAnswer:
        done = trainer.optim_step(config=replace(trainer.config.optimizer, **call.optimizer))
        self._waiting = 0
        self._runner.weight_version += 1
        return replace(
            answer, step=done.step, weight_version=self._runner.weight_version, grad_norm=done.grad_norm,
            learning_rate=done.learning_rate, optimizer_seconds=done.seconds,
        )  # fmt: skip


class TrainLead:
    """Rank 0: lets each call through once, in its step. Called between engine steps, in the engine's thread."""

    def __init__(self, side: TrainSide, commands: Commands, weights_changed: Callable[[], None]) -> None:
        self._side, self._commands, self._weights_changed = side, commands, weights_changed
        self._answers: OrderedDict[str, tuple[bytes, TrainAnswer]] = OrderedDict()

    def __call__(self, call: TrainCall) -> TrainAnswer:
        if call.kind is Kind.STATE:
            return self._side.state()
        digest = hashlib.sha256(repr(call).encode()).digest()
        stored = self._stored(call, digest)
        if stored is not None:
            return stored
        self._check_step(call)
        self._commands.issue(TRAIN, call)
        answer = self._side.execute(call)
        if call.kind.applies_step:
            self._weights_changed()
        if call.idempotency_key:
            self._answers[call.idempotency_key] = digest, answer
            while len(self._answers) > STORED_ANSWERS:
                self._answers.popitem(last=False)
        return answer

    def _stored(self, call: TrainCall, digest: bytes) -> TrainAnswer | None:
        known = self._answers.get(call.idempotency_key) if call.idempotency_key else None
        if known is None:
            return None
        if known[0] != digest:
            raise StepConflict(
                f"idempotency_key {call.idempotency_key!r} was used for another call, which was applied; "
                "give every call its own key, and repeat a call unchanged"
            )
        return replace(known[1], replayed=True)

    def _check_step(self, call: TrainCall) -> None:
        state = self._side.state()
        if call.expected_step is not None and call.expected_step != state.step:
            raise StepConflict(
                f"expected_step is {call.expected_step}, but {state.step} steps have been applied; nothing was "
                "changed: ask GetTrainState, and repeat a call whose answer was lost with its idempotency_key"
            )
        if call.kind is Kind.OPTIM_STEP and state.waiting_calls == 0:
            raise StepConflict("no gradients are waiting; call ForwardBackward before OptimStep")


def batch_of(call: TrainCall, device: torch.device | str) -> TrainBatch:
    """The call's sequences, packed: each position holds what concerns the token it predicts."""
    tokens: list[int] = []
    targets: list[int] = []
    for sequence in call.sequences:
        tokens += sequence.token_ids
        targets += [*sequence.token_ids[1:], IGNORE_INDEX]
    weights = _flat(call.sequences, "loss_weights", device)
    assert weights is not None, "weights have a default"
    pairs = len(call.sequences) / 2
    usual = pairs if call.loss == DPO else sum(w for s in call.sequences for w in _weights(s))
    return TrainBatch(
        token_ids=torch.tensor(tokens, dtype=torch.long, device=device),
        targets=torch.tensor(targets, dtype=torch.long, device=device),
        weights=weights,
        lengths=tuple(len(sequence.token_ids) for sequence in call.sequences),
        normaliser=usual if call.normaliser is None else call.normaliser,
        old_logprobs=_flat(call.sequences, "old_logprobs", device),
        advantages=_flat(call.sequences, "advantages", device),
        reference_logprobs=_flat(call.sequences, "reference_logprobs", device),
    )


def _weights(sequence: TrainSequence) -> tuple[float, ...]:
    return sequence.loss_weights or (1.0,) * (len(sequence.token_ids) - 1)


def _flat(sequences: tuple[TrainSequence, ...], name: str, device: torch.device | str) -> Tensor | None:
    """The numbers of all sequences, 0 at each one's last position; None where they were not given."""
    values: list[float] = []
    for sequence in sequences:
        own = _weights(sequence) if name == "loss_weights" else getattr(sequence, name)
        if not own:
            return None
        values += [*own, 0.0]
    return torch.tensor(values, dtype=torch.float32, device=device)


def _by_sequence(result: PassResult, sequences: tuple[TrainSequence, ...]) -> tuple[tuple[float, ...], ...]:
    parts = result.logprobs.cpu().split([len(sequence.token_ids) for sequence in sequences])
    return tuple(tuple(part[:-1].tolist()) for part in parts)

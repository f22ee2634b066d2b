"""Training of the model that serves, between engine steps: what every rank does when rank 0 (lead.py) says so.

The trainer (optimiser state, gradients) is made at the first call that needs it. All ranks get the same call and see
the same numbers, so they apply or refuse it alike. A save only copies out here; threads write, while streams go on. A
load reads on every rank, then takes effect on all or none.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cluster.engine.runner import ModelRunner
from cluster.training import restore
from cluster.training.blame import blame
from cluster.training.calls import (
    CROSS_ENTROPY,
    DPO,
    TASK,
    Kind,
    NotApplied,
    RestorePoint,
    TrainAnswer,
    TrainCall,
    TrainSequence,
)
from cluster.training.checkpoint import Checkpointer
from cluster.training.losses import LossOptions
from cluster.training.nonfinite import BrokenUpdate, NonFinite
from cluster.training.task_losses import task_targets
from cluster.training.trainer import PassResult, TrainBatch, Trainer, TrainerConfig
from parallel.errors import CheckpointError, ConfigError, RequestError, TpError
from parallel.loss import IGNORE_INDEX
from parallel.mesh import Groups
from tp_decoders.task_config import TaskConfig

log = logging.getLogger(__name__)
TRAIN, DROP_SAVE = "train", "drop save"
"""The names of the commands: a call, and that the save under way is over."""
CAUSE_BYTES = 512
REFUSALS = (RequestError, ConfigError, FloatingPointError)
"""What every rank finds alike, from numbers all of them have; anything else ends the group."""


@dataclass(frozen=True, kw_only=True)
class SaveConfig:
    """Where states are saved (None: nowhere), and how long a rank waits for the others' parts of one."""

    root: Path | None = None
    timeout_s: float = 600.0


class TrainSide:
    """One rank's part: the trainer over the runner's own model."""

    def __init__(
        self, runner: ModelRunner, groups: Groups, config: TrainerConfig | None = None, saves: SaveConfig = SaveConfig()
    ) -> None:
        self._runner, self._groups, self.saves = runner, groups, saves
        self._config = config or TrainerConfig(micro_batch_tokens=2048)
        self._trainer: Trainer | None = None
        self._waiting = 0
        root = saves.root
        self._saver = None if root is None else Checkpointer(root, groups, keep=0, timeout_s=saves.timeout_s)

    @property
    def handlers(self) -> Mapping[str, Callable[..., object]]:
        """What a follower does with each command."""
        return {TRAIN: self.follow, DROP_SAVE: self.drop_save}

    @property
    def began(self) -> bool:
        """Whether any call made a trainer here: gradients may wait, weights may have changed."""
        return self._trainer is not None

    def restore(self, point: RestorePoint) -> None:
        """On every rank at once, before anything is served: what a group before this one had saved."""
        self._load(self._ready(), TrainCall(kind=Kind.LOAD, name=point.name))
        self._runner.weight_version = point.weight_version

    def state(self) -> TrainAnswer:
        """Where training stands; makes no trainer."""
        step = self._trainer.step if self._trainer is not None else 0
        return TrainAnswer(step=step, weight_version=self._runner.weight_version, waiting_calls=self._waiting)

    def follow(self, call: TrainCall) -> None:
        """A follower's handler of the command: what the call's owner is told by rank 0 does not end this rank."""
        try:
            if call.kind.writes:
                self.save(call)
            else:
                self.execute(call)
        except (RequestError, NotApplied, CheckpointError):
            return

    def save(self, call: TrainCall) -> Future[Path]:
        """On every rank at once: copies out; done when every rank's part is on the disk, or one has failed."""
        assert self._saver is not None, "rank 0 asks for saves only where there is a root"
        self._saver.drop()  # rank 0 begins the next one when the last is over
        optimizer = self._ready().optimizer if call.kind is Kind.SAVE else None
        extra = {"weight_version": self._runner.weight_version}
        return self._saver.save(self._runner.model, optimizer, extra, name=call.name)

    def drop_save(self) -> None:
        """The save under way has failed somewhere: this rank's part of it ends."""
        if self._saver is not None:
            self._saver.drop()

    def close(self) -> None:
        """Lets a save under way come to its end."""
        try:
            if self._saver is not None:
                self._saver.wait()
        except (CheckpointError, TimeoutError) as error:
            log.warning("a state was not saved: %s", error)

    def execute(self, call: TrainCall) -> TrainAnswer:
        """On every rank at once. A refused call leaves no gradient behind, and no weight changed."""
        trainer, waited = self._ready(), self._groups.collective_seconds
        if call.kind is Kind.LOAD:
            return self._load(trainer, call)
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
            raise NotApplied(self._account(trainer, call, error)) from error
        waited = self._groups.collective_seconds - waited
        return replace(answer, waiting_calls=self._waiting, collective_seconds=waited)

    def _account(self, trainer: Trainer, call: TrainCall, error: Exception) -> str:
        """Why a call was not applied; where numbers are not finite, which of its sequences give them."""
        if call.kind is Kind.EVALUATE:
            return f"{call.kind.value} has no answer: {error}"
        what = f"{call.kind.value} was not applied, waiting gradients were dropped: {error}"
        of_a_sequence = isinstance(error, FloatingPointError) and not isinstance(error, BrokenUpdate)
        if not of_a_sequence or not call.kind.takes_sequences:
            return what
        options = LossOptions(**call.loss_options)
        batch = batch_of(call, self._runner.device, self._runner.model.config.task, options)
        return f"{what}: {blame(trainer, batch, call.loss, options, call.dropout_seed).words()}"

    def _ready(self) -> Trainer:
        if self._trainer is None:
            self._trainer = Trainer(self._runner.model, self._groups, self._config)
        return self._trainer

    def _pass(self, trainer: Trainer, call: TrainCall) -> TrainAnswer:
        options = LossOptions(**call.loss_options)
        batch = batch_of(call, self._runner.device, self._runner.model.config.task, options)
        if call.kind is Kind.EVALUATE:
            result = trainer.evaluate(batch, call.loss, options)
        else:
            result = trainer.forward_backward(batch, call.loss, options, call.dropout_seed)
        if not math.isfinite(result.loss):
            raise NonFinite(f"the loss is {result.loss}")
        if call.kind is Kind.FORWARD_BACKWARD:
            self._waiting += 1
        return replace(
            self.state(), loss=result.loss, tokens=result.tokens,
            logprobs=_by_sequence(result, call.sequences) if trainer.model.has_vocabulary else (),
            metrics=dict(result.metrics), forward_seconds=result.seconds,
        )  # fmt: skip

    def _load(self, trainer: Trainer, call: TrainCall) -> TrainAnswer:
        """Every rank reads its part; where all could, it takes effect on all."""
        assert self.saves.root is not None, "rank 0 asks for loads only where there is a root"
        folder, loaded, cause = self.saves.root / call.name, None, ""
        try:
            loaded = restore.read(folder, self._runner.model, self._groups.tp.rank)
            restore.check_moments(loaded, trainer.optimizer, folder)
        except Exception as error:  # noqa: BLE001  whatever it is, the other ranks must learn of it
            cause = str(error) if isinstance(error, TpError) else repr(error)
        cause = self._first_cause(cause)
        if cause:
            raise CheckpointError(f"nothing was loaded: {cause}")
        assert loaded is not None, "a rank that read nothing gives a cause"
        restore.apply(loaded, self._runner.model, trainer.optimizer)
        self._waiting = 0
        self._runner.weight_version += 1
        return replace(self.state(), name=call.name)

    def _first_cause(self, cause: str) -> str:
        """The first rank's that has one, the same on all; ranks whose disks are slower are waited for."""
        tp = self._groups.tp
        if tp.size == 1:
            return cause
        tp.talk.barrier(self.saves.timeout_s)
        own = cause.encode()[:CAUSE_BYTES].ljust(CAUSE_BYTES, b"\0")
        given = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(self._runner.device)
        gathered = tp.talk.all_gather(given, [CAUSE_BYTES] * tp.size, 0).cpu()
        texts = (bytes(part.tolist()).rstrip(b"\0").decode(errors="replace") for part in gathered.split(CAUSE_BYTES))
        return next((f"rank {rank}: {text}" for rank, text in enumerate(texts) if text), "")

    def _apply(self, trainer: Trainer, call: TrainCall, answer: TrainAnswer) -> TrainAnswer:
        done = trainer.optim_step(config=replace(trainer.config.optimizer, **call.optimizer))
        self._waiting = 0
        self._runner.weight_version += 1
        return replace(
            answer, step=done.step, weight_version=self._runner.weight_version, grad_norm=done.grad_norm,
            learning_rate=done.learning_rate, optimizer_seconds=done.seconds,
        )  # fmt: skip


def batch_of(
    call: TrainCall,
    device: torch.device | str,
    task: TaskConfig | None = None,
    options: LossOptions = LossOptions(),
) -> TrainBatch:
    """The call's sequences, packed: each position holds what concerns the token it predicts, or the task's labels."""
    if call.loss == TASK:
        return _task_batch(call, device, task, options)
    tokens: list[int] = []
    targets: list[int] = []
    for sequence in call.sequences:
        tokens += sequence.token_ids
        targets += [*sequence.targets, IGNORE_INDEX]
    weights = _flat(call.sequences, "loss_weights", device)
    assert weights is not None, "weights have a default"
    pairs = len(call.sequences) / 2
    usual = pairs if call.loss == DPO else sum(w for s in call.sequences for w in s.weights)
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


def _task_batch(
    call: TrainCall, device: torch.device | str, task: TaskConfig | None, options: LossOptions
) -> TrainBatch:
    if task is None:
        raise RequestError("the loss 'task' on a language model; load it with task=... to train a head")
    targets = task_targets(call.sequences, task, call.normaliser, options, device)
    if task.has_vocabulary:  # both heads learn
        return replace(batch_of(replace(call, loss=CROSS_ENTROPY), device), task=targets)
    tokens = torch.tensor([token for s in call.sequences for token in s.token_ids], dtype=torch.long, device=device)
    return TrainBatch(
        token_ids=tokens,
        targets=torch.full_like(tokens, IGNORE_INDEX),
        weights=torch.zeros(len(tokens), device=device),
        lengths=tuple(len(sequence.token_ids) for sequence in call.sequences),
        normaliser=targets.normaliser,
        task=targets,
    )


def _flat(sequences: tuple[TrainSequence, ...], name: str, device: torch.device | str) -> Tensor | None:
    """The numbers of all sequences, 0 at each one's last position; None where they were not given."""
    values: list[float] = []
    for sequence in sequences:
        own = sequence.weights if name == "loss_weights" else getattr(sequence, name)
        if not own:
            return None
        values += [*own, 0.0]
    return torch.tensor(values, dtype=torch.float32, device=device)


def _by_sequence(result: PassResult, sequences: tuple[TrainSequence, ...]) -> tuple[tuple[float, ...], ...]:
    parts = result.logprobs.cpu().split([len(sequence.token_ids) for sequence in sequences])
    return tuple(tuple(part[:-1].tolist()) for part in parts)

"""Training of the model that serves, between engine steps: what every rank does when rank 0 (train_coordinator.py) says
so.

    TRAIN(call)  the first part    MORE  the next one    STOP_CALL  give it up    DROP_SAVE  the save is over

A call is done in parts (micro-batches, then the update), between which the ranks may do anything that changes no
weight. After each part they agree on how it went (rank_agreement.py): a call fails on all of them, and leaves weights,
moments, step and waiting gradients as they were. The trainer is made at the first call that needs it. A load reads on
every rank, then takes effect on all or none.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from msgspec import convert

from cluster.engine.run.model_runner import ModelRunner
from cluster.training.checkpoint import restore
from cluster.training.checkpoint.checkpointer import Checkpointer
from cluster.training.service.call_batch import batch_of, by_sequence
from cluster.training.service.rank_agreement import Failure, Verdict, agree, check_whole
from cluster.training.step.losses import LossOptions
from cluster.training.step.nonfinite_errors import NonFinite
from cluster.training.step.nonfinite_search import blame_in_parts
from cluster.training.step.optimizer import KeptGradients
from cluster.training.step.trainer import Trainer, TrainerConfig
from cluster.training.train_calls import Kind, NotApplied, RestorePoint, TrainAnswer, TrainCall, TrainingFailed
from parallel.errors import CheckpointError, CollectiveError, RequestError, WorkerError
from parallel.ranks.mesh import Groups

log = logging.getLogger(__name__)
T = TypeVar("T")
TRAIN, MORE, STOP_CALL, DROP_SAVE = "train", "train more", "stop call", "drop save"
"""The names of the commands."""
OWN = (RequestError, NotApplied, CheckpointError, TrainingFailed)
"""What a call's owner is told by rank 0, and ends no rank."""
CallParts = Generator[bool, None, TrainAnswer]
"""Yields between two parts, True where the next one is the update."""


@dataclass(frozen=True, kw_only=True)
class SaveConfig:
    """Where states are saved (None: nowhere), and how long a rank waits for the others' parts of one."""

    root: Path | None = None
    timeout_s: float = 600.0


@dataclass
class _Work:
    """The call under way, and the gradients that waited before it (None: it changes none)."""

    call: TrainCall
    parts: CallParts
    before: tuple[int, KeptGradients] | None = None
    updating: bool = False  # the next part is the update
    accounting: bool = False  # it has failed, and its sequences are looked at
    seconds: float = 0.0  # in collectives


class TrainWorker:
    """One rank's part: the trainer over the runner's own model."""

    def __init__(
        self, runner: ModelRunner, groups: Groups, config: TrainerConfig | None = None, saves: SaveConfig = SaveConfig()
    ) -> None:
        self._runner, self._groups, self.saves = runner, groups, saves
        self._config = config or TrainerConfig(micro_batch_tokens=1024)
        self._trainer: Trainer | None = None
        self._waiting = 0
        self._work: _Work | None = None
        root = saves.root
        self._saver = None if root is None else Checkpointer(root, groups, keep=0, timeout_s=saves.timeout_s)

    @property
    def handlers(self) -> Mapping[str, Callable[..., object]]:
        """What a follower does with each command."""
        return {TRAIN: self.follow, MORE: self.follow_more, STOP_CALL: self.cancel, DROP_SAVE: self.drop_save}

    @property
    def began(self) -> bool:
        """Whether any call made a trainer here: gradients may wait, weights may have changed."""
        return self._trainer is not None

    @property
    def updates_next(self) -> bool:
        """Whether the next part of the call under way changes the weights."""
        return self._work is not None and self._work.updating

    def restore(self, point: RestorePoint) -> None:
        """On every rank at once, before anything is served: what a group before this one had saved."""
        self._load(self._ready(), TrainCall(kind=Kind.LOAD, name=point.name))
        self._runner.weight_version = point.weight_version

    def state(self) -> TrainAnswer:
        """Where training stands; makes no trainer."""
        step = self._trainer.step if self._trainer is not None else 0
        return TrainAnswer(step=step, weight_version=self._runner.weight_version, waiting_calls=self._waiting)

    # ------------------------------------------------------------ followers

    def follow(self, values: object) -> None:
        """A follower's handler of the command, which is a TrainCall in plain values."""
        call = convert(values, TrainCall)
        try:
            if call.kind.writes:
                self.save(call)
            else:
                self.begin(call)
        except OWN:
            return

    def follow_more(self) -> None:
        try:
            self.advance()
        except OWN:
            return

    # ------------------------------------------------------------ states

    def save(self, call: TrainCall) -> Future[Path]:
        """On every rank at once: begins to write; done when every rank's part is on the disk, or one has failed."""
        saver = self._saver
        assert saver is not None, "rank 0 asks for saves only where there is a root"
        saver.drop()  # rank 0 begins the next one when the last is over
        trainer = self._alike(call, self._ready) if call.kind is Kind.SAVE else None
        optimizer, extra = trainer.optimizer if trainer else None, {"weight_version": self._runner.weight_version}
        begun = self._alike(call, partial(saver.save, self._runner.model, optimizer, extra, name=call.name))
        assert begun is not None, "a rank that began none has failed"
        return begun

    def _alike(self, call: TrainCall, work: Callable[[], T]) -> T | None:
        """On every rank at once: what the work returns, or on all of them the first one's failure."""
        result, error = None, None
        try:
            result = work()
        except (CollectiveError, WorkerError):
            raise
        except Exception as caught:  # noqa: BLE001  no memory, say: all ranks must learn of it
            error = caught
        if (failure := agree(error, self._groups.tp, self._runner.device)) is not None:
            self.drop_save()
            raise _error(call, failure)
        return result

    @property
    def reading(self) -> bool:
        """On rank 0: whether a save still reads the weights somewhere, which then cannot change."""
        return self._saver is not None and self._saver.reading

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

    # ------------------------------------------------------------ calls, part by part

    def begin(self, call: TrainCall) -> TrainAnswer | None:
        """On every rank at once: the first part of a call; its answer, or None where there is more to do."""
        assert self._work is None, "one call at a time"
        self._work = _Work(call, self._parts(call))
        return self.advance()

    def advance(self) -> TrainAnswer | None:
        """On every rank at once: the next part."""
        work, answer, error = self._work, None, None
        assert work is not None, "begin a call first"
        updating, waited = work.updating, self._groups.collective_seconds
        try:
            work.updating = next(work.parts)
        except StopIteration as end:
            answer = end.value
        except (CollectiveError, WorkerError):
            raise
        except Exception as caught:  # noqa: BLE001  whatever it is, it is this call's alone
            error = caught
        work.seconds += self._groups.collective_seconds - waited
        failure = agree(error, self._groups.tp, self._runner.device)
        if failure is not None:
            if updating:
                check_whole(failure)
            self._failed(work, failure)
        if answer is not None:
            self._work = None
            answer = replace(answer, collective_seconds=work.seconds)
        return answer

    def cancel(self) -> None:
        """On every rank at once: gives the call under way up between two parts."""
        work, self._work = self._work, None
        if work is not None:
            work.parts.close()
            self._undo(work)

    def _failed(self, work: _Work, failure: Failure) -> None:
        """Undone; where numbers are to blame their sequences are found first, in parts."""
        finds = failure.verdict is Verdict.NUMBERS and work.call.takes_blame
        if finds and not work.accounting:
            work.accounting, work.updating = True, False
            work.parts = self._account(work.call, failure)
            return
        self._work = None
        self._undo(work)
        raise _error(work.call, failure)

    def _undo(self, work: _Work) -> None:
        if work.before is not None and self._trainer is not None:
            self._waiting, kept = work.before
            self._trainer.optimizer.put_back(kept)

    def _account(self, call: TrainCall, failure: Failure) -> CallParts:
        """Ends with which of a call's sequences give numbers that are not finite."""
        options = LossOptions(**call.loss_options)
        batch = batch_of(call, self._runner.device, self._runner.model.config.task, options)
        found = blame_in_parts(self._ready(), batch, call.loss, options, call.dropout_seed)
        while True:
            try:
                next(found)
            except StopIteration as end:
                raise NonFinite(f"{failure.words}: {end.value.words()}") from None
            yield False

    def _ready(self) -> Trainer:
        if self._trainer is None:
            self._trainer = Trainer(self._runner.model, self._groups, self._config)
            if self._saver is not None:
                self._trainer.before_update = self._saver.settle
        return self._trainer

    def _parts(self, call: TrainCall) -> CallParts:
        trainer = self._ready()
        if call.kind is Kind.LOAD:
            return self._load(trainer, call)
        if call.kind is Kind.DROP:
            trainer.optimizer.zero_grad()
            dropped, self._waiting = self._waiting, 0
            return replace(self.state(), dropped=dropped)
        if call.kind is not Kind.EVALUATE and self._work is not None:
            adds = self._waiting > 0 and call.kind.takes_sequences
            self._work.before = self._waiting, trainer.optimizer.keep(values=adds)
        answer = self.state()
        if call.kind.takes_sequences:
            answer = yield from self._pass(trainer, call)
        if call.kind.applies_step:
            yield True
            answer = self._apply(trainer, call, answer)
        return replace(answer, waiting_calls=self._waiting)

    def _pass(self, trainer: Trainer, call: TrainCall) -> CallParts:
        options = LossOptions(**call.loss_options)
        batch = batch_of(call, self._runner.device, self._runner.model.config.task, options)
        backward = call.kind is not Kind.EVALUATE
        parts = trainer.in_parts(batch, call.loss, options, call.dropout_seed if backward else None, backward)
        while True:
            try:
                next(parts)
            except StopIteration as end:
                result = end.value
                break
            yield False
        if not math.isfinite(result.loss):
            raise NonFinite(f"the loss is {result.loss}")
        if call.kind is Kind.FORWARD_BACKWARD:
            self._waiting += 1
        return replace(
            self.state(), loss=result.loss, tokens=result.tokens,
            logprobs=by_sequence(result, call.sequences) if trainer.model.has_vocabulary else (),
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

    def _load(self, trainer: Trainer, call: TrainCall) -> TrainAnswer:
        """Every rank reads its part; where all could, it takes effect on all."""
        assert self.saves.root is not None, "rank 0 asks for loads only where there is a root"
        folder, loaded, error, tp = self.saves.root / call.name, None, None, self._groups.tp
        try:
            loaded = restore.read(folder, self._runner.model, tp.rank)
            restore.check_moments(loaded, trainer.optimizer, folder)
        except Exception as caught:  # noqa: BLE001  whatever it is, the other ranks must learn of it
            error = caught
        if tp.size > 1:
            tp.talk.barrier(self.saves.timeout_s)  # ranks whose disks are slower are waited for
        failure = agree(error, tp, self._runner.device)
        if failure is not None:
            raise CheckpointError(f"nothing was loaded: {failure.words}")
        assert loaded is not None, "a rank that read nothing gives a cause"
        trainer.before_update()
        try:
            restore.apply(loaded, self._runner.model, trainer.optimizer)
        except Exception as caught:
            raise WorkerError(f"the state {call.name!r} was written over the weights in part: {caught!r}") from caught
        self._waiting = 0
        self._runner.weight_version += 1
        return replace(self.state(), name=call.name)


def _error(call: TrainCall, failure: Failure) -> Exception:
    """What a call's owner is told."""
    what, verdict = call.kind.value, failure.verdict
    if verdict is Verdict.REFUSED:
        return RequestError(failure.words)
    if verdict is Verdict.FILES:
        return CheckpointError(failure.words)
    if verdict is Verdict.FAILED:
        return TrainingFailed(f"{what} failed, and nothing of it was applied: {failure.words}")
    if call.kind is Kind.EVALUATE:
        return NotApplied(f"{what} has no answer: {failure.words}")
    return NotApplied(f"{what} was not applied, everything is as it was before it: {failure.words}")

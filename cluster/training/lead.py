"""What rank 0 decides about training calls: each is let through once, in its step, and reaches all ranks in one order.

    TrainLead(call) -- seen before? the present step? a free name? --> command stream --> TrainSide on every rank
                    --> weight_version rises, cached prefixes of the old weights are dropped

Called between engine steps, in the engine's thread. What takes long without the weights (writing a state, comparing
checksums before one is loaded, listing) is answered Later, and the engine goes on meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cluster.engine.commands import Commands
from cluster.training.answered import Answered
from cluster.training.calls import Kind, Later, NoSaveRoot, SaveUnderWay, StepConflict, TrainAnswer, TrainCall
from cluster.training.checkpoint import verify
from cluster.training.remote import DROP_SAVE, TRAIN, TrainSide
from cluster.training.states import StateFolder, folder_size, in_thread
from parallel.errors import TpError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Saving:
    """A save that is being written; `answer` lacks only its size."""

    call: TrainCall
    done: Future[Path]
    answer: TrainAnswer


class TrainLead:
    """Rank 0. `weights_changed` is told after every call that changed them."""

    def __init__(self, side: TrainSide, commands: Commands, weights_changed: Callable[[], None]) -> None:
        self._side, self._commands, self._weights_changed = side, commands, weights_changed
        self._states = StateFolder(side.saves.root) if side.saves.root is not None else None
        self._answered = Answered()
        self._saving: _Saving | None = None

    def __call__(self, call: TrainCall) -> TrainAnswer | Later:
        if call.kind is Kind.STATE:
            return self._state()
        stored = self._answered.find(call)
        if stored is not None:
            return stored
        if call.kind.writes:
            return self._save(call)
        self._check_step(call)
        if call.kind is Kind.LOAD:
            self._check_not_saving()
            folder = self._root().find(call.name)
            verified = in_thread(partial(verify, folder))
            return Later(verified, partial(self._load, call, verified))
        return self._execute(call)

    def _execute(self, call: TrainCall) -> TrainAnswer:
        self._commands.issue(TRAIN, call)
        answer = self._side.execute(call)
        if call.kind.changes_weights:
            self._weights_changed()
        return self._answered.remember(call, answer)

    # ------------------------------------------------------------ states

    def _state(self) -> TrainAnswer | Later:
        saving = self._saving.call.name if self._saving else ""
        if self._states is None:
            return self._side.state()
        listed = in_thread(self._states.listing)
        return Later(listed, lambda: replace(self._side.state(), saved=listed.result(), saving=saving))

    def _load(self, call: TrainCall, verified: Future[Any]) -> TrainAnswer:
        """Its files are whole; what was decided before they were read is looked at again."""
        verified.result()
        stored = self._answered.find(call)
        if stored is not None:
            return stored
        self._check_step(call)
        self._check_not_saving()
        answer = self._execute(call)
        self._answered.forget_all_but(call)
        return answer

    def _save(self, call: TrainCall) -> TrainAnswer | Later:
        """Copies out on all ranks; the answer is there when the last byte is."""
        under_way = self._saving
        if under_way is not None and call.idempotency_key and under_way.call == call:
            return Later(under_way.done, partial(self._saved, under_way))
        self._check_step(call)
        self._check_not_saving()
        self._root().free(call.name)
        self._commands.issue(TRAIN, call)
        done = self._side.save(call)
        self._saving = saving = _Saving(call, done, replace(self._side.state(), name=call.name))
        return Later(done, partial(self._saved, saving))

    def _saved(self, saving: _Saving) -> TrainAnswer:
        if self._saving is saving:
            self._saving = None
        try:
            folder = saving.done.result()
        except TpError as error:
            log.error("the state %r was not saved: %s", saving.call.name, error)
            self._commands.issue(DROP_SAVE)
            raise
        stored = self._answered.find(saving.call)
        return stored or self._answered.remember(saving.call, replace(saving.answer, size=folder_size(folder)))

    def _root(self) -> StateFolder:
        if self._states is None:
            raise NoSaveRoot("this server has no folder for training states; start it with training.save_root=FOLDER")
        return self._states

    def _check_not_saving(self) -> None:
        if self._saving is not None:
            raise SaveUnderWay(f"{self._saving.call.name!r} is still being written; call again when it is complete")

    # ------------------------------------------------------------ once, and in its step

    def _check_step(self, call: TrainCall) -> None:
        state = self._side.state()
        if call.expected_step is not None and call.expected_step != state.step:
            raise StepConflict(
                f"expected_step is {call.expected_step}, but {state.step} steps have been applied; nothing was "
                "changed: ask GetTrainState, and repeat a call whose answer was lost with its idempotency_key"
            )
        if call.kind is Kind.OPTIM_STEP and state.waiting_calls == 0:
            raise StepConflict("no gradients are waiting; call ForwardBackward before OptimStep")

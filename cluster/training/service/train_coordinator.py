"""What rank 0 decides about training calls: each is let through once, in its step, and reaches all ranks in one order.

    TrainCoordinator(call) -- seen before? the present step? a free name? --> command stream --> every TrainWorker
                    --> weight_version rises, cached prefixes of the old weights are dropped

Called between engine steps, in the engine's thread. A call of several micro-batches goes on InParts, with engine steps
in between. What takes long without the weights (writing a state, comparing checksums before one is loaded, listing) is
answered Later, and the engine goes on meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cluster.engine.run.command_stream import Commands
from cluster.training.checkpoint.checkpointer import verify
from cluster.training.checkpoint.state_folder import StateFolder, folder_size, in_thread
from cluster.training.service.gradient_sessions import APPLIED, GradientSessions
from cluster.training.service.idempotency import IdempotencyCache
from cluster.training.service.train_worker import DROP_SAVE, MORE, STOP_CALL, TRAIN, TrainWorker
from cluster.training.train_calls import (
    InParts,
    Kind,
    Later,
    NoSaveRoot,
    NotApplied,
    SaveUnderWay,
    StepConflict,
    TrainAnswer,
    TrainCall,
    TrainingFailed,
)
from parallel.errors import CollectiveError, TpError, WorkerError

log = logging.getLogger(__name__)
SESSION_IDLE_S = 300.0
HELD_S = 0.002
"""Between two looks at a save that holds an update up."""


@dataclass(frozen=True)
class _Saving:
    """A save that is being written; `answer` lacks only its size."""

    call: TrainCall
    done: Future[Path]
    answer: TrainAnswer


class TrainCoordinator:
    """Rank 0. `weights_changed` is told after every call that changed them."""

    def __init__(
        self,
        side: TrainWorker,
        commands: Commands,
        weights_changed: Callable[[], None],
        session_idle_s: float = SESSION_IDLE_S,
    ) -> None:
        self._side, self._commands, self._weights_changed = side, commands, weights_changed
        self._states = StateFolder(side.saves.root) if side.saves.root is not None else None
        self._idempotency, self._sessions = IdempotencyCache(), GradientSessions(session_idle_s)
        self._saving: _Saving | None = None
        self._incarnation = time.time_ns() // 1_000_000

    def __call__(self, call: TrainCall) -> TrainAnswer | Later | InParts:
        """Raises where the call is refused, or fails; nothing of it was applied then."""
        try:
            return self._take(call)
        except TpError:
            raise
        except Exception as error:
            log.exception("%s failed on rank 0", call.kind.value)
            raise TrainingFailed(f"{call.kind.value} failed on rank 0: {error!r}") from error

    def _take(self, call: TrainCall) -> TrainAnswer | Later | InParts:
        if call.kind is Kind.STATE:
            return self._state()
        if call.kind is Kind.DROP:
            return self._drop_gradients(call)
        if (stored := self._replayed(call)) is not None:
            return stored
        if call.kind.writes:
            return self._save(call)
        self._sessions.tell(call)
        self._check_step(call)
        self._clear_the_way(call)
        if call.kind is Kind.LOAD:
            self._check_not_saving()
            folder = self._root().find(call.name)
            verified = in_thread(partial(verify, folder))
            return Later(verified, partial(self._load, call, verified), exclusive=True)
        return self._execute(call)

    def _execute(self, call: TrainCall) -> TrainAnswer | InParts:
        self._commands.issue(TRAIN, call)
        answer = self._on(call, self._side.begin(call))
        return answer or InParts(partial(self._advance, call), self._cancel)

    def _advance(self, call: TrainCall) -> TrainAnswer | None:
        if self._side.updates_next and self._side.reading:
            time.sleep(HELD_S)
            self._commands.keep_alive()
            return None
        self._commands.issue(MORE)
        return self._on(call, self._side.advance())

    def _on(self, call: TrainCall, answer: TrainAnswer | None) -> TrainAnswer | None:
        """The update follows the last pass at once, unless a save still reads what it would change."""
        while answer is None and self._side.updates_next and not self._side.reading:
            self._commands.issue(MORE)
            answer = self._side.advance()
        return None if answer is None else self._finished(call, answer)

    def _cancel(self) -> None:
        self._commands.issue(STOP_CALL)
        self._side.cancel()

    def _finished(self, call: TrainCall, answer: TrainAnswer) -> TrainAnswer:
        gradient = self._sessions.added(call) if call.kind is Kind.FORWARD_BACKWARD else None
        if call.kind.changes_weights:
            self._sessions.over(APPLIED if call.kind.applies_step else "as LoadState went back to a saved state")
            self._weights_changed()
        return self._idempotency.remember(call, self._stamped(answer), gradient)

    def _stamped(self, answer: TrainAnswer) -> TrainAnswer:
        return replace(answer, incarnation=self._incarnation)

    def _replayed(self, call: TrainCall) -> TrainAnswer | None:
        """The stored answer to the same call; what waits is said as it is now."""
        try:
            stored = self._idempotency.find(call)
        except NotApplied:
            gradient = self._idempotency.gradient_of(call)
            assert gradient is not None, "a gradient was dropped"
            self._sessions.told(gradient)
            raise
        return None if stored is None else replace(stored, waiting_calls=self._side.state().waiting_calls)

    # ------------------------------------------------------------ sessions

    def _clear_the_way(self, call: TrainCall) -> None:
        if why := self._sessions.in_the_way(call):
            log.warning("waiting gradients are dropped, %s", why)
            self._drop(call, why, untold=True)

    def _drop_gradients(self, call: TrainCall) -> TrainAnswer:
        if not self._sessions.meant(call):
            return self._stamped(self._side.state())
        by_owner = call.owner is None or call.owner == call.caller
        who = "its owner" if by_owner else f"{call.caller or 'somebody'}, who controls the server"
        return self._stamped(self._drop(call, f"by {who} (DropGradients)", untold=not by_owner))

    def _drop(self, call: TrainCall, why: str, untold: bool) -> TrainAnswer:
        order = TrainCall(kind=Kind.DROP, caller=call.caller)
        self._commands.issue(TRAIN, order)
        answer = self._side.begin(order)
        assert answer is not None, "forgetting gradients has one part"
        self._sessions.over(why, untold)
        return answer

    # ------------------------------------------------------------ states

    def _state(self) -> TrainAnswer | Later:
        saving = self._saving.call.name if self._saving else ""
        now = partial(replace, self._stamped(self._side.state()), sessions=self._sessions.listing())
        if self._states is None:
            return now()
        listed = in_thread(self._states.listing)
        return Later(listed, lambda: now(saved=listed.result(), saving=saving))

    def _load(self, call: TrainCall, verified: Future[Any]) -> TrainAnswer:
        """Its files are whole; what was decided before they were read is looked at again."""
        verified.result()
        if (stored := self._replayed(call)) is not None:
            return stored
        self._check_step(call)
        self._clear_the_way(call)
        self._check_not_saving()
        answer = self._execute(call)
        assert isinstance(answer, TrainAnswer), "a load has one part"
        self._idempotency.forget_all_but(call)
        return answer

    def _save(self, call: TrainCall) -> TrainAnswer | Later:
        """Begins on all ranks; the answer is there when the last byte is."""
        under_way = self._saving
        if under_way is not None and call.idempotency_key and under_way.call == call:
            return Later(under_way.done, partial(self._saved, under_way))
        self._check_step(call)
        self._check_not_saving()
        self._root().free(call.name)
        self._commands.issue(TRAIN, call)
        try:
            done = self._side.save(call)
        except (CollectiveError, WorkerError):
            raise
        except Exception:
            self._commands.issue(DROP_SAVE)  # the others may have begun
            raise
        self._saving = saving = _Saving(call, done, self._stamped(replace(self._side.state(), name=call.name)))
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
        stored = self._idempotency.find(saving.call)
        return stored or self._idempotency.remember(saving.call, replace(saving.answer, size=folder_size(folder)))

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
        if call.expected_incarnation not in (None, self._incarnation):
            raise StepConflict(
                f"expected_incarnation is {call.expected_incarnation}, but the ranks' memory is {self._incarnation} "
                f"after {state.step} steps: gradients and keys of before are gone; nothing was changed: ask "
                "GetTrainState, and go on from there"
            )
        if call.expected_step is not None and call.expected_step != state.step:
            raise StepConflict(
                f"expected_step is {call.expected_step}, but {state.step} steps have been applied; nothing was "
                "changed: ask GetTrainState, and repeat a call whose answer was lost with its idempotency_key"
            )
        if call.kind is Kind.OPTIM_STEP and state.waiting_calls == 0:
            raise StepConflict("no gradients are waiting; call ForwardBackward before OptimStep")

"""What training calls have done to the weights behind a front-end, and where those were last saved.

When the engine is lost its trained weights are lost with it: this says which saved state a rebuilt one has to begin
with, and refuses to go on where there is none. Afterwards training calls are let through only from callers who
have seen where training stands now. Knows no file and no rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.training.train_calls import Kind, RestorePoint, StepConflict, TrainAnswer, TrainCall
from parallel.errors import WorkerError


@dataclass(frozen=True)
class WeightVersion:
    """Where training stood at a moment: after how many steps, and by which weight_version its weights are known."""

    step: int = 0
    version: int = 0


class WeightState:
    """Follows the answers of one engine after another."""

    def __init__(self) -> None:
        self._now = WeightVersion()
        self._saved: tuple[str, WeightVersion] | None = None
        self._gradients = False
        self._rebuilt = ""
        self._lost = False
        self._asked: set[str] = set()  # callers who have seen where training stands since then

    def note(self, call: TrainCall, answer: TrainAnswer) -> None:
        """A call was answered. What was under way when an engine died never was: it counts as not applied."""
        if call.kind is Kind.STATE:
            self._asked.add(call.caller)
        if answer.replayed:
            return
        self.seen(answer)
        if call.kind in (Kind.SAVE, Kind.LOAD):
            self._saved = call.name, WeightVersion(answer.step, answer.weight_version)
        over = call.kind.changes_weights or answer.dropped > 0
        self._gradients = call.kind is Kind.FORWARD_BACKWARD or (self._gradients and not over)

    def seen(self, answer: TrainAnswer) -> None:
        """Where an engine says that it stands. What it was asked before an answer to another may be told after it."""
        if answer.weight_version > self._now.version:
            self._now = WeightVersion(answer.step, answer.weight_version)

    def restore_point(self) -> RestorePoint | None:
        """What a new engine's weights have to be; None where they are the checkpoint's, as when it first started.
        Weights that differ from all that were served before get a version of their own.
        """
        if self._now.version == 0:
            return None
        if self._saved is None:
            raise WorkerError(
                f"{self._now.step} training steps were never saved and are lost with the ranks that held them; the "
                "checkpoint's weights are not served in their place: start again, and save states (SaveState)"
            )
        name, saved = self._saved
        return RestorePoint(name, saved.version if saved.version == self._now.version else self._now.version + 1)

    @property
    def unsaved(self) -> bool:
        """Whether something that was trained exists in the ranks' memory alone."""
        saved = self._saved is not None and self._saved[1].version == self._now.version
        return self._gradients or not (saved or self._now.version == 0)

    def rebuilt(self, point: RestorePoint | None) -> str:
        """A new engine is there, with these weights: what was lost by that, in words, or nothing."""
        lost = ""
        if point is not None and self._saved is not None:
            name, saved = self._saved
            if saved.version != self._now.version:
                lost = f"back at the state {name!r}, step {saved.step}: what was done to step {self._now.step} is lost"
            self._now = WeightVersion(saved.step, point.weight_version)
            self._saved = name, self._now
        if self._gradients:
            lost = f"{lost or 'the weights are as they were'}; gradients that waited are lost"
        if lost or point is not None:
            self._rebuilt = f"the server was rebuilt after a fault{': ' if lost else ''}{lost}"
        self._lost, self._gradients = bool(lost), False
        self._asked.clear()
        return lost

    def check(self, call: TrainCall) -> None:
        """Refuses what would go on from a step that its caller has not seen, or that a repeated call cannot be told
        from a new one: the keys of calls are lost with an engine. A call that says which engine it means is that one's
        to refuse.
        """
        if call.expected_incarnation is not None:
            return
        if not self._rebuilt or call.kind in (Kind.STATE, Kind.EVALUATE, Kind.DROP) or call.kind.writes:
            return
        if self._lost and call.caller not in self._asked:
            raise StepConflict(f"{self._rebuilt}; ask GetTrainState where training stands, and go on from there")
        if call.expected_step is None:
            raise StepConflict(
                f"{self._rebuilt}, and no longer knows which idempotency keys were used before; give expected_step or "
                "expected_incarnation"
            )

"""The answers to training calls that carried an idempotency key: a repeated call gets its own again, and nobody else's.

Keys belong to the caller who gave them, so that no two clients meet in one by chance, and none learns of another's.
Bounded: the last 64 of each caller, and the callers that called last.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import replace

from cluster.training.calls import StepConflict, TrainAnswer, TrainCall

STORED_ANSWERS = 64
CALLERS = 256
Answers = OrderedDict[str, tuple[bytes, TrainAnswer]]


class Answered:
    """What rank 0 remembers."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, Answers] = OrderedDict()  # by caller, then by key

    def remember(self, call: TrainCall, answer: TrainAnswer) -> TrainAnswer:
        if call.idempotency_key:
            mine = self._of.setdefault(call.caller, OrderedDict())
            self._of.move_to_end(call.caller)
            mine[call.idempotency_key] = _digest(call), answer
            while len(mine) > STORED_ANSWERS:
                mine.popitem(last=False)
            while len(self._of) > CALLERS:
                self._of.popitem(last=False)
        return answer

    def find(self, call: TrainCall) -> TrainAnswer | None:
        """The answer that the same call of the same caller had; StepConflict where another call had its key."""
        known = self._known(call)
        if known is None:
            return None
        if known[0] != _digest(call):
            raise StepConflict(
                f"idempotency_key {call.idempotency_key!r} was used for another call, which was applied; "
                "give every call its own key, and repeat a call unchanged"
            )
        return replace(known[1], replayed=True)

    def forget_all_but(self, call: TrainCall) -> None:
        """The steps before it were undone, and may be taken again."""
        kept = self._known(call)
        self._of.clear()
        if kept is not None:
            self._of[call.caller] = OrderedDict({call.idempotency_key: kept})

    def _known(self, call: TrainCall) -> tuple[bytes, TrainAnswer] | None:
        mine = self._of.get(call.caller)
        return None if mine is None else mine.get(call.idempotency_key)


def _digest(call: TrainCall) -> bytes:
    return hashlib.sha256(repr(call).encode()).digest()

"""The answers to training calls that carried an idempotency key: a repeated call gets its own again, and nobody else's.

Keys belong to the caller who gave them, so that no two clients meet in one by chance, and none learns of another's.
Bounded in keys and bytes, per caller and in all; what has to go is the oldest of whoever holds most. A key is known for
longer than its answer is stored: the call is refused then, never applied twice.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from dataclasses import dataclass, replace

from cluster.training.service.gradient_sessions import Accumulation
from cluster.training.train_calls import AnswerDropped, NotApplied, StepConflict, TrainAnswer, TrainCall

CALLERS = 256
CALLER_KEYS, ALL_KEYS = 1024, 1 << 15
CALLER_BYTES, ALL_BYTES = 8 << 20, 64 << 20
"""Of stored answers."""
ANSWER_BYTES = 2048
"""What an answer takes beside its log-probabilities."""


@dataclass
class Stored:
    """A call that was applied. `answer` lacks its log-probabilities, which are float32; None: it had to go."""

    digest: bytes
    step: int
    answer: TrainAnswer | None
    logprobs: tuple[array[float], ...]
    gradient: Accumulation | None

    @property
    def nbytes(self) -> int:
        return 0 if self.answer is None else ANSWER_BYTES + sum(ANSWER_BYTES // 16 + 4 * len(x) for x in self.logprobs)


@dataclass
class Held:
    """One caller's, the oldest first."""

    calls: OrderedDict[str, Stored]
    nbytes: int = 0

    def drop_answer(self) -> None:
        """The oldest that there is."""
        for stored in self.calls.values():
            if stored.answer is not None:
                self.nbytes -= stored.nbytes
                stored.answer, stored.logprobs = None, ()
                return

    def drop_key(self) -> None:
        self.nbytes -= self.calls.popitem(last=False)[1].nbytes


class IdempotencyCache:
    """What rank 0 remembers."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, Held] = OrderedDict()

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for held in self._of.values())

    def remember(self, call: TrainCall, answer: TrainAnswer, gradient: Accumulation | None = None) -> TrainAnswer:
        """`gradient`: what the call's gradient went into, and waits with."""
        if call.idempotency_key:
            logprobs = tuple(array("f", values) for values in answer.logprobs)
            stored = Stored(_digest(call), answer.step, replace(answer, logprobs=()), logprobs, gradient)
            mine = self._of.setdefault(call.caller, Held(OrderedDict()))
            self._of.move_to_end(call.caller)
            if (before := mine.calls.pop(call.idempotency_key, None)) is not None:
                mine.nbytes -= before.nbytes
            mine.calls[call.idempotency_key] = stored
            mine.nbytes += stored.nbytes
            self._make_room(mine)
        return answer

    def find(self, call: TrainCall) -> TrainAnswer | None:
        """The answer that the same call of the same caller had. StepConflict where another call had its key, or where
        the answer is no longer stored; NotApplied where the gradient it made was dropped.
        """
        known = self._known(call)
        if known is None:
            return None
        if known.digest != _digest(call):
            raise StepConflict(
                f"idempotency_key {call.idempotency_key!r} was used for another call, which was applied; "
                "give every call its own key, and repeat a call unchanged"
            )
        if known.gradient is not None and known.gradient.was_dropped:
            raise NotApplied(
                f"this {call.kind.value} was answered, but its gradient was dropped since, {known.gradient.fate}: "
                "nothing of it is applied; send it again under a new key"
            )
        if known.answer is None:
            raise AnswerDropped(
                f"this {call.kind.value} was applied (the step was {known.step} after it), and is not applied again; "
                f"its answer is no longer stored: a caller's last {CALLER_BYTES >> 20} MiB are"
            )
        return replace(known.answer, logprobs=tuple(map(tuple, known.logprobs)), replayed=True)

    def gradient_of(self, call: TrainCall) -> Accumulation | None:
        """What the gradient of an earlier call of this key went into."""
        known = self._known(call)
        return None if known is None else known.gradient

    def forget_all_but(self, call: TrainCall) -> None:
        """The steps before it were undone, and may be taken again."""
        kept = self._known(call)
        self._of.clear()
        if kept is not None:
            self._of[call.caller] = Held(OrderedDict({call.idempotency_key: kept}), kept.nbytes)

    def _known(self, call: TrainCall) -> Stored | None:
        mine = self._of.get(call.caller)
        return None if mine is None else mine.calls.get(call.idempotency_key)

    def _make_room(self, mine: Held) -> None:
        while len(mine.calls) > CALLER_KEYS:
            mine.drop_key()
        while mine.nbytes > CALLER_BYTES:
            mine.drop_answer()
        while len(self._of) > CALLERS:
            self._of.popitem(last=False)
        while sum(len(held.calls) for held in self._of.values()) > ALL_KEYS:
            max(self._of.values(), key=lambda held: len(held.calls)).drop_key()
        while self.nbytes > ALL_BYTES:
            max(self._of.values(), key=lambda held: held.nbytes).drop_answer()


def _digest(call: TrainCall) -> bytes:
    return hashlib.sha256(repr(call).encode()).digest()

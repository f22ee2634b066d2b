"""Whose gradients wait. Each accumulation belongs to a session of a caller, and one is open at a time: the gradients of
two never add up.

Another's call that would add to it, apply it or change the weights under it is refused (SessionOpen: it may be sent
again) until the session's own OptimStep, DropGradients, or until nothing was added for `idle_s`. Whoever lost gradients
in any other way is told so once, before a call of the session goes on without them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.training.train_calls import Kind, NotApplied, OpenSession, SessionOpen, TrainCall

Owner = tuple[str, str]
"""A caller and the name of its session."""
MAX_UNTOLD = 1024
APPLIED = "applied"


@dataclass(eq=False)
class Accumulation:
    """Gradients that add up until an OptimStep. `fate`: empty while they wait, APPLIED, or why they were dropped."""

    owner: Owner
    began: float
    touched: float
    calls: int = 0
    fate: str = ""

    @property
    def was_dropped(self) -> bool:
        return self.fate not in ("", APPLIED)


class GradientSessions:
    """What rank 0 knows of them."""

    def __init__(self, idle_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._idle_s, self._clock = idle_s, clock
        self._open: Accumulation | None = None
        self._untold: dict[Owner, str] = {}

    def listing(self) -> tuple[OpenSession, ...]:
        if self._open is None:
            return ()
        now, (caller, name) = self._clock(), self._open.owner
        return (OpenSession(caller, name, self._open.calls, now - self._open.began, now - self._open.touched),)

    def tell(self, call: TrainCall) -> None:
        """NotApplied, once, for a session whose gradients were dropped."""
        why = self._untold.pop(_owner(call), "") if call.kind.in_session and call.kind is not Kind.LOAD else ""
        if why:
            raise NotApplied(
                f"{call.kind.value} was not applied: the gradients that waited in {_named(_owner(call))} were dropped, "
                f"{why}; send their calls again under new keys"
            )

    def told(self, accumulation: Accumulation) -> None:
        """Its owner knows."""
        self._untold.pop(accumulation.owner, None)

    def in_the_way(self, call: TrainCall) -> str:
        """Why what is open has to be dropped before the call, nothing where it has not; SessionOpen where the call has
        to wait.
        """
        held = self._open
        if held is None or not call.kind.in_session or self._own(call, held):
            return ""
        now = self._clock()
        if now - held.touched >= self._idle_s:
            return (
                f"as nothing was added for {now - held.touched:.0f} s and {_who(call.caller)} called {call.kind.value}"
            )
        raise SessionOpen(
            f"{_named(held.owner)} holds the gradients of {held.calls} calls since {now - held.began:.0f} s; call "
            f"again after its OptimStep or DropGradients, or in {max(0.0, self._idle_s - now + held.touched):.0f} s, "
            f"when nothing was added to it for {self._idle_s:g} s (training.session_idle_s)"
        )

    def meant(self, call: TrainCall) -> bool:
        """Whether a DropGradients means what is open."""
        asked = call.caller if call.owner is None else call.owner, call.session
        return self._open is not None and self._open.owner == asked

    def added(self, call: TrainCall) -> Accumulation:
        """A ForwardBackward's gradient waits."""
        now = self._clock()
        if self._open is None:
            self._open = Accumulation(_owner(call), now, now)
        self._open.calls, self._open.touched = self._open.calls + 1, now
        return self._open

    def over(self, fate: str, untold: bool = False) -> None:
        """Nothing waits any longer. `untold`: not by its owner's doing."""
        held, self._open = self._open, None
        if held is not None:
            held.fate = fate
            if untold:
                self._untold[held.owner] = fate
                while len(self._untold) > MAX_UNTOLD:
                    del self._untold[next(iter(self._untold))]

    @staticmethod
    def _own(call: TrainCall, held: Accumulation) -> bool:
        """LoadState belongs to all sessions of its caller."""
        return held.owner == _owner(call) or (call.kind is Kind.LOAD and held.owner[0] == call.caller)


def _owner(call: TrainCall) -> Owner:
    return call.caller, call.session


def _who(caller: str) -> str:
    return caller or "another session"


def _named(owner: Owner) -> str:
    caller, name = owner
    return f"session {name!r}{f' of {caller}' if caller else ''}"

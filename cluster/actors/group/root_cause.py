"""What ended a rank, in words that name the rank, the node and the cause.

When one rank fails its peers fail too, in a collective with it: `root_cause` finds the one the others followed. No
Ray call is made here, only Ray's exceptions are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from cluster.actors.group.placement import Place
from cluster.actors.group.worker import is_consequence
from parallel.errors import TpError, WorkerError


class NoAnswer(WorkerError):
    """A rank's process that gives no sign of life, though nothing says that it ended."""


@dataclass(frozen=True)
class Fault:
    """How one rank's call ended: with an error, or (None) by returning though nobody asked it to."""

    place: Place
    cause: BaseException | None

    @property
    def original(self) -> BaseException | None:
        """The exception as raised on the rank."""
        return getattr(self.cause, "cause", None) or self.cause if isinstance(self.cause, RayTaskError) else self.cause

    @property
    def depth(self) -> int:
        """The smaller, the closer to the root: a dead process, then an error of its own, then one caused by a peer."""
        if isinstance(self.original, RayActorError | NoAnswer):
            return 0
        if is_consequence(self.original):
            return 2
        return 3 if self.original is None else 1

    def message(self) -> str:
        """One line: rank R on NODE: the cause."""
        return f"{self.place}: {describe(self.original)}"

    def at_start(self) -> TpError:
        """As an exception, for a rank that did not get ready: of the original's kind where that is ours."""
        kind = type(self.original) if isinstance(self.original, TpError) else WorkerError
        return kind(f"{self.place} did not start: {describe(self.original)}")


def root_cause(faults: Sequence[Fault]) -> Fault:
    """The fault the others follow from; the lowest rank's where several could be."""
    return min(faults, key=lambda fault: (fault.depth, fault.place.rank))


def describe(error: BaseException | None) -> str:
    """A cause in one line."""
    if error is None:
        return "its program ended by itself"
    if isinstance(error, ActorUnavailableError):
        return "its node does not answer"
    if isinstance(error, RayActorError):
        return f"its process died ({_why_died(error)})"
    if isinstance(error, TpError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def _why_died(error: RayActorError) -> str:
    """Ray's long account of a dead actor in a few words. Ray names an end by a signal and a crash alike."""
    text = " ".join(str(error).split())
    if "low on memory" in text:
        return "Ray ended it because its node ran out of memory"
    if "node has died" in text or "node was terminated" in text:
        return "its node died or cannot be reached"
    return "killed or crashed" if "SYSTEM_ERROR" in text else text[:200]

"""The states of a worker group and what every event makes of each: one table, complete, no assertion.

Orders (start, rebuild) that do not fit the state are refused by an error that says so; news that come late (ready, a
fault, the order to close) change nothing. Events come from the owner and from the watcher's thread.

    new --start--> starting --ready--> running --fault--> failed --rebuild--> rebuilding --ready--> running
                                          |                  ^                     |
                                          +-----rebuild------|---------------------+ fault
    any --close--> closed
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Mapping

from parallel.errors import WorkerError


class Stage(enum.Enum):
    """Where a group is in its life."""

    NEW = "new"
    STARTING = "starting"
    RUNNING = "running"
    FAILED = "failed"
    REBUILDING = "rebuilding"
    CLOSED = "closed"


class Event(enum.Enum):
    """What happens to a group."""

    START = "start"
    READY = "ready"
    FAULT = "fault"
    REBUILD = "rebuild"
    CLOSE = "close"


_S, _E = Stage, Event
NEXT: Mapping[tuple[Stage, Event], Stage | None] = {
    (_S.NEW, _E.START): _S.STARTING,
    (_S.NEW, _E.READY): _S.RUNNING,  # ranks of an earlier owner, which were taken over
    (_S.NEW, _E.FAULT): _S.FAILED,
    (_S.NEW, _E.REBUILD): None,
    (_S.NEW, _E.CLOSE): _S.CLOSED,
    (_S.STARTING, _E.START): None,
    (_S.STARTING, _E.READY): _S.RUNNING,
    (_S.STARTING, _E.FAULT): _S.FAILED,
    (_S.STARTING, _E.REBUILD): None,
    (_S.STARTING, _E.CLOSE): _S.CLOSED,
    (_S.RUNNING, _E.START): None,
    (_S.RUNNING, _E.READY): _S.RUNNING,
    (_S.RUNNING, _E.FAULT): _S.FAILED,
    (_S.RUNNING, _E.REBUILD): _S.REBUILDING,  # its ranks work, but cannot be used: they refuse connections, say
    (_S.RUNNING, _E.CLOSE): _S.CLOSED,
    (_S.FAILED, _E.START): None,
    (_S.FAILED, _E.READY): _S.FAILED,  # given up while it was being rebuilt
    (_S.FAILED, _E.FAULT): _S.FAILED,
    (_S.FAILED, _E.REBUILD): _S.REBUILDING,
    (_S.FAILED, _E.CLOSE): _S.CLOSED,
    (_S.REBUILDING, _E.START): None,
    (_S.REBUILDING, _E.READY): _S.RUNNING,
    (_S.REBUILDING, _E.FAULT): _S.FAILED,
    (_S.REBUILDING, _E.REBUILD): None,
    (_S.REBUILDING, _E.CLOSE): _S.CLOSED,
    (_S.CLOSED, _E.START): None,
    (_S.CLOSED, _E.READY): _S.CLOSED,
    (_S.CLOSED, _E.FAULT): _S.CLOSED,
    (_S.CLOSED, _E.REBUILD): None,
    (_S.CLOSED, _E.CLOSE): _S.CLOSED,
}
"""None: refused."""


class GroupState:
    """The present stage. `fault` is the cause while it is FAILED or being rebuilt; the first one counts."""

    def __init__(self) -> None:
        self.stage = Stage.NEW
        self.fault: str | None = None
        self._lock = threading.Lock()
        self._faulted = threading.Event()

    def take(self, event: Event, cause: str = "") -> bool:
        """Whether it changed anything; WorkerError for an order that does not fit."""
        with self._lock:
            before, after = self.stage, NEXT[self.stage, event]
            if after is None:
                raise WorkerError(f"a group that is {before.value} takes no order to {event.value}")
            self.stage = after
            if after is Stage.FAILED and before is not Stage.FAILED:
                self.fault = self.fault or cause
                self._faulted.set()
            elif after is Stage.RUNNING:
                self.fault = None
                self._faulted.clear()
            elif after is Stage.CLOSED:
                self._faulted.set()  # nothing that is waited for will come
            return after is not before

    def wait_fault(self, timeout: float) -> str | None:
        """What ended the group, if anything does within the time and before it is closed."""
        self._faulted.wait(timeout)
        return self.fault

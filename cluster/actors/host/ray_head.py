"""Ray's own processes of a cluster that one command starts for itself: kept apart from its signals and from other
machines, and watched.

They are started in sessions of their own, so that a signal to the command's process group (Ctrl-C, `timeout`, a service
manager) reaches the command alone, which then ends its ranks in order. They still end when the command is killed: Ray
has the kernel see to that. Where one of them ends before its time (killed, or signalled beside the command, as a whole
control group is) nothing that Ray is asked comes back, some of it not for a minute; so its owner is told at once, asks
Ray nothing more, and `end` leaves no process.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import ray

from cluster.supervision import supervised

log = logging.getLogger(__name__)
LOOK_S = 0.2
LEAVE_S = 4.0
"""How long Ray may take to end its processes in order, with no rank left. A raylet that was signalled, too, waits for
its agents, and Ray for it.
"""
VITAL = ("raylet", "gcs_server")
Lost = Callable[[str], None]


class _OwnSession(subprocess.Popen[Any]):
    """A process that gets no signal meant for this one's group."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, start_new_session=True, **options)


@contextmanager
def _instead(owner: Any, values: dict[str, Any], without: str) -> Iterator[None]:
    """While Ray starts: names of Ray's that are not public. Where one is missing all stay as they are, with `without`
    as what that means."""
    before = {name: getattr(owner, name, None) for name in values}
    if None in before.values():
        log.warning("this Ray is another than the one known here: %s", without)
        yield
        return
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def own_sessions() -> AbstractContextManager[None]:
    """While Ray starts its processes."""
    without = "it may be ended by signals meant for this command"
    return _instead(ray._private.services, {"ConsolePopen": _OwnSession}, without)


def on_loopback() -> AbstractContextManager[None]:
    """While Ray starts a cluster that only this machine uses: its ports are then reached from this machine alone.

    Ray binds to loopback where that is its node's address, which it refuses as an argument, and chooses where clusters
    of several machines are not supported (macOS, Windows).
    """
    without = "other machines may reach its ports, which ask a token"
    return _instead(ray._private.ray_constants, {"ENABLE_RAY_CLUSTER": False}, without)


def bare() -> AbstractContextManager[None]:
    """While Ray starts a cluster for one command alone: without its jobs' interface, which Ray waits two seconds for
    even where it is to have no dashboard, and without its autoscaler, which has no machine to add.
    """
    values = {"start_api_server": lambda node, **_: setattr(node, "_webui_url", ""), "start_monitor": lambda node: None}
    return _instead(ray._private.node.Node, values, "it starts two processes more")


class RayHead:
    """The local cluster's processes, if it is local: `lost` says which of them ended, and how."""

    def __init__(self) -> None:
        self.lost = ""
        self._observers: list[Lost] = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._processes: list[tuple[str, subprocess.Popen[Any]]] = []

    def watch(self) -> None:
        """From now on; once Ray is up."""
        node: Any = ray._private.worker._global_node
        self._processes = node.live_processes() if node is not None else []
        supervised("ray-processes", self._watch, lambda error: self._tell(f"Ray's processes are not watched: {error}"))

    def observe(self, lost: Lost) -> None:
        """Be told, in a foreign thread, when Ray is gone; at once where it is."""
        with self._lock:
            self._observers.append(lost)
        if self.lost:
            lost(self.lost)

    def left(self, leave: Callable[[], None]) -> bool:
        """Whether the cluster was left in order: in a thread, since what waits for Ray may wait long for one that ends
        meanwhile."""
        if not self.lost:
            leaving = supervised("ray-shutdown", leave, lambda error: None)
            end = time.monotonic() + LEAVE_S
            while leaving.is_alive() and not self.lost and time.monotonic() < end:
                leaving.join(LOOK_S)
            leaving.join(LOOK_S if self.lost else 0.0)
            if not leaving.is_alive():
                return True
            self.lost = self.lost or f"Ray did not end within {LEAVE_S:g} s"
        return False

    def close(self) -> None:
        """Nothing that happens from now on is before its time."""
        self._over.set()

    def end(self) -> None:
        """What is left of them, and all that they have started."""
        for _, process in self._processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
        for _, process in self._processes:
            process.wait(5.0)

    def _watch(self) -> None:
        while not self.lost and not self._over.wait(LOOK_S):
            for name, process in self._processes:
                if name in VITAL and process.poll() is not None and not self.lost:
                    self._tell(f"Ray's {name} on this machine ended ({_how(process.returncode)})")

    def _tell(self, lost: str) -> None:
        if self._over.is_set():
            return
        with self._lock:
            self.lost, observers = lost, list(self._observers)
        for observer in observers:
            observer(lost)


def _how(status: int) -> str:
    return f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"

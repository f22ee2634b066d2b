"""One thread of a process stopped while all others go on: what no signal can do. ptrace, so the same user or root."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.multinode.commands import Failed

SEIZE, INTERRUPT, DETACH = 0x4206, 0x4207, 17
WALL = 0x40000000
MEASURE_S = 1.0


def can_trace() -> bool:
    """Whether this process may stop threads of others."""
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    return os.geteuid() == 0 or not scope.exists() or scope.read_text().strip() == "0"


def busiest_thread(pid: int) -> int:
    """The one that used most processor time within a second."""
    before = _times(pid)
    time.sleep(MEASURE_S)
    after = _times(pid)
    return max(after, key=lambda thread: after[thread] - before.get(thread, 0))


def stop_thread(thread: int) -> Callable[[], None]:
    """Stops it; what is returned lets go of it, or of what is left of it. Both are for one thread of this process."""
    if _ptrace(SEIZE, thread) or _ptrace(INTERRUPT, thread):
        raise Failed(f"thread {thread} could not be stopped: errno {ctypes.get_errno()}")
    os.waitpid(thread, WALL)

    def let_go() -> None:
        if _ptrace(DETACH, thread):
            with suppress(ChildProcessError):
                os.waitpid(thread, WALL | os.WNOHANG)

    return let_go


def _ptrace(request: int, thread: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    libc.ptrace.restype = ctypes.c_long
    return int(libc.ptrace(request, thread, None, None))


def _times(pid: int) -> dict[int, int]:
    times = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            fields = (task / "stat").read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        times[int(task.name)] = int(fields[11]) + int(fields[12])
    return times

"""A server that starts a Ray cluster of its own, and the end of that cluster's processes: it ends soon, with words."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from launch.commands.server_process import Server
from tests.chaos.harness.hosts import all_processes, cmdline, end, status_of
from tests.launch.training.kill_training import family_of
from tests.multinode.commands import Failed

ENDS_S = 30.0


def own_head_dies(model: Path, name: str) -> None:
    """Raises Failed where the server does not end with status 1 and words, or leaves a process."""
    server = Server(["--model", str(model), "--tp", "1", "engine.kv_blocks=64"], timeout_s=240.0)
    server.__enter__()
    family = family_of(server.pid)
    victim = next(pid for pid in family if cmdline(pid).split(b"\0")[0].endswith(name.encode()))
    end(victim, signal.SIGKILL)
    status = server.wait(ENDS_S)
    if status != 1 or f"Ray's {name} on this machine ended" not in server.said:
        raise Failed(f"without its {name} the server ended with status {status}: {server.complaint}")
    deadline = time.monotonic() + ENDS_S
    while left := [pid for pid in family if pid in all_processes() and status_of(pid)]:
        if time.monotonic() > deadline:
            raise Failed(f"without its {name} the server left processes {left}")
        time.sleep(0.1)

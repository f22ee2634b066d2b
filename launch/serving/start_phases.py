"""Where the time of a cold start went in `serve`'s own process, for one line of the log; ranks say theirs."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path


def process_age() -> float:
    """Seconds since the system started this process, the interpreter's own start included."""
    _, _, fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")
    started = int(fields.split()[19]) / os.sysconf("SC_CLK_TCK")  # field 22, counted from the machine's start
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)


def listening_line(age: float, cpu: float, seconds: Mapping[str, float]) -> str:
    """`seconds` by phase; what lies before the first is Python's start, imports and the door's checks."""
    before = max(0.0, age - sum(seconds.values()))
    parts = ", ".join(f"{name} {took:.2f} s" for name, took in {"imports and checks": before, **seconds}.items())
    return f"listening {age:.2f} s after the process began ({cpu:.2f} s of CPU in this process): {parts}"

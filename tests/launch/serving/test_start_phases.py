"""The line that says where a cold start's time went."""

from __future__ import annotations

import subprocess
import sys

from launch.serving.start_phases import listening_line, process_age

MODULE = "launch.serving.start_phases"


def test_a_process_is_as_old_as_the_system_says() -> None:
    before = process_age()
    told = subprocess.run(
        [sys.executable, "-c", f"import time; from {MODULE} import process_age; time.sleep(0.2); print(process_age())"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    after = process_age()
    assert 0.19 <= float(told.stdout) <= after - before + 0.02, "the clock ticks a hundred times a second"


def test_the_line_adds_up_to_the_whole() -> None:
    line = listening_line(9.0, 2.5, {"Ray": 3.0, "ranks": 4.25})
    assert line == (
        "listening 9.00 s after the process began (2.50 s of CPU in this process): "
        "imports and checks 1.75 s, Ray 3.00 s, ranks 4.25 s"
    )

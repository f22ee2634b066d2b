"""All tests as two runs of pytest at once: `python -m tests.side_by_side [pytest's options]`.

Tests of servers and clusters wait for processes most of their time; tests of models compute. Side by side, the second
giving way to the first, they take the longer one's time. What the second one says is shown when both have ended.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

COMPUTING = ("tests/parallel", "tests/tp_decoders", "tests/outside")
GIVES_WAY = 10  # nice(2)
NO_TESTS = 5  # pytest's exit status
RunOfPytest = subprocess.Popen[bytes]


def begun(more: Sequence[str], options: Sequence[str], niceness: int, output: int | None = None) -> RunOfPytest:
    """Each with a cache and temporary folders of its own."""
    command = [sys.executable, "-m", "pytest", *more, *options]
    return subprocess.Popen(command, stdout=output, stderr=output, preexec_fn=lambda: os.nice(niceness) and None)


def main(options: Sequence[str]) -> int:
    with tempfile.TemporaryFile() as said:
        computing = begun([*COMPUTING, "-p", "no:cacheprovider"], options, GIVES_WAY, said.fileno())
        waiting = begun([f"--ignore={folder}" for folder in COMPUTING], options, 0)
        try:
            statuses = {waiting.wait(), computing.wait()}
        finally:
            for run in (waiting, computing):
                run.terminate()
        said.seek(0)
        print(f"\nthe other run of pytest: {' '.join(COMPUTING)}", flush=True)
        sys.stdout.buffer.write(said.read())
        sys.stdout.flush()
    return max(statuses - {NO_TESTS}, default=NO_TESTS)


if __name__ == "__main__":
    missing = [folder for folder in COMPUTING if not Path(folder).is_dir()]
    sys.exit(f"no {', '.join(missing)} here: call it from the project's root" if missing else main(sys.argv[1:]))

"""All tests as three runs of pytest at once: `python -m tests.side_by_side [pytest's options]`.

Tests of servers and clusters wait for processes most of their time, tests of models compute: side by side they take
little longer than the longest run. Later runs give way to earlier ones, and are shown when all have ended.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

BESIDE = {"tests/cluster": 5, "tests/parallel tests/tp_decoders tests/outside": 10}
"""Folders and their niceness; the first run has all others, and 0."""
NO_TESTS = 5  # pytest's exit status


def begun(arguments: Sequence[str], niceness: int, output: int | None = None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.Popen(command, stdout=output, stderr=output, preexec_fn=lambda: os.nice(niceness) and None)


def main(options: Sequence[str]) -> int:
    """The worst of their exit statuses."""
    with ExitStack() as files:
        said = {folders: files.enter_context(tempfile.TemporaryFile()) for folders in BESIDE}
        runs = [begun([f"--ignore={folder}" for folder in " ".join(BESIDE).split()] + [*options], 0)]
        for folders, niceness in BESIDE.items():
            arguments = [*folders.split(), "-p", "no:cacheprovider", *options]
            runs.append(begun(arguments, niceness, said[folders].fileno()))
        try:
            statuses = {run.wait() for run in runs}
        finally:
            for run in runs:
                run.terminate()
        for folders, output in said.items():
            print(f"\nbeside it: pytest {folders}", flush=True)
            output.seek(0)
            sys.stdout.buffer.write(output.read())
            sys.stdout.flush()
    return max(statuses - {NO_TESTS}, default=NO_TESTS)


if __name__ == "__main__":
    missing = [folder for folder in " ".join(BESIDE).split() if not Path(folder).is_dir()]
    sys.exit(f"no {', '.join(missing)} here: call it from the project's root" if missing else main(sys.argv[1:]))

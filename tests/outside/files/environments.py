"""The two environments that foreign files come from: transformers 4, this one, and transformers 5, which
`make outside-files` makes beside it.

A script of this folder (reference_*.py) imports nothing of this project and is run with either one's Python: it is
given a plan, a JSON file, and leaves its answers in files the plan names. Without the second environment its cases are
skipped.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent
SECOND = FOLDER.parents[2] / ".venv-transformers5" / "bin" / "python"


@dataclass(frozen=True)
class Environment:
    """A Python with one major version of transformers."""

    name: str
    python: Path

    def ask(self, script: str, plan: Any, folder: Path, timeout: float = 240.0) -> None:
        """Runs a script of this folder on a plan; what it printed is the error where it fails."""
        path = folder / f"{Path(script).stem}.plan.json"
        path.write_text(json.dumps(plan))
        command = [str(self.python), "-P", str(FOLDER / script), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        assert done.returncode == 0, f"{self.name}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"


FIRST = Environment("transformers 4", Path(sys.executable))
ENVIRONMENTS = [
    pytest.param(FIRST, id="transformers 4"),
    pytest.param(
        Environment("transformers 5", SECOND),
        id="transformers 5",
        marks=pytest.mark.skipif(not SECOND.exists(), reason="no second environment: make outside-files"),
    ),
]
"""For `pytest.mark.parametrize("environment", ENVIRONMENTS)`, or the params of a fixture."""

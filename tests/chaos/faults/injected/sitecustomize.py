"""Python imports this at the start of every process of a chaos run (PYTHONPATH). Faults are put in where they belong
once the module they strike is imported; without their switch they do nothing.

    refuse       connections to rebuilt engines are refused while the file is there
    slow-disk    each write to the ledger takes as many seconds as the file says
    (a prompt)   one that begins with POISON ends the process of the rank that computes it, always
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

POISON = (7,) * 12
FOLDER = "TP_CHAOS_SWITCHES"
SWITCHES = Path(os.environ.get(FOLDER, "/nonexistent"))


def poison(runner: Any) -> None:
    run = runner.ModelRunner.run

    def poisoned(self: Any, plan: Any) -> Any:
        tokens = list(plan.tokens)
        places = [i for i, token in enumerate(tokens) if token == POISON[0]]
        if any(tuple(tokens[i : i + len(POISON)]) == POISON for i in places):
            os._exit(11)
        return run(self, plan)

    runner.ModelRunner.run = poisoned


def refusing(healing: Any) -> None:
    link = healing.SocketLink

    def refused(*args: Any, **more: Any) -> Any:
        if (SWITCHES / "refuse").exists():
            raise healing.WorkerError("cannot reach the engine: injected: connection refused")
        return link(*args, **more)

    healing.SocketLink = refused


def slow(files: Any) -> None:
    write = files._write_all

    def slowly(file: int, data: bytes) -> None:
        with suppress(OSError, ValueError):  # without its switch it is quick
            time.sleep(float((SWITCHES / "slow-disk").read_text()))
        write(file, data)

    files._write_all = slowly


PATCHES: dict[str, Callable[[Any], None]] = {
    "cluster.engine.run.model_runner": poison, "launch.serving.healing": refusing,
    "cluster.frontend.ledger.ledger_files": slow,
}  # fmt: skip


class Patching(importlib.abc.MetaPathFinder):
    """Lets the others find the module, and patches it once it was made."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name not in PATCHES:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            PATCHES[name](module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if FOLDER in os.environ:  # whoever imports this by its name strikes nobody
    sys.meta_path.insert(0, Patching())

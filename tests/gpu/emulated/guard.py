"""Builds and loads guard.cpp. Call `load` before torch is imported: a process has one CUDA guard, and torch reads it
when its own libraries are initialised.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


def load() -> None:
    """Registers the guard in this process. subprocess.CalledProcessError where the compiler fails."""
    assert "torch" not in sys.modules, "the guard has to be loaded before torch"
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None, "torch is not installed"
    torch = Path(spec.origin).parent
    library = _built(torch)
    names = sorted(path.name for path in (torch / "lib").iterdir())
    first = [name for name in names if name.startswith(("libgomp", "libc10.so"))]
    for name in (*first, "libtorch_cpu.so"):
        ctypes.CDLL(str(torch / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))


def _built(torch: Path) -> Path:
    """The library of this source and this torch, compiled once."""
    key = hashlib.sha256(SOURCE.read_bytes() + importlib.metadata.version("torch").encode()).hexdigest()[:12]
    target = SOURCE.parent / "_build" / f"guard-{key}.so"
    if target.exists():
        return target
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / "guard.so"
        command = [
            "g++",
            "-O1",
            "-shared",
            "-fPIC",
            "-std=c++20",
            f"-I{torch / 'include'}",
            str(SOURCE),
            "-o",
            str(made),
        ]
        subprocess.run(
            [*command, "-o", str(made), f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"], check=True, capture_output=True
        )
        os.replace(made, target)  # two test processes may build at once
    return target

"""Who compares bits of the native kernels calls this first: a build that fails is a failure, not a reason to skip."""

from __future__ import annotations

import platform
import shutil

import pytest

from parallel.native.compiled import library


def kernels_or_skip() -> None:
    """Skips where no bits are promised: on another architecture, or without a C++ compiler. Else they must load."""
    if platform.machine() != "x86_64":
        pytest.skip(f"bits are promised between x86-64 machines, and this is {platform.machine()}")
    if not (shutil.which("g++") or shutil.which("c++")):
        pytest.skip("no C++ compiler is on PATH, so there are no native kernels to compare")
    library.library()

"""The kernels give the same bits, whichever instructions they are compiled to: AVX-512's or vector extensions'."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.native import build, library
from tests.parallel.native.kernel_digests import digests

VARIANTS = {"avx2": ("-mno-avx512f",), "portable": ("-mno-avx512f", "-mno-avx2", "-mno-avx", "-mno-fma", "-O1")}
"""Flags that take instructions away; what this machine lacks is not missed."""
SOURCES = ("elementwise", "norm", "adamw", "dropout", "pool")
"""Those compared: products and attention take a minute to compile, and have models of their own."""


@pytest.fixture(scope="module")
def native() -> dict[str, str]:
    """Of the library that this machine runs."""
    if not library.available() or platform.machine() != "x86_64":
        pytest.skip("no native kernels for x86 here")
    return digests()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_gives_the_same_bits(native: dict[str, str], variant: str, tmp_path: Path) -> None:
    for source in (*build.SOURCES.glob("*.h"), *(build.SOURCES / f"{name}.cpp" for name in SOURCES)):
        shutil.copy(source, tmp_path)
    command = [sys.executable, "-m", "tests.parallel.native.kernel_digests", str(tmp_path), *VARIANTS[variant]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == native.keys()
    assert not [name for name, digest in native.items() if found[name] != digest]

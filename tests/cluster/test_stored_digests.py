"""Every machine computes the bits that are stored; so do kernels and a torch that are kept to lesser instructions."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest

from parallel.native import library
from tests.cluster.stored_digests import Digests, digests, stored

SAME_EVERYWHERE = ("float32",)
"""Types whose products and attention have one order on all instruction sets; bfloat16 joins with its order."""
LESSER = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""What makes torch and its libraries take a lesser machine's code."""


@pytest.fixture(autouse=True)
def _native() -> None:
    if not library.available() or platform.machine() != "x86_64":
        pytest.skip("no native kernels for x86 here")


def of_types(found: Digests, *types: str) -> Digests:
    return {name: own for name, own in found.items() if name.split()[1] in types}


def test_this_machine_computes_what_is_stored() -> None:
    """After a change of numerics that is meant: python -m tests.cluster.stored_digests --write"""
    assert digests() == stored()


def test_lesser_instructions_compute_what_is_stored() -> None:
    command = [sys.executable, "-m", "tests.cluster.stored_digests", "--flags=-mno-avx512f"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, env={**os.environ, **LESSER}
    )
    assert done.returncode == 0, done.stderr
    assert of_types(json.loads(done.stdout), *SAME_EVERYWHERE) == of_types(stored(), *SAME_EVERYWHERE)

"""Every machine computes the bits that are stored; so do kernels and a torch that are kept to lesser instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from parallel.native.compiled import instruction_set
from tests.cluster.stored_digests import digests, stored
from tests.native_kernels import kernels_or_skip
from tests.parallel.native import variants

LESSER = {
    instruction_set.VARIABLE: "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
"""What makes torch and its libraries take a lesser machine's code."""


@pytest.fixture(autouse=True)
def _native() -> None:
    kernels_or_skip()


def test_this_machine_computes_what_is_stored() -> None:
    """After a change of numerics that is meant: python -m tests.cluster.stored_digests --write"""
    assert digests() == stored()


def test_lesser_instructions_compute_what_is_stored() -> None:
    command = [sys.executable, "-m", "tests.cluster.stored_digests", f"--flags={' '.join(variants.FLAGS)}"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, env={**os.environ, **LESSER}
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == stored()

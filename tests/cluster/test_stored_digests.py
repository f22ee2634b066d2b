"""Every machine computes the bits that are stored; so do kernels and a torch that are kept to lesser instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from parallel.native.compiled import instruction_set
from tests.cluster.stored_digests import Digests, digests, stored
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


def under(environment: dict[str, str], *arguments: str) -> Digests:
    """What a process of its own computes."""
    flags = f"--flags={' '.join(variants.FLAGS)}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.stored_digests", flags, *arguments],
        capture_output=True, text=True, check=False, timeout=600, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: Digests = json.loads(done.stdout)
    return found


def test_lesser_instructions_compute_what_is_stored() -> None:
    assert under(LESSER) == stored()


def test_tiles_compute_what_is_stored() -> None:
    tiled = under({instruction_set.VARIABLE: instruction_set.EMULATED}, "--dtypes", "bfloat16")  # no others use them
    assert tiled == {name: found for name, found in stored().items() if name.endswith(" bfloat16")}

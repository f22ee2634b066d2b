"""The CUDA branches with real values on a machine without a GPU (docs/gpu.md says what that proves): every family
generates, trains and answers a padded call on an emulated device as on the CPU, and no operator mixes devices.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.emulated.tiny_configs import CONFIGS

ROOT = Path(__file__).resolve().parents[2]
GREEDY_WAITS = 2
"""The ids and their logits, read by the host."""
UPDATE_WAITS = 1
"""The gradient's norm."""


@pytest.fixture(scope="module")
def families() -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-m", "tests.gpu.emulated.families", *CONFIGS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {each["family"]: each for each in found}


@pytest.mark.parametrize("family", CONFIGS)
def test_a_family_generates_on_emulated_cuda_what_it_generates_on_the_cpu(
    families: dict[str, dict[str, Any]], family: str
) -> None:
    found = families[family]
    for kind in ("greedy", "sampled"):
        cpu, cuda = found[kind]
        assert cuda["ids"] == cpu["ids"], kind
        assert cuda["backend"] != "cpu", "the CUDA branches"
    alone = "sdpa" if family == "mpt" else "flash"  # torch's own flash attention knows no ALiBi
    assert found["flash"]["backend"] == alone
    assert [ids[0] for ids in found["flash"]["ids"]] == [ids[0] for ids in found["greedy"][0]["ids"]]


@pytest.mark.parametrize("family", CONFIGS)
def test_a_family_trains_on_emulated_cuda_as_on_the_cpu(families: dict[str, dict[str, Any]], family: str) -> None:
    found = families[family]
    cuda, cpu = found["numbers"]
    assert cuda == pytest.approx(cpu, rel=1e-4), "loss and gradient norm of two steps with dropout"
    assert found["gradients"] < 1e-4
    assert found["update_waits"] <= UPDATE_WAITS
    assert found["padded"] < 1e-4, "loss and gradients of a padded call"


@pytest.mark.parametrize("family", CONFIGS)
def test_a_greedy_step_waits_twice_and_no_index_is_left_on_the_cpu(
    families: dict[str, dict[str, Any]], family: str
) -> None:
    found = families[family]
    assert found["greedy"][1]["waits"] <= GREEDY_WAITS and found["flash"]["waits"] <= GREEDY_WAITS
    assert found["one_of_two"] <= GREEDY_WAITS, "on a rank of two"
    assert found["cpu_indices"] == {}

"""A rank's memory while it loads: its shard and a tenth. One slice more is allowed; mapped ones cost nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from parallel.native.compiled.library import available
from tests.processes import FREED_AT_ONCE
from tests.tp_decoders.families.parity import GPT2, hf

PROGRAM = Path(__file__).with_name("load_memory.py")
ROOT = PROGRAM.parents[3]
BIG = {"n_embd": 768, "n_layer": 4, "n_head": 12, "vocab_size": 30000, "n_positions": 64}
MiB = 2**20


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of about 200 MB as safetensors and as .bin, and a tiny one."""
    found = {name: tmp_path_factory.mktemp(name) for name in ("safetensors", "bin", "tiny")}
    hf("GPT2", GPT2)().save_pretrained(found["tiny"])
    model = hf("GPT2", GPT2, **BIG)()
    model.save_pretrained(found["safetensors"])
    model.config.save_pretrained(found["bin"])
    torch.save(load_file(found["safetensors"] / "model.safetensors"), found["bin"] / "pytorch_model.bin")
    return found


@pytest.mark.parametrize(
    ("layout", "rank", "size", "dtype"),
    [("safetensors", 0, 1, "float32"), ("safetensors", 1, 2, "float32"), ("safetensors", 2, 3, "bfloat16"),
     ("bin", 1, 2, "float32"), ("bin", 0, 3, "bfloat16")],
)  # fmt: skip
def test_load_takes_no_more_than_the_shard_and_a_tenth(
    folders: dict[str, Path], layout: str, rank: int, size: int, dtype: str
) -> None:
    seen = memory_of(folders, layout, rank, size, dtype, "plain")
    assert seen["peak"] >= seen["shard"] * 0.95, "the measurement sees the shard itself"
    assert seen["peak"] <= seen["shard"] * 1.1, {name: value / MiB for name, value in seen.items()}


@pytest.mark.skipif(not available(), reason="weights are packed for the native kernels")
@pytest.mark.parametrize(
    ("rank", "size", "dtype", "slice_"), [(0, 1, "float32", 0), (1, 2, "bfloat16", BIG["vocab_size"] * BIG["n_embd"])]
)
def test_a_load_for_serving_holds_each_matrix_once_while_it_runs_too(
    folders: dict[str, Path], rank: int, size: int, dtype: str, slice_: int
) -> None:
    """`slice_`: the largest that is converted; others are packed from the file's own pages."""
    seen = memory_of(folders, "safetensors", rank, size, dtype, "packed")
    assert 0.95 * seen["shard"] <= seen["held"] <= 1.1 * seen["shard"], {k: v / MiB for k, v in seen.items()}
    assert seen["peak"] <= seen["shard"] * 1.1 + slice_, {name: value / MiB for name, value in seen.items()}


def memory_of(folders: dict[str, Path], layout: str, rank: int, size: int, dtype: str, kind: str) -> dict[str, int]:
    """What load_memory.py prints."""
    arguments = [str(folders[layout]), str(folders["tiny"]), str(rank), str(size), dtype, kind]
    environment = {**os.environ, **FREED_AT_ONCE, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=280,
    )
    seen: dict[str, int] = json.loads(done.stdout)
    assert seen["samples"] > 50
    return seen

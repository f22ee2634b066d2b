"""One rank of 8 loads its slices of GPT-NeoX-20B from a sparse checkpoint of the real 41 GB, within its memory limit.

The files have the real names, shapes and types and no data: what is read of them is zeros. With all 44 layers a rank
takes 5.2 GB and its files' pages as much again and more; so the load is done at the real widths with fewer layers,
unless TP_DECODERS_20B_LAYERS says otherwise.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.presets import find, read
from parallel.ranks.group import Group
from parallel.sharding.rules import full_shape_of
from tp_decoders import build
from tp_decoders.registry import config_from_hf, family_of

PROGRAM = Path(__file__).with_name("load_memory.py")
ROOT = PROGRAM.parents[3]
FILES = 9
SIZE, RANK = 8, 3


def tensors(hf: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint of this configuration."""
    config = config_from_hf(dict(hf))
    names = family_of(config.model_type).names
    model = build(config, dtype=torch.bfloat16, device="meta")
    return {names.theirs(ours)[1]: full_shape_of(parameter) for ours, parameter in model.named_parameters()}


def write_sparse(folder: Path, hf: Mapping[str, Any]) -> int:
    """A checkpoint in several files that hold nothing but their headers; returns its size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = tensors(hf)
    weight_map, total = {}, 0
    share = -(-len(shapes) // FILES)
    for number in range(FILES):
        chosen = list(shapes.items())[number * share : (number + 1) * share]
        name = f"model-{number + 1:05}-of-{FILES:05}.safetensors"
        header, end = {}, 0
        for tensor, shape in chosen:
            begin, end = end, end + 2 * torch.Size(shape).numel()
            header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
            weight_map[tensor] = name
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        total += end
    (folder / "config.json").write_text(json.dumps(dict(hf)), encoding="utf-8")
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def load(folder: Path, warm: Path) -> dict[str, int]:
    """Loads rank 3 of 8 in a process of its own: its peak of anonymous memory (mapped files are not its own). No limit
    is set on it: the kernel would count torch's private mappings of files, whatever is read of them.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), str(warm), str(RANK), str(SIZE), "bfloat16", "plain"],
        env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def shape() -> dict[str, Any]:
    return dict(read(find("gpt-neox-20b", "models")).values)


@pytest.fixture
def warm(tmp_path: Path) -> Path:
    """A checkpoint of a few kilobytes, for what is made once per process."""
    tiny = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8, "intermediate_size": 256}
    hf = {**dict(read(find("gpt-neox-20b", "models")).values), **tiny, "vocab_size": 512}
    write_sparse(tmp_path / "warm", hf)
    return tmp_path / "warm"


def test_the_sparse_checkpoint_has_the_real_size_and_takes_no_room(shape: dict[str, Any], tmp_path: Path) -> None:
    total = write_sparse(tmp_path / "20b", shape)
    files = [path.stat() for path in (tmp_path / "20b").iterdir()]
    assert total == 2 * 20_554_567_680
    assert sum(file.st_size for file in files) > total
    assert sum(file.st_blocks * 512 for file in files) < 1 << 20


@pytest.mark.slow
@pytest.mark.parametrize("layers", [int(os.environ.get("TP_DECODERS_20B_LAYERS", "3"))])
def test_a_rank_loads_its_slices_within_its_shard_and_a_tenth(
    shape: dict[str, Any], layers: int, warm: Path, tmp_path: Path
) -> None:
    hf = {**shape, "num_hidden_layers": layers}
    write_sparse(tmp_path / "20b", hf)
    config = replace(config_from_hf(dict(shape)), n_layers=layers)
    shard = sum(p.nbytes for p in build(config, Group(RANK, SIZE), torch.bfloat16, "meta").parameters())
    seen = load(tmp_path / "20b", warm)
    assert seen["shard"] == shard
    assert shard * 0.95 <= seen["peak"] <= shard * 1.1

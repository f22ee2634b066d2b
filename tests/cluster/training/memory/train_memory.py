"""Run as a program: the most memory a rank takes while it trains, over what its process took before. Prints JSON.

What is measured is the kernel's own high-water mark of resident memory (VmHWM), reset after the imports, the meeting of
the ranks and a step of a tiny model of the same family, so that code, threads and tables made once are not counted.
The C library is told (by the environment, see test_memory_measured.py) to map every block of 64 KiB or more for itself
and unmap it when it is freed: then resident memory follows the tensors, and nothing else, up and down.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from cluster.training.step.optimizer import OptimizerConfig
from cluster.training.step.train_batch import TrainBatch
from cluster.training.step.trainer import Trainer, TrainerConfig
from parallel.ranks.mesh import Groups, init_groups
from tp_decoders import build, initialise
from tp_decoders.registry import config_from_hf

STEPS = 2
"""In the first one the optimiser's moments are not there yet while activations are."""


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {name} in /proc/self/status")


def settle() -> int:
    """Resident memory with nothing left over, from which the high-water mark starts again."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return status("VmRSS")


def train(hf: dict[str, Any], groups: Groups, case: dict[str, Any], lengths: list[int]) -> None:
    model = initialise(build(config_from_hf(hf), groups.tp, getattr(torch, case["dtype"])))
    config = TrainerConfig(optimizer=OptimizerConfig(), **case["trainer"])
    trainer = Trainer(model, groups, config)
    for _ in range(STEPS):
        ids = torch.randint(hf["vocab_size"], (sum(lengths),))
        batch = TrainBatch(
            token_ids=ids, targets=ids.roll(-1), weights=torch.ones(len(ids)), lengths=tuple(lengths),
            normaliser=float(len(ids)),
        )  # fmt: skip
        trainer.forward_backward(batch)
        trainer.optim_step(1e-4)
    trainer.optimizer.close()


def main(case: dict[str, Any], rank: int, address: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    groups = init_groups(rank, case["tp"] * case["dp"], case["tp"], case["dp"], address or None)
    if case["sequence_parallel"]:
        from dataclasses import replace

        groups = replace(groups, tp=replace(groups.tp, sequence_parallel=True))
    train(case["tiny"], groups, case, [16])
    before = settle()
    train(case["hf"], groups, case, case["lengths"])
    print(json.dumps({"peak": status("VmHWM") - before, "before": before}))
    groups.close()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[4]))
    main(json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

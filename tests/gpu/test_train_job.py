"""The training job on one CUDA device: as on a CPU within rounding, and exact when it is taken up again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.actors.programs.train_spec import SampleConfig, TrainParallel
from cluster.training.job.run_folder import METRICS, SAMPLES
from cluster.training.job.run_metrics import read_records
from tests.cluster.actors.programs.train_runs import STEPS, checksums, go_here, spec_of, write_start

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHOWN = {"eval_every": 2, "samples": SampleConfig(prompts=("the cat",), max_tokens=4), "recompute": "full"}


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in read_records(out / METRICS)]


def test_a_run_on_cuda_has_the_losses_of_one_on_a_cpu(tmp_path: Path) -> None:
    start = write_start(tmp_path / "start")
    for device in ("cuda", "cpu"):
        go_here(spec_of(start, tmp_path / device, TrainParallel(device=device), **SHOWN))
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)
    assert len(read_records(tmp_path / "cuda" / SAMPLES)) == STEPS // 2


def test_in_bfloat16_a_run_taken_up_again_ends_with_the_undisturbed_ones_bits(tmp_path: Path) -> None:
    start = write_start(tmp_path / "start")
    layout = TrainParallel(device="cuda", dtype="bfloat16")
    facts = go_here(spec_of(start, tmp_path / "whole", layout, peak_flops=None))
    assert facts.dtype == "bfloat16" and "bfloat16 matrices" in facts.peak_source
    go_here(spec_of(start, tmp_path / "run", layout, steps=2))
    assert go_here(spec_of(start, tmp_path / "run", layout)).step == 2
    assert checksums(tmp_path / "run") == checksums(tmp_path / "whole")

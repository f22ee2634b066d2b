"""A training preset tried out as a user would: trained by the command, served by the command, asked over gRPC.

For the demonstration and for bench/families.py. Nothing here is a shortcut past the commands.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.training.job.run_folder import METRICS, PLOT
from cluster.training.job.run_metrics import read_records
from launch.commands.server_process import Server
from parallel.errors import WorkerError

ROOT = Path(__file__).resolve().parents[2]
RECENT = 20


@dataclass(frozen=True)
class Trained:
    """A finished run: where it is, and its loss at the first step, over the last ones, and on held-out text."""

    checkpoint: Path
    plot: Path | None
    first: float
    last: float
    held_out: float
    steps: int
    tokens: int
    train_seconds: float  # of its steps
    seconds: float  # of the command

    @property
    def share(self) -> float:
        """Of the first loss, what is left at the end."""
        return self.last / self.first


def train_preset(preset: str, out: Path, settings: Sequence[str] = ()) -> Trained:
    """Runs the command and shows what it says. From the checkout, where presets find texts and tokenizers."""
    from cluster.training.checkpoint.checkpointer import (
        latest_checkpoint,  # brings in torch, which --help does not wait for
    )

    words = ["train", "--config", preset, f"out={out}", *settings]
    print(f"$ tp-decoders {' '.join(words)}", flush=True)
    began = time.monotonic()
    status = subprocess.run([sys.executable, "-m", "launch", *words], cwd=ROOT, check=False).returncode
    checkpoint = latest_checkpoint(out)
    if status != 0 or checkpoint is None:
        raise WorkerError(f"training {preset} ended with status {status}; what it said is above")
    records = read_records(out / METRICS)
    recent = records[-RECENT:]
    plot = out / PLOT
    return Trained(
        checkpoint=checkpoint, plot=plot if plot.is_file() else None, first=records[0]["loss"],
        last=sum(record["loss"] for record in recent) / len(recent),
        held_out=next(record["eval_loss"] for record in reversed(records) if "eval_loss" in record),
        steps=len(records), tokens=sum(record["tokens"] for record in records),
        train_seconds=sum(record["seconds"] for record in records), seconds=time.monotonic() - began,
    )  # fmt: skip


def served(model: Path) -> Server:
    """The command a user would type."""
    shown = model.relative_to(ROOT) if model.is_relative_to(ROOT) else model
    print(f"$ tp-decoders serve --model {shown} --preset small --cluster cpu-2", flush=True)
    return Server(["--model", str(model), "--preset", "small", "--cluster", "cpu-2"])

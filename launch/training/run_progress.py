"""How a run is shown: one line that says how far it is, rewritten on a terminal, and what the model says on the way.

Reads the files that the run writes and asks it nothing.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster.actors.programs.train_spec import TrainFacts, TrainSpec
from cluster.training.checkpoint.checkpointer import latest_checkpoint
from cluster.training.job.run_folder import METRICS, SAMPLES
from cluster.training.job.run_metrics import RecordReader
from parallel.errors import WorkerError

POLL_S = 0.2
LINE_S = 5.0
"""Between lines of progress where the output is not a terminal."""
BAR_CELLS = 20
RECENT = 10


def header(spec: TrainSpec, facts: TrainFacts) -> str:
    """What is about to happen."""
    parallel = spec.parallel
    layout = f"tp={parallel.tp}" + (f" dp={parallel.dp}" if parallel.dp > 1 else "")
    return (
        f"training {facts.family} ({facts.dtype}), {facts.parameters / 1e6:.1f} M parameters, on {facts.tokens} "
        f"tokens, {layout}, from step {facts.step} to {spec.steps}: {spec.out}\n"
        f"MFU is relative to {facts.peak_flops / 1e9:.0f} GFLOP/s per rank: {facts.peak_source}"
    )


def watch(spec: TrainSpec, step: int, wait_fault: Callable[[float], str | None], stop: threading.Event) -> None:
    """Shows progress from `step` on until the last checkpoint is complete or a signal came; a fault is raised."""
    out = Path(spec.out)
    metrics, samples = RecordReader(out / METRICS), RecordReader(out / SAMPLES)
    shown = Display(spec.steps)
    while not stop.is_set():
        fault = wait_fault(POLL_S)
        if fault is not None:
            shown.end_line()
            raise WorkerError(f"the run stopped: {fault}; the same command goes on from the last checkpoint")
        done = _saved_step(out) >= spec.steps
        shown.samples([record for record in samples.fresh() if record["step"] > step])
        shown.progress([record for record in metrics.fresh() if record["step"] > step], last=done)
        if done:
            return
    shown.end_line()


def _saved_step(out: Path) -> int:
    newest = latest_checkpoint(out)
    return int(newest.name.removeprefix("step-")) if newest else 0


class Display:
    """The run on the screen."""

    def __init__(self, steps: int, terminal: bool | None = None) -> None:
        self._steps = steps
        self._terminal = sys.stdout.isatty() if terminal is None else terminal
        self._recent: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self._held_out: float | None = None
        self._shown, self._when, self._open = 0, 0.0, False

    def progress(self, fresh: Sequence[dict[str, Any]], last: bool) -> None:
        """The line of the newest step, where it is time for one."""
        for record in fresh:
            self._recent.append(record)
            self._held_out = record.get("eval_loss", self._held_out)
        due = self._terminal or last or time.monotonic() - self._when > LINE_S
        if due and self._recent and self._recent[-1]["step"] > self._shown:
            start, end = ("\r\x1b[K", "") if self._terminal else ("", "\n")
            line = progress_line(self._recent, self._steps, self._held_out, bar=self._terminal)
            print(start + line, end=end, flush=True)
            self._shown, self._when, self._open = self._recent[-1]["step"], time.monotonic(), self._terminal
        if last:
            self.end_line()

    def samples(self, fresh: Sequence[dict[str, Any]]) -> None:
        """What the model said."""
        for record in fresh:
            self.end_line()
            print(sample_line(record), flush=True)

    def end_line(self) -> None:
        """Whatever is printed next starts on a line of its own."""
        if self._open:
            print(flush=True)
        self._open = False


def progress_line(
    recent: Sequence[dict[str, Any]], steps: int, held_out: float | None = None, bar: bool = False
) -> str:
    """How far a run is; speed, utilisation and time left by its last few steps."""
    seconds = sum(record["seconds"] for record in recent)
    step = int(recent[-1]["step"])
    right = [record["eval_accuracy"] for record in recent if "eval_accuracy" in record]  # of held-out labels
    parts = [
        f"step {step}/{steps}",
        *([_bar(step / steps)] if bar else []),
        f"loss {recent[-1]['loss']:.4f}",
        *([] if held_out is None else [f"eval {held_out:.4f}"]),
        *([f"right {100 * right[-1]:.0f} %"] if right else []),
        f"{sum(record['tokens'] for record in recent) / seconds:.0f} tokens/s",
        f"MFU {100 * sum(record['mfu'] * record['seconds'] for record in recent) / seconds:.1f} %",
        f"ETA {_clock((steps - step) * seconds / len(recent))}",
    ]
    return "  ".join(parts)


def sample_line(record: dict[str, Any]) -> str:
    """A prompt and, after a bar, what the model made of it; on one line."""
    lines = f"{record['prompt']}|{record['text']}".splitlines()
    text = " / ".join(" ".join(line.split()) for line in lines if line.strip())
    return f"  sample, step {record['step']}: {text}"


def _bar(done: float) -> str:
    full = int(BAR_CELLS * min(1.0, done))
    return "[" + "#" * full + "." * (BAR_CELLS - full) + "]"


def _clock(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"

"""The loss of a run as a picture: every step, a running mean, and the held-out loss where it was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MEAN_STEPS = 20


def can_plot() -> bool:
    """Whether the package that draws is there."""
    return find_spec("matplotlib") is not None


def plot_loss(records: Sequence[Mapping[str, Any]], path: Path, title: str) -> Path:
    """Draws the records of a run (see run_metrics.py) into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [record["step"] for record in records]
    losses = [float(record["loss"]) for record in records]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training, each step")
    axes.plot(steps, running_mean(losses, MEAN_STEPS), color="tab:blue", label=f"training, mean of {MEAN_STEPS}")
    held_out = [(record["step"], record["eval_loss"]) for record in records if "eval_loss" in record]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    draft = path.with_name(f".{path.name}.part")
    figure.savefig(draft, format="png", dpi=120)
    draft.replace(path)
    return path


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of the last `width` values at each place; of fewer at the beginning."""
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - width) : end]
        means.append(sum(recent) / len(recent))
    return means

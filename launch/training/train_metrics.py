"""Prometheus metrics of a training run: the last record of its metrics.jsonl under public names, on an HTTP port of the
command that watches it. Reads what rank 0 wrote and asks no rank anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from cluster.training.job.run_metrics import RecordReader
from launch.observe.prometheus_metrics import counter, gauge

GAUGES = {
    "step": ("run_step", "Optimiser steps taken."),
    "loss": ("run_loss", "Loss of the last step's batch."),
    "grad_norm": ("run_grad_norm", "Norm of the gradient at the last step."),
    "learning_rate": ("run_learning_rate", "Learning rate of the last step."),
    "tokens_per_s": ("run_tokens_per_second", "Tokens trained on per second, at the last step."),
    "mfu": ("run_mfu_ratio", "Model arithmetic of the last step over what the ranks could compute at most."),
    "skipped": ("run_skipped_batches", "Batches left out of the run: their loss or gradient was not finite."),
    "eval_loss": ("run_eval_loss", "Held-out loss, when it was last measured."),
}
COUNTERS = {
    "tokens": ("run_tokens", "Tokens trained on, since this command began to watch."),
    "seconds": ("run_step_seconds", "Time of steps, since this command began to watch."),
    "collective_seconds": ("run_collective_seconds", "Part of these that rank 0 was in collectives."),
}


class TrainMetrics(Collector):
    """What a registry asks at each scrape; one scrape at a time."""

    def __init__(self, records: Path, steps: int) -> None:
        self._reader, self._steps = RecordReader(records), steps
        self._last: dict[str, float] = {}
        self._totals = dict.fromkeys(COUNTERS, 0.0)
        self._read(count=False)

    def describe(self) -> Iterable[Metric]:
        return []  # nothing is collected merely to be registered

    def collect(self) -> Iterable[Metric]:
        self._read(count=True)
        yield gauge("run_steps_wanted", "Where the run ends.", self._steps)
        for field, (name, words) in GAUGES.items():
            if field in self._last:
                yield gauge(name, words, self._last[field])
        for field, (name, words) in COUNTERS.items():
            yield counter(name, words, self._totals[field])

    def _read(self, count: bool) -> None:
        for record in self._reader.fresh():
            self._take(record, count)

    def _take(self, record: Mapping[str, float], count: bool) -> None:
        self._last |= {name: record[name] for name in GAUGES if record.get(name) is not None}
        for name in self._totals if count else ():
            self._totals[name] += record.get(name, 0.0)

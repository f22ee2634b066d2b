"""What `train` does once its configuration is resolved: starts the ranks on Ray, shows how far they are, and draws the
loss at the end.

A signal stops the run with a checkpoint; after a fault the ranks are started again from the last one. Takes no step
itself.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from cluster.actors.group.placement import PlacementConfig, split_replicas
from cluster.actors.group.worker_group import WorkerGroup
from cluster.actors.host.load_progress import NUMBER_BYTES, over_budget
from cluster.actors.host.ray_session import ray_session
from cluster.actors.programs.train_program import TrainProgram
from cluster.training.checkpoint.checkpointer import latest_checkpoint, read_state
from cluster.training.job.loss_plot import can_plot, plot_loss
from cluster.training.job.run_folder import METRICS, PLOT
from cluster.training.job.run_metrics import read_records
from cluster.training.job.skipped_batches import names_batch
from launch.observe.metrics_server import MetricsServer
from launch.serving.healing import Restarts
from launch.training.resolve_train import ResolvedTrain
from launch.training.run_progress import header, watch
from launch.training.train_metrics import TrainMetrics
from parallel.errors import WorkerError

LOOPBACK = "127.0.0.1"
LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""What a start does not mend: a disk that is full or may not be written."""


def train(run: ResolvedTrain) -> int:
    """Runs the ranks until the last step, a signal or a fault; the exit status."""
    stop, program = threading.Event(), run.program
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ray_session(run.ray_address, run.cores):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        with metrics_of(Path(program.out), program.steps, run.metrics_port):
            run_to_the_end(program, run.placement, stop)
    status = _last_words(Path(program.out), program.steps)
    if run.plot:
        print(draw(Path(program.out)), flush=True)
    return status


def run_to_the_end(spec: TrainProgram, placement: PlacementConfig, stop: threading.Event) -> None:
    """Lives of the run's ranks, one after another: a fault costs the steps since the last checkpoint and a start. Too
    many within a window, one at the first start, the same batch twice, or a disk that takes nothing more end the run
    with the cause.
    """
    restarts, started, blamed = Restarts(placement), False, None
    while True:
        try:
            for _ in one_life(spec, placement, stop):
                started = True
            return
        except WorkerError as fault:
            again = names_batch(str(fault)) is not None and names_batch(str(fault)) == blamed
            stays = again or any(os.strerror(number) in str(fault) for number in LASTING)
            delay = restarts.next_delay() if started and not stays else None
            if delay is None:
                raise
            blamed = names_batch(str(fault))
            print(f"{fault}; it does so by itself in {delay:g} s (restart {restarts.total})", flush=True)
            if stop.wait(delay):
                return


def one_life(spec: TrainProgram, placement: PlacementConfig, stop: threading.Event) -> Iterator[None]:
    """Starts the ranks, yields, and watches them until the end, a signal or a fault."""
    group = WorkerGroup(spec, spec.parallel.world, spec.parallel.device, placement)
    try:
        ready = group.start()
        yield
        for sentence in split_replicas([rank.place.node for rank in ready], spec.parallel.tp):
            print(f"note: {sentence}", flush=True)
        facts = ready[0].facts
        weights = facts.parameters * NUMBER_BYTES[facts.dtype] // spec.parallel.tp
        for line in facts.notes:
            print(f"note: {line}", flush=True)
        for line in (line for rank in ready for line in over_budget(rank.place, rank.seconds, weights)):
            print(f"note: {line}", flush=True)
        print(header(spec, facts), flush=True)
        watch(spec, facts.step, group.wait_fault, stop)
    finally:
        group.close()


@contextmanager
def metrics_of(out: Path, steps: int, port: int | None) -> Iterator[None]:
    """The run's numbers for Prometheus, where that was asked for."""
    if port is None:
        yield
        return
    metrics = MetricsServer(TrainMetrics(out / METRICS, steps), LOOPBACK, port)
    print(f"metrics: {LOOPBACK}:{metrics.port}", flush=True)
    with closing(metrics):
        yield


def _last_words(out: Path, steps: int) -> int:
    newest = latest_checkpoint(out)
    if newest is None:
        raise WorkerError(f"stopped before the first checkpoint in {out}; the same command starts again")
    step = read_state(newest).step
    more = "" if step >= steps else f" of {steps}; the same command goes on from there"
    print(f"step {step}{more}: {newest}", flush=True)
    return 0


def draw(out: Path) -> str:
    """Draws the run's loss; what to say of it."""
    if not can_plot():
        return "no loss plot: matplotlib is not installed; pip install 'tp-decoders[train]', or set plot=false"
    return f"loss plot: {plot_loss(read_records(out / METRICS), out / PLOT, out.name)}"

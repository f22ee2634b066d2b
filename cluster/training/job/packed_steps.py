"""What a job computes with packed batches: an optimiser step, and the loss on held-out text.

Every rank calls these with its own replica's share of the same batch and gets the same numbers, those of the global
batch: the loss is summed over replicas, and so is the arithmetic. A batch whose loss or gradient is not finite changes
nothing and is an error on every rank alike, which names its documents.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from cluster.training.data.batches.batch import Batch
from cluster.training.data.batches.data_loader import Loader, RowDataset
from cluster.training.step.flops import ModelFlops
from cluster.training.step.losses import LossOptions
from cluster.training.step.nonfinite_errors import BrokenUpdate, NonFinite, PoisonBatch
from cluster.training.step.nonfinite_search import SHOWN, Culprits, blame
from cluster.training.step.task_losses import class_targets
from cluster.training.step.train_batch import TrainBatch
from cluster.training.step.trainer import PassResult, Trainer
from cluster.training.train_calls import CROSS_ENTROPY, TASK
from parallel.layers.dropout import token_keys
from parallel.ranks.group import Group

SAMPLE_BITS = 32
"""A sample has fewer documents than 2 to this power."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a step's arithmetic is and what it is measured against: floating-point operations, and those that all ranks
    together could do in a second.
    """

    flops: ModelFlops
    peak: float


def train_batch(batch: Batch, device: torch.device, normaliser: float) -> TrainBatch:
    """A batch of the data as the trainer takes it."""
    return TrainBatch(
        token_ids=batch.token_ids.to(device), targets=batch.targets.to(device),
        weights=batch.loss_weights.to(device), lengths=batch.lengths, normaliser=normaliser,
        keys=token_keys(document_numbers(batch), batch.lengths).to(device),
        task=None if batch.labels is None else class_targets(batch.labels.to(device), normaliser),
    )  # fmt: skip


def loss_of(batch: Batch) -> str:
    """What is learned from it."""
    return CROSS_ENTROPY if batch.labels is None else TASK


def document_numbers(batch: Batch) -> list[int]:
    """A number for each document of the batch, whichever replica it was dealt to: its sample's in the run, and its
    place there.
    """
    return [
        (batch.first_sample + sample << SAMPLE_BITS) + place
        for sample, count in enumerate(batch.sample_documents)
        for place in range(count)
    ]


def take_step(
    trainer: Trainer, batch: Batch, rate: float, speed: Speed, dropout_seed: int | None = None
) -> dict[str, float]:
    """One optimiser step, as its record. The seed is one of the run: masks differ from step to step by themselves."""
    began, waited = time.perf_counter(), trainer.groups.collective_seconds
    device = next(trainer.model.parameters()).device
    own = train_batch(batch, device, float(batch.global_weight))
    passed = _passed(trainer, own, loss_of(batch), dropout_seed)
    sums = [passed.loss, float(speed.flops(own.lengths)), *passed.metrics.values()]
    loss, flops, *metrics = summed(sums, trainer.groups.dp, device)
    try:
        if not math.isfinite(loss):
            raise NonFinite(f"the loss is {loss}")
        done = trainer.optim_step(rate)
    except BrokenUpdate as error:  # no document alone is at fault, and the words are the same on every rank
        raise PoisonBatch(str(error)) from error
    except FloatingPointError as error:
        raise PoisonBatch(_account(trainer, batch, own, dropout_seed, str(error))) from error
    seconds = time.perf_counter() - began
    return {
        "step": done.step, "loss": loss, "grad_norm": done.grad_norm, "learning_rate": rate,
        "tokens": batch.global_tokens, "seconds": seconds, "tokens_per_s": batch.global_tokens / seconds,
        "mfu": flops / seconds / speed.peak, "collective_seconds": trainer.groups.collective_seconds - waited,
        **dict(zip(passed.metrics, metrics, strict=True)),
    }  # fmt: skip


def _passed(trainer: Trainer, own: TrainBatch, loss: str, dropout_seed: int | None) -> PassResult:
    """The replica's share. Where log-probabilities are no numbers its loss is none, which the sum tells the others."""
    try:
        return trainer.forward_backward(own, loss, dropout_seed=dropout_seed)
    except NonFinite:
        return PassResult(loss=math.nan, tokens=len(own.token_ids), logprobs=torch.zeros(0))


def _evaluated(trainer: Trainer, own: TrainBatch, loss: str) -> PassResult:
    """A held-out loss that is no number ends nothing."""
    try:
        return trainer.evaluate(own, loss)
    except NonFinite:
        return PassResult(loss=math.nan, tokens=len(own.token_ids), logprobs=torch.zeros(0))


def _account(trainer: Trainer, batch: Batch, own: TrainBatch, dropout_seed: int | None, what: str) -> str:
    """What went wrong with which documents, the same words on every rank. One collective where there are replicas."""
    groups = trainer.groups
    mine = blame(trainer, own, loss_of(batch), LossOptions(), dropout_seed)
    row = _row([batch.documents[i] for i in mine.losses]) + _row([batch.documents[i] for i in mine.gradients])
    table = [0.0] * groups.dp.rank * len(row) + row + [0.0] * (groups.dp.size - 1 - groups.dp.rank) * len(row)
    table = summed(table, groups.dp, next(trainer.model.parameters()).device)
    rows = [table[start : start + len(row)] for start in range(0, len(table), len(row))]
    lost, bent = ([row[part] for row in rows] for part in (slice(0, SHOWN + 1), slice(SHOWN + 1, None)))
    found = Culprits(losses=_numbers(lost), gradients=_numbers(bent))
    first = next((replica for replica, row in enumerate(rows) if row[0] or row[SHOWN + 1]), None)
    seen = "" if first is None else f"; first seen by rank {first * groups.tp.size}"
    return f"{what}: {found.words('document')}{seen}"


def _row(documents: Sequence[int]) -> list[float]:
    """How many, and the first of them, in a fixed number of places."""
    return [float(len(documents)), *map(float, documents[:SHOWN]), *[0.0] * (SHOWN - len(documents[:SHOWN]))]


def _numbers(rows: Sequence[Sequence[float]]) -> tuple[int, ...]:
    return tuple(int(number) for count, *numbers in rows for number in numbers[: int(count)])


def held_out(trainer: Trainer, dataset: RowDataset, batch_size: int, batches: int) -> dict[str, float]:
    """Nats per token, or per label, over the first batches of the held-out part, the same ones every time; of labels
    the share that is right, too.
    """
    groups, device = trainer.groups, next(trainer.model.parameters()).device
    loader = Loader(dataset, batch_size=batch_size, dp_rank=groups.dp.rank, dp_size=groups.dp.size, epochs=1)
    total, right, weight = 0.0, 0.0, 0
    for batch in islice(loader, batches):
        if batch.num_tokens:  # a replica's share of the last batch may be empty
            found = _evaluated(trainer, train_batch(batch, device, normaliser=1.0), loss_of(batch))
            total, right = total + found.loss, right + found.metrics.get("accuracy", 0.0)
        weight += batch.global_weight
    total, right = summed([total, right], groups.dp, device)
    record = {"eval_loss": total / max(1, weight)}
    return record | ({"eval_accuracy": right / max(1, weight)} if trainer.model.config.task else {})


def summed(values: Sequence[float], group: Group, device: torch.device) -> list[float]:
    """Each of some numbers, added over a group's ranks. One collective, in groups of more than one."""
    if group.size == 1:
        return list(values)
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    return [float(value) for value in group.talk.sum(mine)]

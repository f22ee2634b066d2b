"""Whose fault it is that a step's numbers are not finite: the sequences are found that alone give such a loss, or such
a gradient, by passing over each of them again.

Changes no weight and no moment, and needs no collective but the model's own: a replica's ranks do this together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cluster.training.step.losses import LossOptions
from cluster.training.step.nonfinite_errors import NonFinite
from cluster.training.step.train_batch import TrainBatch, keyed, together
from cluster.training.step.trainer import Parts, Trainer, finish
from parallel.layers.grad_norm import squared_norm

SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Culprits:
    """What one replica's share of a batch gives: sequences whose own loss, or own gradient, is not finite."""

    losses: tuple[int, ...] = ()
    gradients: tuple[int, ...] = ()

    @property
    def sequences(self) -> tuple[int, ...]:
        return tuple(sorted({*self.losses, *self.gradients}))

    def words(self, name: str = "sequence") -> str:
        """In one sentence, by number."""
        found = {"loss": self.losses, "gradient": self.gradients}
        parts = [f"the {what} of {listed(name, numbers)}" for what, numbers in found.items() if numbers]
        if not parts:
            return f"each {name} alone gives finite numbers: their sum does not"
        return f"{' and '.join(parts)} is not finite"


def listed(name: str, numbers: Sequence[int]) -> str:
    """sequence 3, or: sequences 3, 5, 8 and 2 more."""
    shown = ", ".join(map(str, numbers[:SHOWN]))
    more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
    return f"{name}{'s' if len(numbers) != 1 else ''} {shown}{more}"


def blame(
    trainer: Trainer, batch: TrainBatch, loss: str, options: LossOptions, dropout_seed: int | None = None
) -> Culprits:
    """Passes over every sequence (pair, question) alone. All ranks of a replica call this; gradients that wait are
    dropped, weights and moments are not touched.
    """
    return finish(blame_in_parts(trainer, batch, loss, options, dropout_seed))


def blame_in_parts(
    trainer: Trainer, batch: TrainBatch, loss: str, options: LossOptions, dropout_seed: int | None = None
) -> Parts[Culprits]:
    """The same, yielding before each sequence."""
    losses: list[int] = []
    gradients: list[int] = []
    first = 0
    for part in keyed(batch, dropout_seed).parts(1, together(batch, loss)):
        yield None
        own = range(first, first := first + len(part.lengths))
        trainer.optimizer.zero_grad()
        try:
            result = trainer.forward_backward(part, loss, options, dropout_seed)
        except NonFinite:
            losses += own
            continue
        if not math.isfinite(result.loss):
            losses += own
        elif not math.isfinite(_own_norm(trainer)):
            gradients += own
    trainer.optimizer.zero_grad()
    return Culprits(losses=tuple(losses), gradients=tuple(gradients))


def _own_norm(trainer: Trainer) -> float:
    """Squared, of this replica's gradients; the same on its ranks."""
    parameters, grads = [], []
    for flat in trainer.optimizer.flats:
        for name, parameter in flat.parameters.items():
            grad = flat.view(flat.grad, name)
            parameters.append(parameter)
            grads.append(grad if name in flat.waiting else torch.zeros_like(grad))
    return float(squared_norm(parameters, grads, trainer.groups.tp))

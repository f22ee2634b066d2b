"""Which sequences of a batch alone give a loss, or a gradient, that is not finite; finding out changes no bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cluster.training.step.losses import LossOptions
from cluster.training.step.nonfinite_search import Culprits, blame
from cluster.training.step.train_batch import TrainBatch
from cluster.training.step.trainer import Trainer, TrainerConfig
from parallel.ranks.group import Group
from parallel.ranks.mesh import Groups
from tests.cluster.engine.tiny_models import save_tiny
from tp_decoders import load

POISON = 90
SEQUENCES = ((5, 9, 2, 7), (1, 4, POISON, 6), (8, 8, 3), (POISON, 2), (7, 7, 7, 7, 1))


def batch() -> TrainBatch:
    tokens = torch.tensor([token for sequence in SEQUENCES for token in sequence])
    targets = torch.cat([torch.tensor([*sequence[1:], -100]) for sequence in SEQUENCES])
    weights = (targets != -100).float()
    return TrainBatch(
        token_ids=tokens, targets=targets, weights=weights, lengths=tuple(map(len, SEQUENCES)),
        normaliser=float(weights.sum()),
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny("gpt_neox", tmp_path / "neox")


def trainer_of(
    folder: Path, group: Group | None = None, micro_batch_tokens: int | None = None, kind: type[Trainer] = Trainer
) -> Any:
    group = group or Group.single()
    config = TrainerConfig(micro_batch_tokens=micro_batch_tokens)
    return kind(load(folder, group=group), Groups(group, Group.single()), config)


def everything(trainer: Trainer) -> list[Tensor]:
    """Weights, masters and moments, copied."""
    state = [own.values.clone() for own in trainer.optimizer.local_state()]
    return [*(p.detach().clone() for p in trainer.model.parameters()), *state]


def of_losses(group: Group, folder: Path) -> Culprits:
    trainer = trainer_of(folder, group)
    with torch.no_grad():
        table(trainer)[local(trainer)] = float("nan")
    return blame(trainer, batch(), "cross_entropy", LossOptions())


def table(trainer: Trainer) -> nn.Parameter:
    """In which tokens are looked up."""
    return next(parameter for name, parameter in trainer.model.named_parameters() if "embed" in name)


def local(trainer: Trainer) -> slice:
    """The poisoned row, on the rank that has it."""
    rows = table(trainer).shape[0]
    first = 0 if trainer.groups.tp.rank == 0 else trainer.model.config.vocab_size - rows
    return slice(POISON - first, POISON - first + 1) if 0 <= POISON - first < rows else slice(0, 0)


@pytest.mark.parametrize("size", [1, 2])
def test_sequences_with_a_loss_that_is_no_number_are_found_at_every_size(folder: Path, ranks: Any, size: int) -> None:
    found = ranks(size, of_losses, folder)
    assert found == [Culprits(losses=(1, 3))] * size
    assert found[0].words() == "the loss of sequences 1, 3 is not finite"


class Bent(Trainer):
    """Its embedding's gradient is no number wherever one token is learned from; losses are as ever."""

    def _loss(self, part: TrainBatch, *more: Any) -> Any:
        self.seen = bool((part.token_ids == POISON).any())
        return super()._loss(part, *more)


def test_sequences_with_a_gradient_that_is_no_number_are_found_and_no_bit_is_changed(folder: Path) -> None:
    trainer = trainer_of(folder, kind=Bent)
    trainer.forward_backward(replace(batch(), token_ids=torch.where(batch().token_ids == POISON, 1, batch().token_ids)))
    trainer.optim_step(1e-3)
    before = everything(trainer)
    table(trainer).register_hook(lambda grad: grad * float("inf") if trainer.seen else grad)
    trainer.forward_backward(batch())
    with pytest.raises(FloatingPointError, match=r"the gradient norm of step 1 is \S+; no parameter was changed"):
        trainer.optim_step(1e-3)
    found = blame(trainer, batch(), "cross_entropy", LossOptions())
    assert found == Culprits(gradients=(1, 3)) and found.words("document").startswith("the gradient of documents 1, 3")
    assert all(torch.equal(a, b) for a, b in zip(before, everything(trainer), strict=True))
    assert trainer.step == 1 and not any(flat.waiting for flat in trainer.optimizer.flats)


def test_a_batch_of_nothing_but_finite_numbers_has_none_to_blame(folder: Path) -> None:
    found = blame(trainer_of(folder, micro_batch_tokens=4), batch(), "cross_entropy", LossOptions(), dropout_seed=3)
    assert found == Culprits() and "their sum does not" in found.words()


def test_many_are_counted() -> None:
    assert Culprits(losses=tuple(range(11))).words().endswith("6, 7 and 3 more is not finite")

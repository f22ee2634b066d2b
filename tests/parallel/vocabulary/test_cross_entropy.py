"""The mean loss at its edges: nothing to learn from gives NaN and no gradient, as in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from parallel.ranks.group import Group
from parallel.vocabulary.cross_entropy import IGNORE_INDEX, vocab_cross_entropy, weighted_mean

VOCAB, TOKENS = 11, 6


def drawn() -> torch.Tensor:
    return torch.randn(TOKENS, VOCAB, generator=torch.Generator().manual_seed(0))


def masked(group: Group, targets: list[int]) -> tuple[float, torch.Tensor]:
    """The loss, and the gradient of this rank's columns."""
    shards = group.shards(VOCAB)
    start, stop = shards.range(group.rank)
    local = drawn()[:, start:stop].clone().requires_grad_()
    loss = vocab_cross_entropy(local, torch.tensor(targets), shards, group)
    (gradient,) = torch.autograd.grad(loss, local)
    return float(loss.detach()), gradient


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("targets", [[IGNORE_INDEX] * TOKENS, [IGNORE_INDEX, 3, 10, IGNORE_INDEX, 0, 5]])
def test_masked_labels_have_the_loss_and_gradient_of_torch(
    ranks: Callable[..., list[Any]], targets: list[int], size: int
) -> None:
    logits = drawn().requires_grad_()
    loss = functional.cross_entropy(logits, torch.tensor(targets))
    loss.backward()
    parts = ranks(size, masked, targets)
    for got, _ in parts:
        assert got == pytest.approx(float(loss.detach()), rel=1e-6, nan_ok=True)
    torch.testing.assert_close(torch.cat([gradient for _, gradient in parts], 1), logits.grad)


def test_weights_that_are_all_zero_give_no_gradient_and_an_infinite_loss_without_weight_counts_nothing() -> None:
    losses = torch.tensor([1.0, 2.0]).requires_grad_()
    mean = weighted_mean(losses, torch.zeros(2))
    mean.backward()
    assert mean.isnan() and losses.grad is not None and losses.grad.tolist() == [0.0, 0.0]
    assert float(weighted_mean(torch.tensor([torch.inf, 3.0]), torch.tensor([0.0, 2.0]))) == 3.0

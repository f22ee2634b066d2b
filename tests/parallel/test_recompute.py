"""What is cheap is computed again in the backward instead of being kept, with the same bits."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from parallel.errors import ConfigError
from parallel.layers.dropout import LayerPass
from parallel.layers.norm import LayerNorm
from parallel.matmul.activation import activate
from parallel.options import check_recompute
from parallel.recompute import Recipes


class Block(torch.nn.Module):
    """A norm and an activation between products, whose outputs it watches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = LayerNorm(32, 1e-5)
        for parameter, value in zip(self.norm.parameters(), (1.0, 0.0), strict=True):
            torch.nn.init.constant_(parameter, value)
        self.up, self.down = (torch.nn.Parameter(torch.randn(32, 32)) for _ in range(2))
        self.watched: dict[str, StorageWeakRef] = {}

    def forward(self, x: Tensor, recipes: Recipes | None = None) -> Tensor:
        hidden = self.watch("up", torch.mm(self.watch("norm", self.norm(x, LayerPass(recipes=recipes))), self.up))
        return self.watch("down", torch.mm(self.watch("act", activate(hidden, "gelu", recipes)), self.down))

    def watch(self, name: str, y: Tensor) -> Tensor:
        self.watched[name] = StorageWeakRef(y.untyped_storage())
        return y


@pytest.mark.parametrize("selective", [False, True])
def test_norms_and_activations_are_let_go_and_nothing_else(selective: bool) -> None:
    block, x = Block(), torch.randn(64, 32, requires_grad=True)
    recipes = Recipes()
    with recipes.instead() if selective else nullcontext():
        y = block(x, recipes if selective else None)
    gone = {name for name, storage in block.watched.items() if storage.expired()}
    assert gone == ({"norm", "act"} if selective else set())
    assert y.requires_grad


def test_gradients_keep_their_bits() -> None:
    torch.manual_seed(0)
    block, x = Block(), torch.randn(64, 32, requires_grad=True)
    expected = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    recipes = Recipes()
    with recipes.instead():
        y = block(x, recipes)
    torch.empty(64, 32).fill_(9.0)  # likely where the norm's output was
    for found, wanted in zip(torch.autograd.grad(y.square().sum(), [x, *block.parameters()]), expected, strict=True):
        assert torch.equal(found, wanted)


def test_unknown_modes_are_refused() -> None:
    with pytest.raises(ConfigError, match="recompute is 'some'; choose one of"):
        check_recompute("some")

"""Selective recomputation: cheap results are not kept for the backward but computed again from what is kept anyway.

    recipes = Recipes()
    with recipes.instead():                            what a backward needs is kept as a recipe, where there is one
        y = cheap(norm(x), lambda: norm(x), recipes)   whoever computes something cheap says how to get it again
        z = linear(y)

What a layer norm and an activation function give is as large as what goes into them, and that is kept by their own
backward: of a block's activations about half goes, for a norm and an activation more per block (output-discarding
recomputation, as Megatron-Core does; the idea of Korthikanti et al., arXiv 2205.05198, for parts that are cheap). The
same bits. Without recipes `cheap` does nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Recipe = Callable[[], Tensor]


class Recipes:
    """How to compute again what one block's forward computed cheaply."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], Recipe]] = {}

    def remember(self, y: Tensor, again: Recipe) -> None:
        if y.numel():
            self._known[_storage(y)] = weakref.ref(y), again

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Over the block's forward: recipes are kept instead of values. They are forgotten after it."""
        with torch.autograd.graph.saved_tensors_hooks(self._keep, _fetch):
            yield
        self._known.clear()

    def _keep(self, saved: Tensor) -> Tensor | tuple[Recipe, torch.Size]:
        known = self._known.get(_storage(saved))
        if known is None or (source := known[0]()) is None:  # its storage may belong to another tensor by now
            return saved
        whole = saved.numel() == source.numel() and saved.is_contiguous() and saved.dtype is source.dtype
        return (known[1], saved.shape) if whole else saved


def cheap(y: Tensor, again: Recipe, recipes: Recipes | None) -> Tensor:
    """y itself; `again` is remembered as the way to compute its values. No gradient flows through it."""
    if recipes is not None:
        recipes.remember(y, again)
    return y


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _fetch(kept: Tensor | tuple[Recipe, torch.Size]) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    again, shape = kept
    with torch.no_grad():
        return again().view(shape)

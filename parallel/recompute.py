"""Selective recomputation: cheap results are not kept for the backward but computed again from what is kept anyway.

    y = norm(x);  cheap(y, lambda: norm(x))        whoever computes something cheap says how to get it again
    with forgetting_cheap(): z = linear(y)         inside, a backward that needs y keeps the recipe in its place

What a layer norm and an activation function give is as large as what goes into them, and that is kept by their own
backward: of a block's activations about half goes, for a norm and an activation more per block (output-discarding
recomputation, as Megatron-Core does; the idea of Korthikanti et al., arXiv 2205.05198, for parts that are cheap). The
same bits. Outside the scope `cheap` does nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

Recipe = Callable[[], Tensor]
_scope: ContextVar[dict[int, tuple[weakref.ref[Tensor], Recipe]] | None] = ContextVar("recipes", default=None)


def cheap(y: Tensor, again: Recipe) -> Tensor:
    """y itself; in a scope, `again` is remembered as the way to compute its values. No gradient flows through it."""
    recipes = _scope.get()
    if recipes is not None and y.numel():
        recipes[_storage(y)] = weakref.ref(y), again
    return y


@contextmanager
def forgetting_cheap() -> Iterator[None]:
    """The scope, over one block's forward."""
    token = _scope.set({})
    try:
        with torch.autograd.graph.saved_tensors_hooks(_keep, _fetch):
            yield
    finally:
        _scope.reset(token)


def _keep(saved: Tensor) -> Tensor | tuple[Recipe, torch.Size]:
    recipes = _scope.get()
    known = recipes.get(_storage(saved)) if recipes is not None else None
    if known is None or (source := known[0]()) is None:  # its storage may belong to another tensor by now
        return saved
    whole = saved.numel() == source.numel() and saved.is_contiguous() and saved.dtype is source.dtype
    return (known[1], saved.shape) if whole else saved


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _fetch(kept: Tensor | tuple[Recipe, torch.Size]) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    again, shape = kept
    with torch.no_grad():
        return again().view(shape)

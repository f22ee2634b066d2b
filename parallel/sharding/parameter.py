"""A parameter that counts every write to it, also through `.data`, and the stamp by which what is derived follows it.

    parallel.matmul.products.Operand    owns the packed form of a weight: made anew at the first product after a write
    parallel.layers.linear              the joint bias of layers that share a reduction

PyTorch counts in-place writes (`_version`), but `.data` hands out a tensor with a count of its own, and replacing
`.data` is counted nowhere. A `Weight` hands out aliases that share one count, which belongs to its stamp. So loading,
merging and an optimiser of PyTorch's need say nothing; a kernel, or numpy over the same memory, says `written`. Of a
plain parameter put in a weight's place, what is derived is made anew every time.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_DATA: Any = torch.Tensor.data  # the descriptor of every tensor

Stamp = tuple[int, int, int]
"""Equal stamps of one parameter: nothing has written to it between them, but what should have said so."""
_uncounted = itertools.count(1)


class Weight(nn.Parameter):
    """An nn.Parameter whose `.data` counts its writes. A parameter is made of it by nn.Parameter(weight.detach())."""

    _alias: Tensor | None = None
    _replaced = 0

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The values without their history, as everywhere in PyTorch; writes to it show in the stamp."""
        alias = self._alias
        if alias is None or not alias.is_set_to(self):
            if alias is not None:
                self._forget()
            alias = self._alias = _DATA.__get__(self)
        return alias.detach()  # shares the alias's count, and may be resized or transposed on its own

    @data.setter
    def data(self, values: Tensor) -> None:
        self._forget()
        if values.is_inference():  # no write to such memory is counted
            with torch.inference_mode(False):
                values = values.clone()
        _DATA.__set__(self, values)

    def stamp(self) -> Stamp | None:
        """Of a kind that counts its writes by itself: that stamp."""
        return None

    def _forget(self) -> None:
        self._replaced += 1 if self._alias is None else 1 + _version(self._alias)
        self._alias = None


def stamp(parameter: Tensor) -> Stamp:
    """What changes with every write through PyTorch, and where those are not counted with every call."""
    if type(parameter) is not Weight:
        own = parameter.stamp() if isinstance(parameter, Weight) else None
        return own or (-next(_uncounted), 0, parameter.data_ptr())
    alias, writes = parameter._alias, parameter._replaced
    try:
        if alias is not None:
            writes += alias._version
        return parameter._version, writes, parameter.data_ptr()
    except RuntimeError:  # memory made in inference mode, where nothing is counted
        return -next(_uncounted), writes, parameter.data_ptr()


def written(parameters: Tensor | Sequence[Tensor]) -> None:
    """Says that something wrote to them past PyTorch: a kernel of ours, numpy, C. What is derived follows."""
    torch.autograd.graph.increment_version(parameters)


def _version(x: Tensor) -> int:
    try:
        return x._version
    except RuntimeError:
        return 0

"""A parameter that knows of every write to it, also through `.data`, and the stamp that keeps copies of it fresh.

PyTorch counts in-place writes (`_version`), but `.data` hands out a tensor with a count of its own, and replacing
`.data` is counted nowhere. A `Weight` hands out aliases that share one count, which belongs to its stamp. Not seen:
writes that do not go through PyTorch (numpy over the same memory, C); the watch of native.packed_weight looks for
those.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

_DATA: Any = torch.Tensor.data  # the descriptor of every tensor

Stamp = tuple[int, int, int]
"""Equal stamps of one parameter: it was not written to between them."""
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

    def _forget(self) -> None:
        self._replaced += 1 if self._alias is None else 1 + _version(self._alias)
        self._alias = None


def stamp(parameter: Tensor) -> Stamp:
    """What changes with every write that PyTorch can see."""
    writes = 0
    try:
        if type(parameter) is Weight:
            alias, writes = parameter._alias, parameter._replaced
            if alias is not None:
                writes += alias._version
        return parameter._version, writes, parameter.data_ptr()
    except RuntimeError:  # memory made in inference mode, where nothing is counted: it may have been written to
        return -next(_uncounted), writes, parameter.data_ptr()


def _version(x: Tensor) -> int:
    try:
        return x._version
    except RuntimeError:
        return 0

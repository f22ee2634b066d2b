"""Parameters of one kind in flat float32 buffers: masters, gradients, and the slice that this dp rank updates.

A float32 parameter IS its master. Buffers are padded so that every element goes through the same vector code, wherever
a layout puts it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from parallel.ranks.group import Group
from parallel.sharding.parameter import written

ALIGN = 64
"""Elements: the widest vector times the unrolling of the element-wise kernels."""
PIECE = 1 << 24
"""Elements of a flat buffer that go between replicas, or through torch's kernel, at once: bounds what they hold."""


class FlatBuffers:
    """Parameters of one kind side by side: their masters, their gradients, and this dp rank's slice of both."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], dp: Group, decays: bool) -> None:
        self.parameters, self.dp, self.decays = dict(parameters), dp, decays
        self.places: dict[str, tuple[int, int]] = {}
        total = 0
        for name, parameter in self.parameters.items():
            self.places[name] = (total, total + parameter.numel())
            total += -(-parameter.numel() // ALIGN) * ALIGN
        total = -(-total // (ALIGN * dp.size)) * ALIGN * dp.size
        device = next(iter(self.parameters.values())).device
        self.master = torch.zeros(total, dtype=torch.float32, device=device)
        self.grad = torch.zeros_like(self.master)
        self.waiting: set[str] = set()  # whose gradient holds something; the others' is to be overwritten
        share = total // dp.size
        self.slice = slice(dp.rank * share, (dp.rank + 1) * share)
        self.dtypes = {parameter.dtype for parameter in self.parameters.values()}
        self.limit = 0.99 * min(torch.finfo(dtype).max for dtype in self.dtypes)  # of a master that has a place in all
        for name, parameter in self.parameters.items():
            master = self.view(self.master, name)
            master.copy_(parameter.detach())
            if parameter.dtype is torch.float32:
                parameter.data = master

    def view(self, flat: Tensor, name: str) -> Tensor:
        """The part of a flat buffer that belongs to a parameter, in the parameter's shape."""
        start, stop = self.places[name]
        return flat[start:stop].view(self.parameters[name].shape)

    @property
    def own_master(self) -> Tensor:
        """This dp rank's slice."""
        return self.master[self.slice]

    def gather(self) -> None:
        """After the update: every dp rank's slice of the masters to all, and the masters to the parameters."""
        if self.dp.size > 1:
            slices, rank = self.master.view(self.dp.size, -1), self.dp.rank
            for first in range(0, slices.shape[1], PIECE):
                piece = slices[:, first : first + PIECE]
                own = piece[rank].clone()
                piece.copy_(self.dp.talk.all_gather(own, [len(own)] * self.dp.size, 0).view_as(piece))
        for name, parameter in self.parameters.items():
            if parameter.dtype is torch.float32:
                written(parameter)
            else:
                with torch.no_grad():
                    parameter.copy_(self.view(self.master, name))

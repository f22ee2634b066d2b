"""What a pooled request has of its rows so far."""

from __future__ import annotations

import torch
from torch import Tensor

from cluster.engine.request import Pooling


class Gathered:
    """What a request has of its rows so far."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.total: Tensor | None = None

    def add(self, rows_RD: Tensor, pooling: Pooling) -> None:
        if pooling.rows != "mean":
            self.rows.append(rows_RD)
            return
        wide = rows_RD.double()
        start = wide.new_zeros(1, wide.shape[1]) if self.total is None else self.total[None]
        self.total = torch.cat([start, wide]).cumsum(0)[-1]  # one by one, wherever the steps divide them

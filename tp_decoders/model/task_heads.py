"""Heads on a decoder's final hidden states: a linear layer, for GPT-2's double heads with a summary before it.

Heads are replicated: a few rows are not worth a collective. The states are replicated, too, so every rank computes the
same logits, and in the backward the same gradient of the states and of the head; no collective runs in either pass, and
the gradient's norm counts the head once. Logits are float32.
T tokens, R rows, D model, C labels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from parallel.layers.dropout import HEAD, PLAIN, DropoutSite, LayerPass
from parallel.layers.linear import ColumnLinear
from parallel.matmul.activation import activate
from parallel.ranks.group import Group
from parallel.sharding.rules import Part
from tp_decoders.model.config import DecoderConfig
from tp_decoders.model.place import Place
from tp_decoders.model.task_config import CHOICES, SEQUENCES, SPANS, TOKENS, SummaryConfig, TaskConfig

LINEARS = {SEQUENCES: ("score", False), TOKENS: ("classifier", True), SPANS: ("qa_outputs", True)}
"""transformers' usual name of each task's layer, and whether it has a bias."""


class LabelHead(nn.Module):
    """Rows of hidden states to labels."""

    def __init__(self, config: DecoderConfig, task: TaskConfig, group: Group, place: Place) -> None:
        super().__init__()
        usual, bias = LINEARS[task.name]
        self.name = task.layer or usual
        setattr(self, self.name, replicated_linear(config.d_model, task.num_labels, group, bias, place))
        self.drop = DropoutSite(task.dropout, config.n_layers, HEAD, group)

    def forward(self, x_RD: Tensor, now: LayerPass = PLAIN) -> Tensor:
        """[R, C]; `now` is the pass of these rows alone."""
        layer: ColumnLinear = getattr(self, self.name)
        return layer(self.drop(x_RD, now), dtype=torch.float32)  # type: ignore[no-any-return]


class SummaryHead(nn.Module):
    """GPT-2's summary of a sequence, already reduced to one row: dropout, projection, activation, dropout."""

    def __init__(self, config: DecoderConfig, summary: SummaryConfig, group: Group, place: Place) -> None:
        super().__init__()
        d, self.activation = config.d_model, summary.activation
        width = 1 if summary.to_labels else d
        self.summary = replicated_linear(d, width, group, True, place) if summary.projection else None
        self.first = DropoutSite(summary.first_dropout, config.n_layers, HEAD, group)
        self.last = DropoutSite(summary.last_dropout, config.n_layers + 1, HEAD, group)

    def forward(self, x_RD: Tensor, now: LayerPass = PLAIN) -> Tensor:
        """[R, 1], or [R, D] without a projection to labels."""
        y = self.first(x_RD, now)
        y = y.float() if self.summary is None else self.summary(y, dtype=torch.float32)
        return self.last(y if self.activation is None else activate(y, self.activation), now)


def replicated_linear(d_in: int, d_out: int, group: Group, bias: bool, place: Place) -> ColumnLinear:
    """A linear layer that every rank holds whole and computes alone."""
    return ColumnLinear(d_in, (Part(d_out),), group=group, bias=bias, **place)


def task_head(config: DecoderConfig, group: Group, place: Place) -> LabelHead | SummaryHead | None:
    """The head of the config's task; None for a language model."""
    task = config.task
    if task is None:
        return None
    if task.name == CHOICES:
        assert task.summary is not None, "double heads have a summary"
        return SummaryHead(config, task.summary, group, place)
    return LabelHead(config, task, group, place)

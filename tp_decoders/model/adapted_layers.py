"""Which of a model's linear layers have a low-rank branch, and whether the weights hold it.

Attaching, merging and taking out is adapters/lora's. No collectives.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from parallel.errors import ConfigError
from parallel.layers.linear import ColumnLinear, RowLinear
from parallel.layers.low_rank import Adapter
from tp_decoders.model.decoder import Decoder

Linear = ColumnLinear | RowLinear


def linears(model: Decoder) -> dict[str, Linear]:
    """The model's linear layers by our names, the head among them."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def adapted(model: Decoder) -> Iterator[tuple[str, Linear, Adapter]]:
    """The layers that have an adapter: our name, layer, adapter."""
    for name, layer in linears(model).items():
        if layer.adapter is not None:
            yield name, layer, layer.adapter


def is_merged(model: Decoder) -> bool:
    return any(adapter.merged for _, _, adapter in adapted(model))


def whole_parameters(model: Decoder) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a whole checkpoint; refuses to leave out an adapter that is not in them."""
    if model.lora is not None and not is_merged(model):
        raise ConfigError(
            "the model has an adapter beside its weights; merge it before saving the whole model, or save the adapter"
        )
    return [(name, p) for name, p in model.named_parameters() if not is_adapter(name)]


def is_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's, by its name."""
    return name.rpartition(".")[0].endswith(".adapter")

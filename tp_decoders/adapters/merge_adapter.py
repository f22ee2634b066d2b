"""A checkpoint with a saved adapter added into its weights, one tensor at a time: what `convert --adapter` writes.

W + s B A, in float32, rounded once when it is written: as PEFT's merge_and_unload, without a model in memory
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from parallel.errors import ConfigError
from tp_decoders.adapters.lora import HEAD, their_module
from tp_decoders.adapters.peft_files import factor_ranks, open_adapter, read_adapter_config, spellings
from tp_decoders.checkpoint.load_save import build
from tp_decoders.convert.rewrite import TensorSource
from tp_decoders.model.config import DecoderConfig
from tp_decoders.registry import family_of


class MergedSource:
    """Another source's tensors, those of adapted layers with the adapter added."""

    def __init__(self, source: TensorSource, config: DecoderConfig, folder: Path, stack: ExitStack) -> None:
        """The adapter's file stays open until `stack` closes."""
        self._source, self.folder, self.dtype = source, source.folder, source.dtype
        lora, self._file = read_adapter_config(folder), open_adapter(folder, stack)
        model, names = build(config, device="meta"), family_of(config.model_type).names
        ranks = factor_ranks(model, self._file, lora, folder, self._is_bases)
        if config.tie and HEAD in ranks:
            raise ConfigError("an adapter on the head cannot be merged: the head's weight is the embedding's, too")
        self._merged: dict[str, tuple[str, str, float, bool]] = {}
        for ours in ranks:
            module, line = their_module(model, ours), names.theirs(f"{ours}.weight")[0]
            a, b = (
                next(key for key in spellings(model, f"base_model.model.{module}.lora_{factor}.weight")
                     if key in self._file.shapes)
                for factor in "AB"
            )  # fmt: skip
            self._merged[f"{module}.weight"] = (a, b, lora.scale_of(module, ranks[ours]), line.transposed)

    def read(self, name: str) -> Tensor:
        """The tensor as it is stored, or in float32 where something was added."""
        weight = self._source.read(name)
        if name not in self._merged:
            return weight
        key_a, key_b, scale, transposed = self._merged[name]
        delta = self._whole(key_b).float() @ self._whole(key_a).float() * scale
        return weight.float() + (delta.t() if transposed else delta)

    def _whole(self, key: str) -> Tensor:
        return self._file.read(key, tuple(slice(0, n) for n in self._file.shapes[key]))

    def _is_bases(self, key: str, theirs: str) -> bool:
        """Whether a whole tensor of the adapter's is the base's own."""
        return torch.equal(self._whole(key).float(), self._source.read(theirs).float())

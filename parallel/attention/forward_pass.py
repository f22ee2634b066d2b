"""A pass: what one forward needs beside its tokens, made once and handed down from the decoder to blocks and layers.

    Pass.packed(lengths)    whole sequences one after another: training, and whoever calls a model
    Pass.cached(...)        a serving step (cluster/engine/run/model_runner.py)
    Pass(...)               a padded call (tp_decoders/padded)

T tokens, S encoder states, N query heads, K key/value heads, H head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from parallel.attention.attend import Cached, Causal
from parallel.attention.kv_cache import KVCache
from parallel.attention.metadata import AttentionMetadata, AttentionSpec
from parallel.attention.selector import Backend
from parallel.errors import ConfigError
from parallel.layers.dropout import CROSS_ATTENTION, Dropping, HeadMasks, LayerPass, head_masks
from parallel.layers.rotary import Rotation


class Attend(Protocol):
    """How the tokens of a pass see each other; probabilities are multiplied by the masks' factors."""

    def __call__(
        self, spec: AttentionSpec, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, *, masks: HeadMasks | None = None
    ) -> Tensor: ...


KeysValuesOf = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Keys and values [S, N, H] of an encoder's states."""


class CrossAttend(Protocol):
    """How they see an encoder's states."""

    def __call__(
        self, spec: AttentionSpec, q_TNH: Tensor, keys_values: KeysValuesOf, *, masks: HeadMasks | None = None
    ) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass(LayerPass):
    """`lengths` are those of the sequences in the flat row; `rotation` and `tokens` are the decoder's to fill in."""

    positions_T: Tensor
    lengths: tuple[int, ...]
    attend: Attend
    encoder: CrossAttend | None = None
    rotation: Rotation | None = None

    def __post_init__(self) -> None:
        if self.dropping is not None and len(self.dropping.keys_T) != len(self.positions_T):
            raise ConfigError(
                f"dropout keys of {len(self.dropping.keys_T)} tokens for {len(self.positions_T)} in the pass; one each"
            )

    @staticmethod
    def packed(
        lengths: Sequence[int],
        *,
        backend: Backend | str | None = None,
        dropping: Dropping | None = None,
        device: torch.device | str = "cpu",
    ) -> Pass:
        """Whole sequences of these lengths, causal within each; activations are dropped where `dropping` is given."""
        attend = Causal(lengths, backend, device)
        metadata = attend.metadata
        return Pass(positions_T=metadata.positions_T, lengths=metadata.query_lens, attend=attend, dropping=dropping)

    @staticmethod
    def cached(backend: Backend, cache: KVCache, metadata: AttentionMetadata) -> Pass:
        """One step over a paged cache."""
        attend = Cached(backend, cache, metadata)
        return Pass(positions_T=metadata.positions_T, lengths=metadata.query_lens, attend=attend)

    def attended(self, spec: AttentionSpec, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """[T, N, H]: a layer's attention."""
        if self.dropping is None:
            return self.attend(spec, q_TNH, k_TKH, v_TKH)
        masks = head_masks(self.dropping, spec.dropout, spec.layer, spec.head_ids)
        return self.attend(spec, q_TNH, k_TKH, v_TKH, masks=masks)

    def cross_attended(self, spec: AttentionSpec, q_TNH: Tensor, keys_values: KeysValuesOf) -> Tensor:
        """[T, N, H]: a layer's attention to the encoder's states, of a pass that has some."""
        assert self.encoder is not None, "blocks ask first"
        masks = head_masks(self.dropping, spec.dropout, spec.layer, spec.head_ids, CROSS_ATTENTION)
        return self.encoder(spec, q_TNH, keys_values, masks=masks)

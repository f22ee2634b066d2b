"""transformers' caches as a padded call's past: a DynamicCache, or an EncoderDecoderCache of two, is read as keys and
values by layer, and extended in place by the call's new columns, as transformers' models do it.

What it holds is this rank's: its local heads. Other kinds of cache are refused. transformers is imported where a cache
comes, and with it was already.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from parallel.errors import RequestError
from tp_decoders.padded.padded_outputs import KeyValues


class Caches:
    """A cache that was handed in: what it holds, and how it grows."""

    def __init__(self, given: Any) -> None:
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        self.given = given
        both = isinstance(given, EncoderDecoderCache)
        self._own: Any = given.self_attention_cache if both else given
        self._cross: Any = given.cross_attention_cache if both else None
        self._wrap, self._empty = EncoderDecoderCache, DynamicCache
        if any(type(cache) is not DynamicCache for cache in (self._own, self._cross) if cache is not None):
            raise RequestError(
                f"past_key_values of type {type(given).__name__}; give what an earlier call returned, a DynamicCache, "
                "or an EncoderDecoderCache of two"
            )

    @staticmethod
    def of(past: object) -> Caches | None:
        """None where keys and values come as tuples, or not at all."""
        return None if past is None or isinstance(past, tuple | list) else Caches(past)

    @property
    def columns(self) -> int:
        return int(self._own.get_seq_length())

    def keys_values(self) -> KeyValues | None:
        """By layer (k, v), or (k, v, cross k, cross v); None while it is empty."""
        if not self.columns:
            return None
        layers: list[tuple[Tensor, ...]] = [(layer.keys, layer.values) for layer in self._own.layers]
        if self._cross is None or not self._cross.get_seq_length():
            return tuple(layers)
        return tuple((*kv, x.keys, x.values) for kv, x in zip(layers, self._cross.layers, strict=True))

    def extend(self, whole: KeyValues) -> None:
        """With what a call leaves behind: its past, which is here already, and its new columns."""
        held = self.columns
        if len(whole[0]) == 4 and self._cross is None:
            self._cross = self._empty()
            self.given = self._wrap(self._own, self._cross)
        for number, layer in enumerate(whole):
            self._own.update(layer[0][:, :, held:], layer[1][:, :, held:], number)
        if len(whole[0]) == 4 and not self._cross.get_seq_length():
            for number, layer in enumerate(whole):
                self._cross.update(layer[2], layer[3], number)
                self.given.is_updated[number] = True


def columns_of(past: Any) -> int:
    """How many columns a past of either kind has."""
    caches = Caches.of(past)
    if caches is not None:
        return caches.columns
    return 0 if past is None else int(past[0][0].shape[2])

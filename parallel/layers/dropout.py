"""Dropout whose masks are a function of what is dropped, not of how the work is divided.

    element (token, column) of a site  <-  draw(key of the token at this site, column) >= p * 2^32: kept, times 1/(1-p)
    key of a token at a site           <-  mix(the token's own key ^ salt(seed, layer, kind))
    probability (query, key position) of a head  <-  the same, each (query, global head) being a row

A token's own key comes from the data: which sequence of the global batch, which place in it. So a mask is the same at
every tensor- and data-parallel size, with tokens divided or not, in any micro-batch, and again when activations are
recomputed; nothing is stored for the backward but keys. A pass that drops has a `Dropping`; without one nothing is
dropped. The native kernels and the torch formula here give the same masks. No collectives. T tokens, D columns.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.errors import ConfigError
from parallel.matmul.products import uses_native
from parallel.native import dropout as native
from parallel.ranks.group import Group
from parallel.recompute import Recipes
from parallel.sharding.rules import VirtualShards

EMBEDDING, ATTENTION, ATTENDED, MLP, ADAPTER, HEAD, CROSS_ATTENTION, CROSS_ATTENDED = range(8)
"""Kinds of sites: embeddings, attention probabilities, what attention and MLP add, inputs of low-rank branches, task
heads, and cross-attention's probabilities and what it adds.
"""
EMBEDDED = -1
"""The layer of what comes before the first block."""
_LOW = 0xFFFFFFFF
_WORD = (1 << 64) - 1


def mix_key(x: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), on an unsigned 64-bit number."""
    x = (x + 0x9E3779B97F4A7C15) & _WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    return x ^ (x >> 31)


def mix_keys(x: Tensor) -> Tensor:
    """The same on every element of an int64 tensor, whose bits are taken as unsigned."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def token_keys(sequences: Sequence[int], lengths: Sequence[int], firsts: Sequence[int] | None = None) -> Tensor:
    """[T] int64: the keys of packed tokens, from each sequence's number and each token's place in it.

    `firsts` are the places of the sequences' first tokens, 0 each where not given.
    """
    parts = []
    for number, length, first in zip(sequences, lengths, firsts or (0,) * len(lengths), strict=True):
        parts.append(mix_keys(torch.arange(first, first + length) ^ _signed(mix_key(number & _WORD))))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class Dropping:
    """One pass's randomness: a seed, and the keys of all its tokens [T] int64, on the pass's device."""

    seed: int
    keys_T: Tensor

    def of(self, rows: Tensor | None) -> Dropping:
        """The same for some of the tokens, by their places in the row."""
        return self if rows is None else Dropping(self.seed, self.keys_T[rows])

    def site_keys(self, layer: int, kind: int) -> Tensor:
        """[T] int64."""
        salt = self.seed & _WORD
        for part in (layer + 1, kind + 1):
            salt = mix_key(salt ^ part)
        return mix_keys(self.keys_T ^ _signed(salt))


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerPass:
    """What layers need of a pass: by which masks activations are dropped, how the tokens are divided between sharded
    layers (None: every rank has all), and where a block's forward notes what is cheap to compute again.
    """

    dropping: Dropping | None = None
    tokens: VirtualShards | None = None
    recipes: Recipes | None = None

    def of(self, rows: Tensor | None) -> LayerPass:
        """For some of the tokens, or for all, after the blocks: every rank has them."""
        return PLAIN if self.dropping is None else LayerPass(dropping=self.dropping.of(rows))

    def backward(self) -> LayerPass:
        """What a backward needs of it: no tensor of the graph hangs on that, which would then keep itself."""
        return LayerPass(dropping=self.dropping, tokens=self.tokens)


PLAIN = LayerPass()
"""A pass that drops nothing and divides nothing."""


@dataclass(frozen=True)
class Odds:
    """A probability p of dropping: what is below the threshold goes, the rest is scaled."""

    p: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.p) and 0.0 <= self.p <= 1.0):
            raise ConfigError(f"dropout probability {self.p} is outside [0, 1]; give the share of elements to drop")

    @property
    def threshold(self) -> int:
        return min(_LOW, round(self.p * 2**32))

    @property
    def scale(self) -> float:
        return 1.0 / (1.0 - self.p) if self.p < 1.0 else 0.0  # as torch: nothing is left, and nothing flows back

    def factors(self, keys: Tensor, columns: Tensor) -> Tensor:
        """[*keys, columns] float32: what each element is multiplied with."""
        mixed = _mix32((columns * 0x9E3779B9 + (keys & _LOW)[..., None]) & _LOW)
        draws = _mix32(mixed ^ _shifted(keys, 32)[..., None])
        return torch.where(draws >= self.threshold, self.scale, 0.0).to(torch.float32)


class DropoutSite:
    """One site of one layer: drops a share p of the elements of a pass's [T, D] activations."""

    def __init__(self, p: float, layer: int, kind: int, group: Group) -> None:
        self.odds, self.layer, self.kind, self.rank = Odds(p), layer, kind, group.rank

    def active(self, now: LayerPass) -> bool:
        return now.dropping is not None and self.odds.p > 0.0

    def __call__(self, x_TD: Tensor, now: LayerPass, first_column: int = 0) -> Tensor:
        """Where tokens are divided, of this rank's; its first column is number `first_column` of the whole."""
        if now.dropping is None or self.odds.p == 0.0:
            return x_TD
        keys = now.dropping.site_keys(self.layer, self.kind)
        if now.tokens is not None:
            start, stop = now.tokens.range(self.rank)
            keys = keys[start:stop]
        return _Drop.apply(x_TD, keys, first_column, self.odds)  # type: ignore[no-any-return]


class HeadMasks:
    """Masks of one layer's attention probabilities: rows are (token, head), columns are places in the sequence."""

    def __init__(self, odds: Odds, tokens_T: Tensor, head_ids: Sequence[int]) -> None:
        self.odds, self.tokens_T = odds, tokens_T.contiguous()
        salts = [_signed(mix_key(head)) for head in head_ids]
        self.heads_N = torch.tensor(salts, dtype=torch.int64, device=tokens_T.device)

    def factors(self, start: int, stop: int, num_keys: int | None = None) -> Tensor:
        """[N, stop - start queries, num_keys] float32 of one sequence, whose new tokens are start..stop of the flat row
        and, where num_keys is not given, its only ones.
        """
        rows_NQ = mix_keys(self.tokens_T[start:stop] ^ self.heads_N[:, None])
        num_keys = stop - start if num_keys is None else num_keys
        return self.odds.factors(rows_NQ, torch.arange(num_keys, device=rows_NQ.device))

    def struct(self) -> native.Heads:
        """For the native kernel; valid while this object is."""
        chance = native.Chance(self.odds.threshold, self.odds.scale)
        return native.Heads(chance, self.tokens_T.data_ptr(), self.heads_N.data_ptr())

    @property
    def address(self) -> int:
        """Of the structure, kept here."""
        self._struct = self.struct()
        return ctypes.addressof(self._struct)


def head_masks(
    dropping: Dropping | None, p: float, layer: int, head_ids: Sequence[int], kind: int = ATTENTION
) -> HeadMasks | None:
    """The masks of a layer's attention in this pass; None where nothing is dropped."""
    if dropping is None or p == 0.0:
        return None
    return HeadMasks(Odds(p), dropping.site_keys(layer, kind), head_ids)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, keys: Tensor, first_column: int, odds: Odds) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(keys)
        ctx.given = first_column, odds
        return _drop(x, keys, first_column, odds)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def,override]
        return _drop(grad, ctx.saved_tensors[0], *ctx.given), None, None, None


def _drop(x_TD: Tensor, keys_T: Tensor, first_column: int, odds: Odds) -> Tensor:
    if uses_native(x_TD):
        return native.drop_rows(x_TD, keys_T, first_column, odds.threshold, odds.scale)
    columns = torch.arange(first_column, first_column + x_TD.shape[1], device=x_TD.device)
    return (x_TD.float() * odds.factors(keys_T, columns)).to(x_TD.dtype)


def _signed(x: int) -> int:
    """An unsigned 64-bit number as int64 holds it."""
    return x - (1 << 64) if x >> 63 else x


def _shifted(x: Tensor, places: int) -> Tensor:
    """Right shift of unsigned numbers held in int64."""
    return (x >> places) & ((1 << (64 - places)) - 1)


def _mix32(x: Tensor) -> Tensor:
    """lowbias32 (C. Wellons) on the low halves of int64 numbers, whose high halves are zero."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW
    return x ^ (x >> 16)

"""Attention that is looked into or steered: past keys and values handed in, new ones kept, heads masked, probabilities
returned; and attention to an encoder's states.

    Probed     sequences in a flat row, each behind its own past: a pass's `attend` in place of `Causal`
    Encoded    the same sequences, each against all states that its encoder gave: a pass's `encoder`

What only keeps keys and values goes through `Causal` and its backend; the rest is plain torch, one sequence at a time,
differentiable. Probabilities are those that meet the values: after dropout and head masks. No collectives. T new
tokens, S encoder states, Q queries and C keys of one sequence, N local heads, K local kv heads, H head, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from parallel.attention.attend import Causal
from parallel.attention.eager import distance, mixed, probabilities
from parallel.attention.forward_pass import KeysValuesOf
from parallel.attention.metadata import AttentionSpec
from parallel.errors import ConfigError
from parallel.layers.dropout import HeadMasks

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a pass wants besides its output. `head_mask_LN` scales every head's probabilities, by global head."""

    keys_values: bool = False
    weights: bool = False
    head_mask_LN: Tensor | None = None

    def steers(self) -> bool:
        return self.weights or self.head_mask_LN is not None


@dataclass
class Kept:
    """What a pass leaves behind, by layer: flat new keys and values, and each sequence's probabilities [N, Q, C]."""

    keys_values: dict[int, KeysValues] = field(default_factory=dict)
    weights: dict[int, list[Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Past:
    """Keys and values computed before: how many per sequence, and per layer [past tokens, K, H] one after another."""

    lengths: Sequence[int]
    keys_values: Sequence[KeysValues]


class Probed:
    """Causal attention of packed sequences behind their past. `places` are the columns of each sequence's keys, past
    and new, where they are not one after another: ALiBi counts distances in them. `added` are each sequence's summands
    of the scores, [1 or all heads, Q, C], in place of causality.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        asked: Asked,
        *,
        past: Past | None = None,
        places: Sequence[Tensor] | None = None,
        added: Sequence[Tensor] | None = None,
    ) -> None:
        self.kept, self._added, self._causal = Kept(), added, Causal(lengths)
        self._asked, self._past, self._places = asked, past, places
        self._lengths = tuple(lengths)
        if past is not None and len(past.lengths) != len(self._lengths):
            raise ConfigError(f"a past of {len(past.lengths)} sequences for {len(self._lengths)}; one length for each")

    def __call__(
        self, spec: AttentionSpec, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, *, masks: HeadMasks | None = None
    ) -> Tensor:
        if self._asked.keys_values:  # not the second time, when a block is computed again in the backward
            self.kept.keys_values.setdefault(spec.layer, (k_TKH, v_TKH))
        moved = spec.slopes is not None and self._places is not None
        if self._past is None and not moved and not self._asked.steers() and self._added is None:
            return self._causal(spec, q_TNH, k_TKH, v_TKH, masks=masks)
        outputs, weights, start = [], [], 0
        for s, (k_CNH, v_CNH) in enumerate(self._contexts(spec, k_TKH, v_TKH)):
            stop = start + self._lengths[s]
            q_QNH, distance_QC = q_TNH[start:stop], self._distance(s, len(k_CNH), q_TNH.device)
            hidden_QC, added_NQC = self._seen(spec, s, distance_QC)
            weights_NQC = probabilities(replace(spec, kv=None), q_QNH, k_CNH, hidden_QC, distance_QC, added_NQC)
            factors = masks.factors(start, stop, len(k_CNH)) if masks else None
            weights.append(_steered(weights_NQC, factors, self._asked, spec))
            outputs.append(mixed(weights[-1], v_CNH, q_QNH))
            start = stop
        return _finished(spec.layer, outputs, weights, self._asked, self.kept, q_TNH)

    def _contexts(self, spec: AttentionSpec, k_TKH: Tensor, v_TKH: Tensor) -> list[KeysValues]:
        """Each sequence's keys and values by query head, past ones first."""

        def by_sequence(k: Tensor, v: Tensor, lengths: Sequence[int]) -> list[KeysValues]:
            k, v = (k, v) if spec.kv is None else spec.kv.spread_both(k, v)
            return list(zip(k.split(list(lengths)), v.split(list(lengths)), strict=True))

        new = by_sequence(k_TKH, v_TKH, self._lengths)
        if self._past is None:
            return new
        old = by_sequence(*self._past.keys_values[spec.layer], self._past.lengths)
        return [(torch.cat((pk, k)), torch.cat((pv, v))) for (pk, pv), (k, v) in zip(old, new, strict=True)]

    def _seen(self, spec: AttentionSpec, sequence: int, like_QC: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What is hidden from a sequence's queries, or what is added to their scores."""
        if self._added is None:
            queries, keys = like_QC.shape
            return distance(torch.arange(keys, device=like_QC.device), queries) > 0, None
        added = self._added[sequence]
        return None, added if added.shape[0] == 1 else added[list(spec.head_ids)]

    def _distance(self, sequence: int, num_keys: int, device: torch.device) -> Tensor:
        places = torch.arange(num_keys, device=device) if self._places is None else self._places[sequence]
        return distance(places, self._lengths[sequence])


class Encoded:
    """Attention to encoder states: those of sequence s are `lengths[s]` rows of states_SD; it brings
    `query_lengths[s]` tokens, or none. `hidden` says for each sequence which states its tokens may not see, [1 or Q,
    C]. With `past`, keys and values [S, K, H] by layer are taken from there.
    """

    def __init__(
        self,
        states_SD: Tensor,
        lengths: Sequence[int],
        query_lengths: Sequence[int],
        asked: Asked,
        *,
        hidden: Sequence[Tensor] | None = None,
        past: Sequence[KeysValues] | None = None,
    ) -> None:
        self.kept, self._states, self._asked = Kept(), states_SD, asked
        self._lengths, self._query_lengths = tuple(lengths), tuple(query_lengths)
        self._hidden, self._past = hidden, past
        if len(self._lengths) != len(self._query_lengths) or sum(self._lengths) != len(states_SD):
            raise ConfigError(
                f"{len(states_SD)} encoder states for sequences with {list(self._lengths)} of them, which bring "
                f"{list(self._query_lengths)} tokens; one length each, that add up"
            )

    def __call__(
        self, spec: AttentionSpec, q_TNH: Tensor, keys_values: KeysValuesOf, *, masks: HeadMasks | None = None
    ) -> Tensor:
        """`keys_values` makes keys and values [S, N, H] of the states."""
        k_SNH, v_SNH = keys_values(self._states) if self._past is None else self._past[spec.layer]
        if self._asked.keys_values:
            self.kept.keys_values.setdefault(spec.layer, (k_SNH, v_SNH))
        outputs, weights = [], []
        spans = pairwise(accumulate(self._query_lengths, initial=0))
        for s, ((start, stop), k_CNH, v_CNH) in enumerate(
            zip(spans, k_SNH.split(self._lengths), v_SNH.split(self._lengths), strict=True)
        ):
            q_QNH, hidden_QC = q_TNH[start:stop], None if self._hidden is None else self._hidden[s]
            nowhere = torch.zeros((), device=q_TNH.device)
            weights_NQC = probabilities(spec, q_QNH, k_CNH, hidden_QC, nowhere)
            factors = masks.factors(start, stop, len(k_CNH)) if masks else None
            weights.append(_steered(weights_NQC, factors, self._asked, spec))
            outputs.append(mixed(weights[-1], v_CNH, q_QNH))
        return _finished(spec.layer, outputs, weights, self._asked, self.kept, q_TNH)


def _steered(weights_NQC: Tensor, factors_NQC: Tensor | None, asked: Asked, spec: AttentionSpec) -> Tensor:
    """After dropout and the layer's head mask."""
    if factors_NQC is not None:
        weights_NQC = weights_NQC * factors_NQC.to(weights_NQC)
    if asked.head_mask_LN is None:
        return weights_NQC
    return weights_NQC * asked.head_mask_LN[spec.layer, list(spec.head_ids)].to(weights_NQC)[:, None, None]


def _finished(
    layer: int, outputs: list[Tensor], weights: list[Tensor], asked: Asked, kept: Kept, q_TNH: Tensor
) -> Tensor:
    if asked.weights:
        kept.weights.setdefault(layer, [one.to(q_TNH.dtype) for one in weights])
    return torch.cat(outputs) if outputs else q_TNH.new_empty(q_TNH.shape)

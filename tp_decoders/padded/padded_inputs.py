"""The inputs of a padded call, read and checked: what transformers' models refuse, and what they would get wrong.

Everything that is refused is a RequestError that says what was given and the rule. Only tokens that are there are
looked at, so padding may hold any id. B batch, T new and P past columns, L layers, N heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from parallel.errors import RequestError
from tp_decoders.model.decoder import Decoder
from tp_decoders.padded.attention_mask import checked_matrix, of_four_axes
from tp_decoders.padded.flat_tokens import EncoderPadding, Padding
from tp_decoders.padded.padded_outputs import KeyValues
from tp_decoders.padded.transformers_cache import Caches


class Inputs(TypedDict, total=False):
    """What a call takes besides input_ids [B, T]. The three flags are config.json's where they are not given."""

    inputs_embeds: Tensor | None  # [B, T, D], in place of input_ids
    attention_mask: Tensor | None  # [B, P + T] of 0 and 1, or [B, 1 or N, T, P + T] (attention_mask.py)
    position_ids: Tensor | None  # [B, T] or [1, T]
    token_type_ids: Tensor | None  # [B, T], in the vocabulary
    head_mask: Tensor | None  # [N] for all layers, or [L, N]; by the numbers of unpruned heads
    past_key_values: Any  # what an earlier call returned: key/values by layer, or a cache of transformers'
    encoder_hidden_states: Tensor | None  # [B, S, D]
    encoder_attention_mask: Tensor | None  # [B, S] or [B, T, S]
    use_cache: bool | None
    output_attentions: bool | None
    output_hidden_states: bool | None
    seed: int | None  # of dropout in train mode


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """A checked call of a model."""

    model: Decoder
    input_ids: Tensor | None
    given: Inputs
    padding: Padding
    encoder: EncoderPadding | None
    cache: Caches | None = None  # what past_key_values came in, if not as tuples
    added: Tensor | None = None  # to the scores, [B, 1 or N, T, P + T]: a mask of four axes

    @staticmethod
    def of(model: Decoder, input_ids: Tensor | None, given: Inputs) -> Call:
        unknown = sorted(set(given) - set(Inputs.__annotations__))
        if unknown:
            raise RequestError(f"unknown inputs {unknown}; a call takes {', '.join(sorted(Inputs.__annotations__))}")
        cache = Caches.of(given.get("past_key_values"))
        if cache is not None:
            given = {**given, "past_key_values": cache.keys_values()}
        embeds, past = given.get("inputs_embeds"), given.get("past_key_values")
        batch, time, device = _shape(input_ids, embeds, model.config.d_model)
        num_past = 0 if past is None else checked_past(model, past, batch)
        mask, added = given.get("attention_mask"), None
        if mask is not None and of_four_axes(mask):
            added, mask = checked_matrix(model, mask, batch, time, num_past).to(device), None
        padding = Padding.of(mask, batch, time, num_past, device)
        encoder = _encoder(model, given, padding, cache is not None)
        return Call(
            model=model, input_ids=input_ids, given=given, padding=padding, encoder=encoder, cache=cache, added=added
        )

    def asks(self, flag: str) -> bool:
        """One of use_cache, output_attentions and output_hidden_states."""
        return asks(self.model, self.given, flag)

    @property
    def past(self) -> KeyValues | None:
        return self.given.get("past_key_values")

    @property
    def keeps(self) -> bool:
        """Whether keys and values are left behind: a cache grows whether or not it is asked for."""
        return self.cache is not None or self.asks("use_cache")

    def positions(self) -> Tensor:
        """[tokens]"""
        config, ids = self.model.config, self.given.get("position_ids")
        shape = tuple(self.padding.new_BT.shape)
        if ids is None:
            positions_T = self.padding.positions()
        elif not config.takes_positions:
            raise RequestError("position_ids for a model with ALiBi, whose attention goes by distance; leave them out")
        else:
            positions_T = self.padding.pack(checked_ids("position_ids", ids, shape, may_repeat=True))
        if int(positions_T.min()) < 0 or int(positions_T.max()) >= config.max_positions:
            raise RequestError(
                f"positions {int(positions_T.min())} to {int(positions_T.max())}; the model has 0 to "
                f"{config.max_positions - 1}"
            )
        return positions_T

    def embedded(self, positions_T: Tensor) -> Tensor:
        """[tokens, D] with positions and token types."""
        model, embeds, types = self.model, self.given.get("inputs_embeds"), self.given.get("token_type_ids")
        if embeds is None:
            assert self.input_ids is not None, "one of the two is given"
            x_TD = model.embedded(self._tokens("input_ids", self.input_ids), positions_T)
        else:
            x_TD = self.padding.pack(embeds)
            x_TD = x_TD if model.positions is None else x_TD + model.positions(positions_T)
        if types is None:
            return x_TD
        if not model.takes_token_types:
            raise RequestError(
                f"token_type_ids for a model of type {model.config.model_type}, which has no token types"
            )
        return x_TD + model.embed(self._tokens("token_type_ids", types))  # type: ignore[no-any-return]

    def _tokens(self, name: str, ids_BT: Tensor) -> Tensor:
        ids_T = self.padding.pack(checked_ids(name, ids_BT, tuple(self.padding.new_BT.shape)))
        return in_vocabulary(name, ids_T, self.model.config.vocab_size)

    def head_mask(self) -> Tensor | None:
        """[L, N] float32."""
        mask, config = self.given.get("head_mask"), self.model.config
        if mask is None:
            return None
        if tuple(mask.shape) not in ((config.n_heads,), (config.n_layers, config.n_heads)):
            raise RequestError(
                f"head_mask of shape {list(mask.shape)}; give [{config.n_heads}] for all layers or "
                f"[{config.n_layers}, {config.n_heads}] (pruned heads keep their numbers)"
            )
        return mask.to(torch.float32).expand(config.n_layers, config.n_heads)


def asks(model: Decoder, given: Inputs, flag: str) -> bool:
    """As given, or else as config.json says."""
    value = given.get(flag)
    return bool(model.config.hf.get(flag, flag == "use_cache") if value is None else value)


def _shape(input_ids: Tensor | None, embeds: Tensor | None, d_model: int) -> tuple[int, int, torch.device]:
    """Batch and time."""
    if (input_ids is None) == (embeds is None):
        both = "both input_ids and inputs_embeds" if embeds is not None else "neither input_ids nor inputs_embeds"
        raise RequestError(f"a call was given {both}; give exactly one of them")
    x = input_ids if input_ids is not None else embeds
    assert x is not None, "one of the two is given"
    if x.dim() != (2 if embeds is None else 3) or 0 in x.shape:
        rule = "input_ids are [batch, time]" if embeds is None else f"inputs_embeds are [batch, time, {d_model}]"
        raise RequestError(f"inputs of shape {list(x.shape)}; {rule}, with at least one token")
    if embeds is not None and embeds.shape[2] != d_model:
        raise RequestError(f"inputs_embeds of width {embeds.shape[2]}; the model's is {d_model}")
    return x.shape[0], x.shape[1], x.device


def checked_ids(name: str, ids: Tensor, shape: tuple[int, ...], may_repeat: bool = False) -> Tensor:
    """Whole numbers of the batch's shape; one row may stand for all where that has a meaning."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
        raise RequestError(f"{name} of type {ids.dtype}; give whole numbers")
    if may_repeat and tuple(ids.shape) == (1, shape[1]):
        ids = ids.expand(shape)
    if tuple(ids.shape) != shape:
        raise RequestError(f"{name} of shape {list(ids.shape)}; it is {list(shape)} in this call")
    return ids.long()


def in_vocabulary(name: str, ids_T: Tensor, vocab_size: int) -> Tensor:
    if len(ids_T) and (int(ids_T.min()) < 0 or int(ids_T.max()) >= vocab_size):
        raise RequestError(
            f"{name} from {int(ids_T.min())} to {int(ids_T.max())}; the vocabulary is 0 to {vocab_size - 1}"
        )
    return ids_T


def checked_past(model: Decoder, past: KeyValues, batch: int) -> int:
    """How many columns the past has; refused unless every layer is [batch, this rank's k/v heads, columns, head]."""
    config = model.config
    if len(past) != config.n_layers or any(len(layer) not in (2, 4) for layer in past):
        raise RequestError(
            f"past_key_values of {len(past)} layers with {sorted({len(layer) for layer in past})} tensors each; give "
            f"{config.n_layers} layers of (k, v), or of (k, v, cross k, cross v) with an encoder"
        )
    num_past = past[0][0].shape[2] if past[0][0].dim() == 4 else -1
    for number, layer in enumerate(past):
        heads = model.heads(number)
        shape = (batch, heads.n_local_kv if heads.n_local else layer[0].shape[1], num_past, config.head_dim)
        if any(tuple(x.shape) != shape for x in layer[:2]):
            raise RequestError(
                f"past_key_values of shapes {[list(x.shape) for x in layer[:2]]} in layer {number}; keys and values "
                f"are [batch, local heads, past columns, head], here {list(shape)}, with as many columns in every layer"
            )
    return num_past


def _encoder(model: Decoder, given: Inputs, padding: Padding, grows: bool) -> EncoderPadding | None:
    states, mask, past = (
        given.get("encoder_hidden_states"), given.get("encoder_attention_mask"), given.get("past_key_values"),
    )  # fmt: skip
    cached = past is not None and any(len(layer) == 4 for layer in past)
    if states is None:
        if mask is not None or cached:
            what = "encoder_attention_mask" if mask is not None else "a past with an encoder's keys and values"
            raise RequestError(f"{what} without encoder_hidden_states; give them in every call, or neither")
        return None
    if not getattr(model.config.options, "cross_attention", False):
        raise RequestError(
            f"encoder_hidden_states for a model of type {model.config.model_type} without cross-attention; load a "
            "GPT-2, or a GPT-BigCode with multi_query = false, whose config has add_cross_attention = true"
        )
    batch, d_model = padding.new_BT.shape[0], model.config.d_model
    if states.dim() != 3 or states.shape[0] != batch or states.shape[2] != d_model or states.shape[1] == 0:
        raise RequestError(
            f"encoder_hidden_states of shape {list(states.shape)}; they are [{batch}, states, {d_model}] in this call"
        )
    if past is not None and cached:
        checked_cross(model, past, states)
    keeps = grows or asks(model, given, "use_cache")
    return EncoderPadding.of(mask, states.shape[1], padding, whole=keeps and not cached)


def checked_cross(model: Decoder, past: KeyValues, states: Tensor) -> None:
    heads = Decoder.heads(model, 0)
    shape = (states.shape[0], heads.n_local, states.shape[1], heads.head_dim)
    if any(len(layer) != 4 or any(tuple(x.shape) != shape for x in layer[2:]) for layer in past):
        raise RequestError(
            f"the past of an encoder is {list(shape)} in every layer for encoder_hidden_states {list(states.shape)}; "
            f"layer 0 has {[list(x.shape) for x in past[0][2:]]}"
        )

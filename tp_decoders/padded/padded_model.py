"""The padded [batch, time] call of transformers' models around the flat-token forward, for every family and on any
number of ranks; all ranks make the same call.

    padded = PaddedModel(load(folder, group=group))
    out = padded(input_ids, attention_mask=mask, labels=labels);   out.loss.backward()
    states = padded.states(input_ids, attention_mask=mask).last_hidden_state

Positions, unless given, count the columns from a row's first token, so that a row's results do not depend on where its
padding is. transformers' forward counts from the first column: with padding on the left it differs for learned
positions (GPT-2, GPT-BigCode), until it is given the position_ids that its `generate` makes. Positions say where tokens
are and nothing else: without mask and cache transformers takes some that do not count up by one for packed sequences,
which here go through the flat forward. Labels are shifted inside: one counts unless it is -100 or the column before it
holds no token to predict it from; on padding it must be -100.

In train mode activations are dropped as config.json says. The masks follow from one seed, `seed` or else drawn from
torch's default generator, which must be in the same state on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from parallel.attention.attention_probes import Asked, Encoded, Kept, Past, Probed
from parallel.attention.forward_pass import Pass
from parallel.errors import ConfigError, RequestError
from parallel.layers.dropout import Dropping, token_keys
from parallel.ranks.collectives import gather_from
from parallel.vocabulary.cross_entropy import IGNORE_INDEX, vocab_cross_entropy
from parallel.vocabulary.vocab_parallel import VocabEmbedding, VocabHead
from tp_decoders.model.decoder import Decoder
from tp_decoders.padded.flat_tokens import Padding
from tp_decoders.padded.padded_inputs import Call, Inputs, checked_ids, in_vocabulary
from tp_decoders.padded.padded_outputs import (
    CausalOutput,
    KeyValues,
    StatesOutput,
    gathered_attentions,
    gathered_cross_attentions,
    padded_keys_values,
)
from tp_decoders.padded.transformers_cache import columns_of

LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True, eq=False)
class FlatPass:
    """A call on flat tokens: normalised last hidden states [tokens, D], and what was kept on the way."""

    call: Call
    states_TD: Tensor
    now: Pass
    kept: Kept
    kept_cross: Kept | None  # with an encoder
    before_blocks: list[Tensor] | None  # the states that every block was given

    @property
    def padding(self) -> Padding:
        return self.call.padding

    def hidden_states(self) -> tuple[Tensor, ...] | None:
        if self.before_blocks is None:
            return None
        return tuple(self.padding.pad(x_TD) for x_TD in (*self.before_blocks, self.states_TD))

    def attentions(self) -> tuple[Tensor, ...] | None:
        weights = self.kept.weights
        return gathered_attentions(self.call.model, self.padding, weights) if weights else None

    def cross_attentions(self) -> tuple[Tensor, ...] | None:
        weights = self.kept_cross.weights if self.kept_cross else None
        if not weights or self.call.encoder is None:
            return None
        return gathered_cross_attentions(self.call.model, self.call.encoder, weights)

    def past_key_values(self) -> Any:
        """The call's past and its new columns, and the encoder's keys and values; in the cache that was handed in."""
        if not self.call.asks("use_cache"):
            return None
        return self.keys_values() if self.call.cache is None else self.call.cache.given

    def keys_values(self) -> KeyValues:
        layers = padded_keys_values(self.padding, self.kept.keys_values, self.call.past)
        if self.kept_cross is None or self.call.encoder is None:
            return tuple(layers)
        if self.call.past is not None and len(self.call.past[0]) == 4:
            return tuple((*kv, *old[2:]) for kv, old in zip(layers, self.call.past, strict=True))
        cross, pad = self.kept_cross.keys_values, self.call.encoder.pad
        return tuple((*kv, *(pad(x).transpose(1, 2) for x in cross[i])) for i, kv in enumerate(layers))


class PaddedModel:
    """A loaded model, `model`, called as transformers' are."""

    def __init__(self, model: Decoder) -> None:
        self.model = model

    def __call__(
        self,
        input_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **inputs: Unpack[Inputs],
    ) -> CausalOutput:
        """Logits of all columns, or of the last `logits_to_keep`; with labels [B, T] the loss."""
        if not self.model.has_vocabulary:
            raise ConfigError(f"a model loaded for {self.model.task} has no vocabulary head; call `states`")
        flat = self.flat_pass(input_ids, **inputs)
        targets_T = None if labels is None else targets_of(labels, flat.padding, self.model.config.vocab_size)
        loss, logits = self._scored(flat, targets_T, logits_to_keep)
        return CausalOutput(
            loss=loss,
            logits=logits,
            past_key_values=flat.past_key_values(),
            hidden_states=flat.hidden_states(),
            attentions=flat.attentions(),
            cross_attentions=flat.cross_attentions(),
        )

    def states(self, input_ids: Tensor | None = None, **inputs: Unpack[Inputs]) -> StatesOutput:
        """The last hidden states, normalised, [B, T, D]; zeros in padding."""
        flat = self.flat_pass(input_ids, **inputs)
        return StatesOutput(
            last_hidden_state=flat.padding.pad(flat.states_TD),
            past_key_values=flat.past_key_values(),
            hidden_states=flat.hidden_states(),
            attentions=flat.attentions(),
            cross_attentions=flat.cross_attentions(),
        )

    def embeddings(self, input_ids: Tensor) -> Tensor:
        """[B, T, D]: the tokens' embeddings without positions, to be changed and handed in as inputs_embeds."""
        ids = checked_ids("input_ids", input_ids, tuple(input_ids.shape))
        flat = in_vocabulary("input_ids", ids.flatten(), self.model.config.vocab_size)
        return self.model.embed(flat).unflatten(0, ids.shape)  # type: ignore[no-any-return]

    def get_input_embeddings(self) -> VocabEmbedding:
        """The model's embedding; its weight holds this rank's rows."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding | VocabEmbedding | Tensor) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> VocabHead | None:
        return self.model.get_output_embeddings()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> VocabEmbedding:
        return self.model.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **inputs: Unpack[Inputs]) -> dict[str, Any]:
        """The next call of a loop that appends tokens to input_ids and attention_mask: what is not in the past yet,
        at the positions that the mask leaves. inputs_embeds stand for the first call's input_ids.
        """
        columns = columns_of(inputs.get("past_key_values"))
        mask, types = inputs.get("attention_mask"), inputs.get("token_type_ids")
        call: dict[str, Any] = {**inputs}
        embeds = call.pop("inputs_embeds", None)
        if columns:
            input_ids = input_ids[:, columns if input_ids.shape[1] > columns else -1 :]
        new = input_ids.shape[1] if embeds is None or columns else embeds.shape[1]
        call |= {"input_ids": input_ids} if embeds is None or columns else {"inputs_embeds": embeds}
        if isinstance(types, Tensor):
            call["token_type_ids"] = types[:, -new:]
        counts = self.model.config.takes_positions and inputs.get("position_ids") is None
        if counts and isinstance(mask, Tensor) and mask.dim() == 2:
            call["position_ids"] = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 1)[:, -new:]
        return call

    def flat_pass(self, input_ids: Tensor | None = None, **inputs: Unpack[Inputs]) -> FlatPass:
        """The call without its padding, as heads want it."""
        model, call = self.model, Call.of(self.model, input_ids, inputs)
        positions_T = call.positions()
        x_TD = call.embedded(positions_T)
        asked = Asked(keys_values=call.keeps, weights=call.asks("output_attentions"), head_mask_LN=call.head_mask())
        probed, encoded = _probed(call, asked), _encoded(call, asked)
        dropping = self._dropping(call.padding, inputs.get("seed"))
        now = Pass(
            positions_T=positions_T, lengths=tuple(call.padding.lengths), attend=probed, encoder=encoded,
            dropping=dropping,
        )  # fmt: skip
        seen: list[Tensor] | None = [] if call.asks("output_hidden_states") else None
        x_TD = model.through_blocks(x_TD, now, seen)
        flat = FlatPass(call, model.final(x_TD), now, probed.kept, encoded.kept if encoded else None, seen)
        if call.cache is not None:
            call.cache.extend(flat.keys_values())
        return flat

    def _dropping(self, padding: Padding, seed: int | None) -> Dropping | None:
        """By rows of the batch and places in them."""
        if not (self.model.training and self.model.drops):
            return None
        seed = int(torch.randint(LARGEST_SEED, ())) if seed is None else seed
        keys_T = token_keys(padding.rows, padding.lengths, padding.past_lengths)
        return Dropping(seed, keys_T.to(padding.new_BT.device))

    def _scored(self, flat: FlatPass, targets_T: Tensor | None, logits_to_keep: int) -> tuple[Tensor | None, Tensor]:
        """The loss, and padded logits gathered over the vocabulary."""
        model, new_BT = self.model, flat.padding.new_BT
        time = new_BT.shape[1]
        if not 0 <= logits_to_keep <= time:
            raise RequestError(f"logits_to_keep = {logits_to_keep}; give 1 to {time} columns, or 0 for all")
        local = model.head(flat.states_TD, flat.now)
        loss = None if targets_T is None else vocab_cross_entropy(local, targets_T, model.head.shards, model.group)
        first = time - logits_to_keep if logits_to_keep else 0
        kept = Padding(new_BT[:, first:], new_BT[:, :0])
        logits = gather_from(local[flat.padding.index_T % time >= first], model.group, model.head.shards.sizes, 1)
        return loss, kept.pad(logits)


def targets_of(labels_BT: Tensor, padding: Padding, vocab_size: int) -> Tensor:
    """[tokens] what each token should be followed by: the label one column on, -100 where nothing counts."""
    labels_BT = checked_ids("labels", labels_BT, tuple(padding.new_BT.shape)).to(padding.new_BT.device)
    if bool(((labels_BT != IGNORE_INDEX) & ~padding.new_BT).any()):
        raise RequestError("labels on padding, of which nothing is computed; set labels to -100 where the mask is 0")
    in_vocabulary("labels", labels_BT[labels_BT != IGNORE_INDEX], vocab_size)
    targets_BT = labels_BT.roll(-1, 1)
    targets_BT[:, -1] = IGNORE_INDEX
    return padding.pack(targets_BT)


def _probed(call: Call, asked: Asked) -> Probed:
    padding, past = call.padding, call.past
    behind = None
    if past is not None:
        flat = [(padding.pack_past(layer[0]), padding.pack_past(layer[1])) for layer in past]
        behind = Past(lengths=padding.past_lengths, keys_values=flat)
    places = padding.columns if padding.gaps else None
    added = None if call.added is None else list(call.added)
    return Probed(padding.lengths, asked, past=behind, places=places, added=added)


def _encoded(call: Call, asked: Asked) -> Encoded | None:
    encoder, states, past = call.encoder, call.given.get("encoder_hidden_states"), call.past
    if encoder is None or states is None:
        return None
    cached = None
    if past is not None and len(past[0]) == 4:
        cached = [(encoder.pack(k.transpose(1, 2)), encoder.pack(v.transpose(1, 2))) for _, _, k, v in past]
    lengths = encoder.lengths, encoder.query_lengths
    return Encoded(encoder.pack(states), *lengths, asked, hidden=encoder.hidden, past=cached)

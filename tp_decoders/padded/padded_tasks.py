"""The padded [batch, time] call of a model loaded for a task, with transformers' inputs, outputs and losses.

    classify = PaddedTask(load(folder, task="sequence-classification", group=group))
    out = classify(input_ids, attention_mask=mask, labels=labels);   out.loss.backward()

Inputs are those of `PaddedModel`; double heads take them with an axis of choices, [batch, choices, time], or without.
Logits of tokens and choices are zeros in padding; those of spans -inf, so that no answer begins or ends there. Where
the reference lets padding into a result (a softmax over places, a last token that is padding), it stays out here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from parallel.errors import ConfigError, RequestError
from parallel.ranks.collectives import gather_from
from tp_decoders.model.decoder import Decoder
from tp_decoders.model.task_config import CHOICES, SEQUENCES, SPANS, TOKENS, TaskConfig
from tp_decoders.padded.flat_tokens import Padding
from tp_decoders.padded.padded_inputs import Inputs, checked_ids
from tp_decoders.padded.padded_model import FlatPass, PaddedModel, targets_of
from tp_decoders.padded.padded_outputs import KeyValues, Output
from tp_decoders.tasks.task_outputs import (
    IGNORED,
    TaskOutputs,
    choice_loss,
    head_outputs,
    language_loss,
    task_config,
    task_loss,
)

BY_CHOICE = ("inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
"""Inputs that may have an axis of choices."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelOutput(Output):
    """Of sequences logits [B, C], of tokens [B, T, C]."""

    loss: Tensor | None = None
    logits: Tensor
    past_key_values: KeyValues | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class SpanOutput(Output):
    """start_logits and end_logits are [B, T]."""

    loss: Tensor | None = None
    start_logits: Tensor
    end_logits: Tensor
    past_key_values: KeyValues | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ChoicesOutput(Output):
    """logits [B, choices, T, V] and mc_logits [B, choices]; everything from past_key_values on has B x choices rows."""

    loss: Tensor | None = None
    mc_loss: Tensor | None = None
    logits: Tensor
    mc_logits: Tensor
    past_key_values: KeyValues | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class PaddedTask:
    """A model loaded for a task, `model`, called as transformers' are."""

    def __init__(self, model: Decoder) -> None:
        self.model, self.padded, self.task = model, PaddedModel(model), task_config(model)

    def __call__(
        self,
        input_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **inputs: Unpack[Inputs],
    ) -> LabelOutput | SpanOutput:
        """`labels` of sequences [B] or [B, C], of tokens [B, T]; of spans the columns where answers start and end, [B]
        each.
        """
        if self.task.name == CHOICES:
            raise ConfigError("a model with double heads answers about choices; call `choices`")
        flat = self._flat(input_ids, inputs)
        if self.task.name == SPANS:
            return self._spans(flat, start_positions, end_positions)
        marks = _last_tokens(self.task, flat, input_ids) if self.task.name == SEQUENCES else None
        found = head_outputs(self.model, flat.states_TD, flat.now, marks).logits
        logits = found if self.task.name == SEQUENCES else flat.padding.pad(found)
        loss = None
        if labels is not None:
            labels = labels_of_tokens(labels, flat.padding) if self.task.name == TOKENS else labels
            loss = task_loss(self.task, found, labels.to(found.device), flat.padding.lengths)
        return LabelOutput(loss=loss, logits=logits, **kept(flat))

    def choices(
        self,
        input_ids: Tensor | None = None,
        *,
        mc_token_ids: Tensor | None = None,
        labels: Tensor | None = None,
        mc_labels: Tensor | None = None,
        **inputs: Unpack[Inputs],
    ) -> ChoicesOutput:
        """Double heads: `mc_token_ids` [B, choices] are the columns that stand for their sequences, the last tokens if
        not given; `labels` as input_ids for the language loss, `mc_labels` [B] the right choices.
        """
        if self.task.name != CHOICES:
            raise ConfigError(f"a model loaded for {self.task.name} has no double heads; call it itself")
        first = inputs.get("inputs_embeds") if input_ids is None else input_ids
        axes = tuple(first.shape[:-2] if input_ids is None else first.shape[:-1]) if first is not None else ()
        merged: dict[str, Any] = {k: _merged(value, axes) if k in BY_CHOICE else value for k, value in inputs.items()}
        flat = self._flat(None if input_ids is None else _merged(input_ids, axes), merged)
        marks = None if mc_token_ids is None else _places(mc_token_ids.flatten(), flat.padding, "mc_token_ids")
        found = head_outputs(self.model, flat.states_TD, flat.now, marks)
        return self._choices(flat, found, axes, None if labels is None else _merged(labels, axes), mc_labels)

    def _flat(self, input_ids: Tensor | None, inputs: Any) -> FlatPass:
        flat = self.padded.flat_pass(input_ids, **inputs)
        if len(flat.padding.rows) < len(flat.padding.new_BT):
            raise RequestError("a row without a token, of which no head can say anything; leave it out of the batch")
        return flat

    def _spans(self, flat: FlatPass, starts: Tensor | None, ends: Tensor | None) -> SpanOutput:
        padding = flat.padding
        found = head_outputs(self.model, flat.states_TD, flat.now).logits
        nowhere = torch.where(padding.new_BT, 0.0, float("-inf"))[:, :, None]
        start_logits, end_logits = (padding.pad(found) + nowhere).unbind(2)
        loss = None
        if starts is not None and ends is not None:
            columns = [_places(x.view(-1), padding, "an answer's column", clamped=True) for x in (starts, ends)]
            loss = task_loss(self.task, found, torch.stack(columns, 1), padding.lengths)
        return SpanOutput(loss=loss, start_logits=start_logits, end_logits=end_logits, **kept(flat))

    def _choices(
        self,
        flat: FlatPass,
        found: TaskOutputs,
        axes: tuple[int, ...],
        labels: Tensor | None,
        mc_labels: Tensor | None,
    ) -> ChoicesOutput:
        model, padding, choices = self.model, flat.padding, found.choices
        assert choices is not None, "double heads have both outputs"
        logits = padding.pad(gather_from(found.logits, model.group, model.head.shards.sizes, 1))
        loss = None
        if labels is not None:
            targets_of(labels, padding, model.config.vocab_size)
            loss = language_loss(model, found.logits, padding.pack(labels), padding.lengths)
        num_choices = axes[-1]  # without an axis of choices the rows are the choices of one question
        return ChoicesOutput(
            loss=loss,
            mc_loss=None if mc_labels is None else choice_loss(choices, num_choices, mc_labels.to(choices.device)),
            logits=logits.unflatten(0, axes),
            mc_logits=choices.squeeze(-1).unflatten(0, axes),
            **kept(flat),
        )


def kept(flat: FlatPass) -> dict[str, Any]:
    """What every output ends with."""
    return {
        "past_key_values": flat.past_key_values(),
        "hidden_states": flat.hidden_states(),
        "attentions": flat.attentions(),
    }


def labels_of_tokens(labels_BT: Tensor, padding: Padding) -> Tensor:
    """[tokens]; refused on padding."""
    labels_BT = checked_ids("labels", labels_BT, tuple(padding.new_BT.shape)).to(padding.new_BT.device)
    if bool(((labels_BT != IGNORED) & ~padding.new_BT).any()):
        raise RequestError("labels on padding, of which nothing is computed; set labels to -100 where the mask is 0")
    return padding.pack(labels_BT)


def _merged(value: Any, axes: tuple[int, ...]) -> Any:
    """Batch and choices as one axis."""
    fits = isinstance(value, Tensor) and len(axes) == 2 and tuple(value.shape[:2]) == axes and value.dim() > 2
    return value.flatten(0, 1) if fits else value


def _last_tokens(task: TaskConfig, flat: FlatPass, input_ids: Tensor | None) -> Tensor:
    """[S] the place of each sequence's last token that is there and is no padding token."""
    padding, pad = flat.padding, task.pad_token_id
    if pad is None and len(padding.new_BT) > 1:
        raise RequestError(
            f"a batch of {len(padding.new_BT)} rows for a model without pad_token_id in its config.json, which says "
            "where sequences end; set it, or hand over one row"
        )
    ends = torch.tensor(padding.lengths, device=padding.new_BT.device) - 1
    if input_ids is None or pad is None:
        return ends
    real = [(row != pad).nonzero()[:, 0] for row in padding.pack(input_ids).split(padding.lengths)]
    return torch.stack([own[-1] if len(own) else ends[0] * 0 for own in real])


def _places(columns_S: Tensor, padding: Padding, name: str, clamped: bool = False) -> Tensor:
    """Columns of the batch as places in the sequences. `clamped`: below the first column is the first, and what lies
    past the last one stays so, as the reference has it.
    """
    time, columns_S = padding.new_BT.shape[1], columns_S.to(padding.new_BT.device)
    if len(columns_S) != len(padding.new_BT):
        raise RequestError(f"{len(columns_S)} times {name} for {len(padding.new_BT)} rows; one for each row")
    columns_S = columns_S.clamp(0, time) if clamped else columns_S
    inside = (columns_S >= 0) & (columns_S < time)
    found = columns_S.clamp(0, time - 1)[:, None]
    here = padding.new_BT.gather(1, found)[:, 0]
    if not bool((here | ~inside).all()) or not (clamped or bool(inside.all())):
        raise RequestError(f"{name} {columns_S.tolist()} is not where a token is in every row of the batch")
    places = padding.new_BT.long().cumsum(1).gather(1, found)[:, 0] - 1
    return torch.where(inside, places, time)

"""The padded [batch, time] call of transformers' classes with task heads, for every family and on any number of ranks.

    head = PaddedTask(load(folder, task="sequence-classification", group=group))
    out = head(input_ids, attention_mask=mask, labels=labels);   out.loss.backward()

Which column stands for a row is decided as in the reference: the rightmost token that is not pad_token_id, or the last
column with inputs_embeds; where that column is hidden by the mask, which the reference computes from padding, the call
is refused. Losses count tokens that are there: the softmax over places of a span leaves padding out, the mean of a
summary too. B batch, C choices, T time, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack, cast

import torch
from torch import Tensor

from parallel.errors import RequestError
from parallel.loss import vocab_cross_entropy
from tp_decoders.decoder import Decoder
from tp_decoders.padded import FlatPass, PaddedModel, targets_of
from tp_decoders.padded_inputs import Inputs
from tp_decoders.padded_outputs import KeyValues, Output
from tp_decoders.padding import Padding
from tp_decoders.task_config import CHOICES, SEQUENCES, SPANS, TaskConfig
from tp_decoders.tasks import IGNORED, choice_loss, head_of, summaries, task_config, task_loss

PER_ROW = ("attention_mask", "position_ids", "token_type_ids", "inputs_embeds")
LABELS = ("labels", "start_positions", "end_positions", "mc_token_ids", "mc_labels")
TAKES = {
    SPANS: ("start_positions", "end_positions"),
    CHOICES: ("labels", "mc_token_ids", "mc_labels"),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskOutput(Output):
    """What transformers' outputs hold, under their names: logits [B, L] or [B, T, L], or start_logits and end_logits
    [B, T]; of double heads logits [B, C, T, V] and mc_logits [B, C]. Zeros in padding.
    """

    loss: Tensor | None = None
    mc_loss: Tensor | None = None
    logits: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    mc_logits: Tensor | None = None
    past_key_values: KeyValues | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class PaddedTask:
    """A model loaded for a task, called as transformers' class for it is."""

    def __init__(self, model: Decoder) -> None:
        self.model, self.task = model, task_config(model)

    def __call__(
        self,
        input_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        mc_token_ids: Tensor | None = None,
        mc_labels: Tensor | None = None,
        **inputs: Unpack[Inputs],
    ) -> TaskOutput:
        """All ranks make the same call. With labels the reference's loss."""
        given = dict(zip(LABELS, (labels, start_positions, end_positions, mc_token_ids, mc_labels), strict=True))
        unfit = [
            name for name in LABELS if given[name] is not None and name not in TAKES.get(self.task.name, LABELS[:1])
        ]
        if unfit:
            raise RequestError(f"{', '.join(unfit)} for a model loaded for {self.task.name}; leave it out")
        if self.task.name == CHOICES:
            return self._choices(input_ids, given, inputs)
        flat = PaddedModel(self.model).flat_pass(input_ids, **inputs)
        made = {
            SEQUENCES: self._sequences,
            SPANS: self._spans,
        }.get(self.task.name, self._tokens)(flat, given)
        return TaskOutput(**made, **_more(flat))

    def _sequences(self, flat: FlatPass, given: Mapping[str, Tensor | None]) -> dict[str, Any]:
        places = flat_places(flat.padding, last_columns(flat, self.task))
        logits = self._head(flat, flat.states_TD[places], places)
        labels = given["labels"]
        return {"logits": logits, "loss": None if labels is None else self._loss(logits, labels, flat)}

    def _tokens(self, flat: FlatPass, given: Mapping[str, Tensor | None]) -> dict[str, Any]:
        logits_T, labels = self._head(flat, flat.states_TD), given["labels"]
        if labels is not None:
            if bool((labels[~flat.padding.new_BT] != IGNORED).any()):
                raise RequestError("labels on padding; set them to -100 where the mask is 0")
            labels = flat.padding.pack(labels)
        loss = None if labels is None else self._loss(logits_T, labels, flat)
        return {"logits": flat.padding.pad(logits_T), "loss": loss}

    def _spans(self, flat: FlatPass, given: Mapping[str, Tensor | None]) -> dict[str, Any]:
        logits_T = self._head(flat, flat.states_TD)
        starts, ends = flat.padding.pad(logits_T).unbind(-1)
        made: dict[str, Any] = {"start_logits": starts, "end_logits": ends}
        halves = (given["start_positions"], given["end_positions"])
        if halves[0] is not None and halves[1] is not None:
            columns = torch.stack([half.view(-1) for half in halves if half is not None], 1)
            made["loss"] = self._loss(logits_T, own_places(flat.padding, columns), flat)
        return made

    def _choices(self, input_ids: Tensor | None, given: Mapping[str, Tensor | None], inputs: Inputs) -> TaskOutput:
        """Double heads: leading axes are one for the decoder; without an axis of choices all rows are of one question."""
        whole = inputs.get("inputs_embeds") if input_ids is None else input_ids
        if whole is None:
            raise RequestError("neither input_ids nor inputs_embeds; give one of them")
        shape = whole.shape if input_ids is not None else whole.shape[:-1]
        ids, labels = _rows(input_ids), _rows(given["labels"])
        flattened = {
            name: _rows(value, 2) if name == "inputs_embeds" else _rows(value) if name in PER_ROW else value
            for name, value in cast(dict[str, Any], inputs).items()
        }
        padded = PaddedModel(self.model)
        flat = padded.flat_pass(ids, **cast(Inputs, flattened))
        marked = flat_places(flat.padding, mark_columns(flat.padding, self.task, given["mc_token_ids"]))
        summary = summaries(self.task, flat.states_TD, flat.padding.lengths, marked)
        numbers = self._head(flat, summary, marked)
        num_choices = shape[1] if len(shape) == 3 else shape[0]
        wanted = given["mc_labels"]
        local = self.model.head(flat.states_TD)
        loss = None
        if labels is not None:
            targets = targets_of(labels, flat.padding, self.model.config.vocab_size)
            loss = vocab_cross_entropy(local, targets, self.model.head.shards, self.model.group)
        logits = flat.padding.pad(self.model.head.gather(local))
        return TaskOutput(
            loss=loss,
            mc_loss=None if wanted is None else choice_loss(numbers, num_choices, wanted),
            logits=logits.view(*shape, -1),
            mc_logits=numbers.view(*shape[:-1], *((-1,) if numbers.shape[1] > 1 else ())),
            **_more(flat),
        )

    def _head(self, flat: FlatPass, states: Tensor, rows: Tensor | None = None) -> Tensor:
        dropping = flat.attend.dropping
        return head_of(self.model)(states, dropping.of(rows) if dropping else None)  # type: ignore[no-any-return]

    def _loss(self, logits: Tensor, labels: Tensor, flat: FlatPass) -> Tensor:
        return task_loss(self.task, logits, labels.to(logits.device), flat.padding.lengths)


def last_columns(flat: FlatPass, task: TaskConfig) -> Tensor:
    """[B] the column that stands for each row, by the reference's rule."""
    batch, time = flat.padding.new_BT.shape
    ids = flat.call.input_ids
    if task.pad_token_id is None and batch != 1:
        raise RequestError(
            f"a batch of {batch} rows for a model without a padding token: which token of a row is its last cannot be "
            "told; set pad_token_id in config.json, or give one row at a time"
        )
    if task.pad_token_id is None or ids is None:
        return torch.full((batch,), time - 1)
    kept = (ids != task.pad_token_id).cpu() * torch.arange(time)
    return kept.argmax(1)


def mark_columns(padding: Padding, task: TaskConfig, given: Tensor | None) -> Tensor:
    """[rows] the columns that stand for the sequences of double heads; means have none, any that is there will do."""
    rows, time = padding.new_BT.shape
    assert task.summary is not None, "double heads have a summary"
    if task.summary.kind == "mean":
        return padding.new_BT.cpu().int().argmax(1)
    if task.summary.kind == "cls_index" and given is not None:
        return given.reshape(rows).cpu()
    return torch.full((rows,), 0 if task.summary.kind == "first" else time - 1)


def flat_places(padding: Padding, columns: Tensor) -> Tensor:
    """[rows] where a column of each row lies in the flat row; a hidden one is refused."""
    here = padding.new_BT.cpu()
    rows, time = here.shape
    for row, column in enumerate(columns.tolist()):
        if not (0 <= column < time and here[row, column]):
            raise RequestError(
                f"row {row} is to be judged by column {column}, which holds no token (attention_mask is 0 there): pad "
                "on the other side, set pad_token_id, or give mc_token_ids"
            )
    counted = here.flatten().cumsum(0) - 1
    return counted[torch.arange(rows) * time + columns].to(padding.new_BT.device)


def own_places(padding: Padding, columns_B2: Tensor) -> Tensor:
    """[B, 2] columns as places among each row's own tokens; at or past the last column they are ignored."""
    here = padding.new_BT.cpu()
    if len(padding.rows) < len(here):
        raise RequestError("a row without tokens has no span; leave the row out")
    columns, time = columns_B2.cpu().clamp(min=0), here.shape[1]
    inside = columns < time
    known = here.gather(1, columns.clamp(max=time - 1))
    if bool((inside & ~known).any()):
        raise RequestError("start_positions or end_positions point at padding; give columns that hold tokens")
    places = (here.cumsum(1) - 1).gather(1, columns.clamp(max=time - 1))
    return torch.where(inside, places, time).to(padding.new_BT.device)


def _rows(x: Tensor | None, kept: int = 1) -> Tensor | None:
    """Leading axes as one; `kept` axes stay at the end."""
    return None if x is None else x.flatten(0, -kept - 1)


def _more(flat: FlatPass) -> dict[str, Any]:
    return {
        "past_key_values": flat.past_key_values(),
        "hidden_states": flat.hidden_states(),
        "attentions": flat.attentions(),
    }

"""Tasks besides language modelling, on flat tokens: outputs of a model loaded for one, and the reference's losses.

    sequence-classification   [S, C]   one row per sequence: its last token that is no padding
    token-classification      [T, C]   every token
    question-answering        [T, 2]   every token as start and as end of the answer
    double-heads              [T, V/p] and [S, 1]   GPT-2: logits of language, and of each choice (a sequence)

Losses are means, as transformers gives them; `item_losses` are their addends, for training in parts. No collective runs
beside the decoder's own and those of the vocabulary. S sequences, T tokens, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from parallel.attention.forward_pass import Pass
from parallel.errors import ConfigError, RequestError
from parallel.exact import ordered_sum
from parallel.vocabulary.cross_entropy import vocab_cross_entropy, weighted_mean
from tp_decoders.model.decoder import Decoder
from tp_decoders.model.task_config import CHOICES, MULTI_LABEL, REGRESSION, SEQUENCES, SINGLE_LABEL, SPANS, TaskConfig
from tp_decoders.model.task_heads import LabelHead, SummaryHead

IGNORED = -100


@dataclass(frozen=True, eq=False)
class TaskOutputs:
    """A head's logits, float32, on every rank; with double heads `logits` is this rank's part of the vocabulary and
    `choices` [S, 1], or [S, D] without a projection to labels.
    """

    logits: Tensor
    choices: Tensor | None = None


def task_outputs(model: Decoder, tokens_T: Tensor, now: Pass, marks_S: Tensor | None = None) -> TaskOutputs:
    """The head's outputs for packed sequences. `marks_S` (double heads, cls_index): the place in each sequence that
    stands for it; its last one if not given.
    """
    task, head = task_config(model), head_of(model)
    if sum(now.lengths) != len(tokens_T) or not now.lengths:
        given = f"lengths {list(now.lengths)} do not make up {len(tokens_T)} tokens"
        raise RequestError(f"{given}; give each sequence's own")
    x_TD = model.hidden(tokens_T, now)
    if task.name == SEQUENCES:
        rows = last_rows(tokens_T, now.lengths, task.pad_token_id)
        return TaskOutputs(head(model.final(x_TD, rows), now.of(rows)))
    return head_outputs(model, model.final(x_TD), now, marks_S)


def head_outputs(model: Decoder, states_TD: Tensor, now: Pass, marks_S: Tensor | None = None) -> TaskOutputs:
    """The head's outputs for normalised states, of every token or of each sequence's marked one (its last if not
    given).
    """
    task, head = task_config(model), head_of(model)
    lengths = now.lengths
    rows = _starts(lengths, states_TD.device) + marks_of(lengths, marks_S, states_TD.device)
    if task.name == SEQUENCES:
        return TaskOutputs(head(states_TD[rows], now.of(rows)))
    if task.name != CHOICES:
        return TaskOutputs(head(states_TD, now))
    summary_SD = summaries(task, states_TD, lengths, rows)
    return TaskOutputs(model.head(states_TD, now), head(summary_SD, now.of(rows)))


def task_config(model: Decoder) -> TaskConfig:
    if model.config.task is None:
        raise ConfigError("the model was loaded as a language model; load it with task=... to use a head")
    return model.config.task


def head_of(model: Decoder) -> LabelHead | SummaryHead:
    assert model.task_head is not None, "a model with a task has a head"
    return model.task_head


def last_rows(tokens_T: Tensor, lengths: Sequence[int], pad_token_id: int | None) -> Tensor:
    """[S] the row of each sequence's last token that is no padding; its first where all are, as in the reference."""
    starts = _starts(lengths, tokens_T.device)
    if pad_token_id is None:
        return starts + torch.tensor(lengths, device=tokens_T.device) - 1
    kept = [(part != pad_token_id).nonzero() for part in tokens_T.split(list(lengths))]
    places = [int(found[-1]) if len(found) else 0 for found in kept]
    return starts + torch.tensor(places, device=tokens_T.device)


def marks_of(lengths: Sequence[int], marks_S: Tensor | None, device: torch.device) -> Tensor:
    """[S] places within sequences; those given are checked."""
    ends = torch.tensor(lengths, device=device) - 1
    if marks_S is None:
        return ends
    if marks_S.shape != ends.shape or bool(((marks_S < 0) | (marks_S > ends)).any()):
        raise RequestError(f"marks {marks_S.tolist()} for sequences of {list(lengths)} tokens; one place inside each")
    return marks_S


def summaries(task: TaskConfig, states_TD: Tensor, lengths: Sequence[int], marked: Tensor) -> Tensor:
    """[S, D]: the row, or mean of rows, that stands for each sequence."""
    assert task.summary is not None, "double heads have a summary"
    kind, starts = task.summary.kind, _starts(lengths, states_TD.device)
    if kind == "mean":
        return torch.stack(
            [ordered_sum(part.float(), 0).div(len(part)).to(part.dtype) for part in states_TD.split(list(lengths))]
        )
    if kind == "first":
        return states_TD[starts]
    return states_TD[marked if kind == "cls_index" else starts + torch.tensor(lengths, device=starts.device) - 1]


def _starts(lengths: Sequence[int], device: torch.device) -> Tensor:
    ends = torch.tensor(lengths, device=device).cumsum(0)
    return ends - torch.tensor(lengths, device=device)


# ------------------------------------------------------------------------------------------------------------ losses


def problem_of(task: TaskConfig, labels: Tensor) -> str:
    """What is learned from labels of this type, where the configuration leaves it open."""
    if task.problem is not None:
        return task.problem
    if task.num_labels == 1:
        return REGRESSION
    return MULTI_LABEL if labels.is_floating_point() else SINGLE_LABEL


def item_losses(task: TaskConfig, logits: Tensor, labels: Tensor, lengths: Sequence[int]) -> Tensor:
    """The addends of the loss: [S], [T], or of spans [S, 2] (start and end); 0 where ignored.

    labels: class ids [S] or [T] (-100: ignored), numbers [S] or [S, C], or spans [S, 2] (past the end: ignored).
    """
    if task.name == SPANS:
        return _span_losses(logits, labels, lengths)
    problem = problem_of(task, labels) if task.name == SEQUENCES else SINGLE_LABEL
    if problem == SINGLE_LABEL:
        _check_labels(labels.shape == logits.shape[:1] and not labels.is_floating_point(), labels, "one class id each")
        return functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
    targets = labels.float().view(len(labels), -1)
    _check_labels(targets.shape == logits.shape, labels, f"{logits.shape[1]} numbers each")
    if problem == REGRESSION:
        return (logits - targets).square().mean(1)
    return functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)


def item_weights(task: TaskConfig, labels: Tensor, lengths: Sequence[int]) -> Tensor:
    """Of each addend in the mean over the whole batch: 0 where ignored. The two halves of spans are means of their
    own.
    """
    if task.name == SPANS:
        inside = (_places(labels, lengths) != IGNORED).float()
        counts = inside.sum(0)
        return inside * (counts.sum() / (2.0 * counts.clamp(min=1.0)))
    if labels.is_floating_point() or (task.name == SEQUENCES and problem_of(task, labels) != SINGLE_LABEL):
        return torch.ones(len(labels), device=labels.device)
    return (labels != IGNORED).float()


def _span_losses(logits_T2: Tensor, labels_S2: Tensor, lengths: Sequence[int]) -> Tensor:
    _check_labels(labels_S2.shape == (len(lengths), 2), labels_S2, "a start and an end each")
    parts = zip(logits_T2.split(list(lengths)), _places(labels_S2, lengths), strict=True)
    return torch.stack([_of_span(part.t(), own) for part, own in parts])


def _of_span(logits_2T: Tensor, places: Tensor) -> Tensor:
    return functional.cross_entropy(logits_2T, places, reduction="none", ignore_index=IGNORED)


def _places(labels_S2: Tensor, lengths: Sequence[int]) -> Tensor:
    """Spans as the reference takes them: below 0 is 0, past the end of the sequence is ignored."""
    ends = torch.tensor(lengths, device=labels_S2.device)[:, None]
    places = labels_S2.clamp(min=0)
    return torch.where(places < ends, places, IGNORED)


def _check_labels(fits: bool, labels: Tensor, wanted: str) -> None:
    if not fits:
        raise RequestError(f"labels of shape {list(labels.shape)} and type {labels.dtype}; give {wanted}")


def task_loss(task: TaskConfig, logits: Tensor, labels: Tensor, lengths: Sequence[int]) -> Tensor:
    """transformers' loss of sequence, token and span tasks: a mean over what is not ignored."""
    return weighted_mean(item_losses(task, logits, labels, lengths), item_weights(task, labels, lengths))


def choice_loss(choices: Tensor, num_choices: int, labels: Tensor) -> Tensor:
    """GPT-2's multiple-choice loss: which of the `num_choices` sequences of each question, by its number.

    Without a projection to labels the reference takes each row's columns for classes; so does this.
    """
    if len(choices) % num_choices:
        raise RequestError(f"{len(choices)} sequences are no questions of {num_choices} choices; give all choices")
    rows = choices.view(-1, num_choices) if choices.shape[1] == 1 else choices
    return functional.cross_entropy(rows, labels.view(-1))


def language_loss(model: Decoder, logits_local: Tensor, labels_T: Tensor, lengths: Sequence[int]) -> Tensor:
    """The double heads' other loss: labels as transformers has them, one per token, shifted here within sequences."""
    parts = [functional.pad(part[1:], (0, 1), value=IGNORED) for part in labels_T.split(list(lengths))]
    return vocab_cross_entropy(logits_local, torch.cat(parts), model.head.shards, model.group)

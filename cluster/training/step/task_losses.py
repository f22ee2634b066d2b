"""Losses of task heads in parts, and batches of labelled sequences for them.

    sequences, tokens, spans   sum_i w_i l_i / N: l_i as transformers computes them (task_outputs.py), w_i the weight
                               of the addend in the mean over the whole batch, N the global sum of weights
    double heads               a (language loss, over its own N) + b (sum over questions of -log p(right choice) / Q)

So parts of a batch, wherever they are computed, only have to be added. Metrics: `accuracy` where labels exclude each
other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from cluster.training.step.losses import LossOptions, LossTerms
from cluster.training.step.train_batch import TaskTargets, TrainBatch
from cluster.training.train_calls import TrainSequence
from parallel import exact
from parallel.attention.forward_pass import Pass
from parallel.errors import RequestError
from parallel.vocabulary.cross_entropy import vocab_token_losses
from tp_decoders.model.decoder import Decoder
from tp_decoders.model.task_config import CHOICES, SPANS, TOKENS, TaskConfig
from tp_decoders.tasks.task_outputs import IGNORED, item_losses, item_weights, task_config, task_outputs


def task_terms(model: Decoder, part: TrainBatch, now: Pass, options: LossOptions) -> tuple[LossTerms, Tensor]:
    """A part's share of the loss, and the log-probabilities of its tokens, 0 where no language is learned."""
    task, targets = task_config(model), part.task
    if targets is None:
        raise RequestError(f"a batch without labels for {task.name}; give them with the sequences")
    outputs = task_outputs(model, part.token_ids, now, targets.marks)
    if outputs.choices is not None:
        return _double(model, part, targets, (outputs.logits, outputs.choices), options)
    items = item_losses(task, outputs.logits, targets.labels, part.lengths)
    terms = (items * targets.weights).flatten() / targets.normaliser
    return LossTerms(terms, _accuracy(task, outputs.logits.detach(), targets)), torch.zeros_like(part.weights)


def _double(
    model: Decoder, part: TrainBatch, targets: TaskTargets, logits: tuple[Tensor, Tensor], options: LossOptions
) -> tuple[LossTerms, Tensor]:
    language, choices = logits
    if choices.shape[1] != 1:
        raise RequestError("double heads without a projection to labels have no choices to learn from")
    losses = vocab_token_losses(language, part.targets, model.head.shards, model.group)
    kept = torch.where(part.targets == IGNORED, 0.0, part.weights)
    spoken = losses * kept * (options.language_weight / part.normaliser)
    rows = choices.view(-1, targets.num_choices)
    right = targets.labels.view(-1, targets.num_choices).argmax(1)
    chosen = functional.cross_entropy(rows, right, reduction="none") * (options.choice_weight / targets.normaliser)
    hits = exact.ordered_sum((rows.detach().argmax(1) == right).float()) / targets.normaliser
    return LossTerms(torch.cat([spoken, chosen]), {"accuracy": hits}), -losses.detach()


def _accuracy(task: TaskConfig, logits: Tensor, targets: TaskTargets) -> Mapping[str, Tensor]:
    if targets.labels.is_floating_point() or task.name == SPANS:
        return {}
    hits = (logits.argmax(1) == targets.labels).float() * targets.weights
    return {"accuracy": exact.ordered_sum(hits) / targets.normaliser}


def task_targets(
    sequences: Sequence[TrainSequence],
    task: TaskConfig,
    normaliser: float | None,
    options: LossOptions,
    device: torch.device | str,
) -> TaskTargets:
    """The labels of a call's sequences; `normaliser` None: of this batch alone."""
    if task.name == CHOICES:
        return _choice_targets(sequences, options, device)
    lengths = [len(sequence.token_ids) for sequence in sequences]
    labels = _labels(sequences, task).to(device)
    weights = item_weights(task, labels, lengths)
    given = [sequence.loss_weights for sequence in sequences]
    if any(given):
        factors = torch.tensor([w for own in given for w in own], dtype=torch.float32, device=device)
        weights = weights * (factors[:, None] if task.name == SPANS else factors)
    total = float(exact.ordered_sum(weights)) if normaliser is None else normaliser
    return TaskTargets(labels=labels, weights=weights, normaliser=total, per_token=task.name == TOKENS)


def class_targets(labels_S: Tensor, normaliser: float) -> TaskTargets:
    """Of whole texts with a class each."""
    return TaskTargets(labels=labels_S, weights=torch.ones_like(labels_S, dtype=torch.float32), normaliser=normaliser)


def _labels(sequences: Sequence[TrainSequence], task: TaskConfig) -> Tensor:
    if any(sequence.values for sequence in sequences):
        return torch.tensor([sequence.values for sequence in sequences], dtype=torch.float32)
    if task.name == SPANS:
        return torch.tensor([sequence.labels for sequence in sequences])
    return torch.tensor([label for sequence in sequences for label in sequence.labels])


def _choice_targets(
    sequences: Sequence[TrainSequence], options: LossOptions, device: torch.device | str
) -> TaskTargets:
    size = int(options.num_choices) or len(sequences)
    marks = [len(s.token_ids) - 1 if s.mark is None else s.mark for s in sequences]
    return TaskTargets(
        labels=torch.tensor([int(sequence.chosen) for sequence in sequences], device=device),
        weights=torch.ones(len(sequences), device=device),
        normaliser=options.questions or len(sequences) / size,
        num_choices=size,
        marks=torch.tensor(marks, device=device),
    )

"""A training call's sequences as the trainer's batch, and log-probabilities back by sequence."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cluster.training.step.losses import LossOptions
from cluster.training.step.task_losses import task_targets
from cluster.training.step.train_batch import TrainBatch
from cluster.training.step.trainer import PassResult
from cluster.training.train_calls import CROSS_ENTROPY, DPO, TASK, TrainCall, TrainSequence
from parallel.errors import RequestError
from parallel.vocabulary.cross_entropy import IGNORE_INDEX
from tp_decoders.model.task_config import TaskConfig


def batch_of(
    call: TrainCall,
    device: torch.device | str,
    task: TaskConfig | None = None,
    options: LossOptions = LossOptions(),
) -> TrainBatch:
    """The call's sequences, packed: each position holds what concerns the token it predicts, or the task's labels."""
    if call.loss == TASK:
        return _task_batch(call, device, task, options)
    tokens: list[int] = []
    targets: list[int] = []
    for sequence in call.sequences:
        tokens += sequence.token_ids
        targets += [*sequence.targets, IGNORE_INDEX]
    weights = _flat(call.sequences, "loss_weights", device)
    assert weights is not None, "weights have a default"
    pairs = len(call.sequences) / 2
    usual = pairs if call.loss == DPO else sum(w for s in call.sequences for w in s.weights)
    return TrainBatch(
        token_ids=torch.tensor(tokens, dtype=torch.long, device=device),
        targets=torch.tensor(targets, dtype=torch.long, device=device),
        weights=weights,
        lengths=tuple(len(sequence.token_ids) for sequence in call.sequences),
        normaliser=usual if call.normaliser is None else call.normaliser,
        old_logprobs=_flat(call.sequences, "old_logprobs", device),
        advantages=_flat(call.sequences, "advantages", device),
        reference_logprobs=_flat(call.sequences, "reference_logprobs", device),
    )


def _task_batch(
    call: TrainCall, device: torch.device | str, task: TaskConfig | None, options: LossOptions
) -> TrainBatch:
    if task is None:
        raise RequestError("the loss 'task' on a language model; load it with task=... to train a head")
    targets = task_targets(call.sequences, task, call.normaliser, options, device)
    if task.has_vocabulary:  # both heads learn
        return replace(batch_of(replace(call, loss=CROSS_ENTROPY), device), task=targets)
    tokens = torch.tensor([token for s in call.sequences for token in s.token_ids], dtype=torch.long, device=device)
    return TrainBatch(
        token_ids=tokens,
        targets=torch.full_like(tokens, IGNORE_INDEX),
        weights=torch.zeros(len(tokens), device=device),
        lengths=tuple(len(sequence.token_ids) for sequence in call.sequences),
        normaliser=targets.normaliser,
        task=targets,
    )


def _flat(sequences: tuple[TrainSequence, ...], name: str, device: torch.device | str) -> Tensor | None:
    """The numbers of all sequences, 0 at each one's last position; None where they were not given."""
    values: list[float] = []
    for sequence in sequences:
        own = sequence.weights if name == "loss_weights" else getattr(sequence, name)
        if not own:
            return None
        values += [*own, 0.0]
    return torch.tensor(values, dtype=torch.float32, device=device)


def by_sequence(result: PassResult, sequences: tuple[TrainSequence, ...]) -> tuple[tuple[float, ...], ...]:
    parts = result.logprobs.cpu().split([len(sequence.token_ids) for sequence in sequences])
    return tuple(tuple(part[:-1].tolist()) for part in parts)

"""What a training call's labels may be, by the head that learns from them: every broken rule, named by its field.

The rules are those of the reference's losses (tp_decoders.tasks.task_outputs); numbers are checked here, so that no
rank meets a label that its loss has no place for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from cluster.engine.request import ModelLimits
from cluster.training.train_calls import (
    CROSS_ENTROPY,
    DPO,
    IGNORED_LABEL,
    IMPORTANCE_SAMPLING,
    PPO,
    TASK,
    TrainCall,
    TrainSequence,
)
from tp_decoders.model.task_config import (
    CHOICES,
    MULTI_LABEL,
    REGRESSION,
    SEQUENCES,
    SINGLE_LABEL,
    SPANS,
    TOKENS,
    TaskConfig,
)

Broken = tuple[str, str]
LANGUAGE = sorted((CROSS_ENTROPY, DPO, IMPORTANCE_SAMPLING, PPO))


def known_losses(task: TaskConfig | None) -> list[str]:
    """Which losses a model with this head has."""
    if task is None:
        return LANGUAGE
    return [*LANGUAGE, TASK] if task.has_vocabulary else [TASK]


def task_violations(call: TrainCall, task: TaskConfig, limits: ModelLimits) -> Iterator[Broken]:
    """Of a call with the head's own loss."""
    for index, sequence in enumerate(call.sequences):
        for field, rule in _sequence(sequence, task, limits):
            yield f"sequences[{index}].{field}", rule
    if task.name == CHOICES:
        yield from _questions(call)
    kinds = {bool(sequence.values) for sequence in call.sequences}
    if len(kinds) > 1:
        yield "sequences", "some have values and some labels; give all of them alike"
    weighted = {bool(sequence.loss_weights) for sequence in call.sequences}
    if len(weighted) > 1:
        yield "sequences", "some have loss_weights and some have none; give all of them alike"
    if call.sequences and not any(_learns(sequence, task) for sequence in call.sequences):
        yield "sequences", "nothing would be learned: every label is -100, or every span or weight is nothing"


def _sequence(sequence: TrainSequence, task: TaskConfig, limits: ModelLimits) -> Iterator[Broken]:
    length = len(sequence.token_ids)
    least = 2 if task.name == CHOICES else 1
    if not least <= length <= limits.max_context:
        yield "token_ids", f"{length} tokens; give {least} to {limits.max_context}"
        return
    bad = next((i for i, token in enumerate(sequence.token_ids) if not 0 <= token < limits.vocab_size), None)
    if bad is not None:
        yield f"token_ids[{bad}]", f"{sequence.token_ids[bad]} is not a token; ids are 0 to {limits.vocab_size - 1}"
    yield from _weights(sequence, task)
    if task.name == CHOICES:
        yield from _choice(sequence, limits)
    elif task.name == SEQUENCES:
        yield from _classes(sequence, task)
    elif task.name in (TOKENS, SPANS):
        yield from _places(sequence, task)


def _weights(sequence: TrainSequence, task: TaskConfig) -> Iterator[Broken]:
    length = len(sequence.token_ids)
    wanted = {TOKENS: length, CHOICES: length - 1}.get(task.name, 1)
    if sequence.loss_weights and len(sequence.loss_weights) != wanted:
        yield "loss_weights", f"{len(sequence.loss_weights)} numbers; give {wanted}, or none"
    if not all(math.isfinite(w) and w >= 0 for w in sequence.loss_weights):
        yield "loss_weights", "numbers must be finite and at least 0"


def _classes(sequence: TrainSequence, task: TaskConfig) -> Iterator[Broken]:
    problem = task.problem or (REGRESSION if task.num_labels == 1 else None)
    if sequence.values and sequence.labels:
        yield "values", "given beside labels; give one of them"
    elif problem == SINGLE_LABEL or (problem is None and not sequence.values):
        yield from _ids(sequence, task, 1)
        if sequence.values:
            yield "values", "this head learns one class of each sequence; give it as labels"
    elif len(sequence.values) != task.num_labels or not all(map(math.isfinite, sequence.values)):
        yield "values", f"{list(sequence.values)[:8]}; give {task.num_labels} finite numbers, one per label"
    elif (problem or MULTI_LABEL) == MULTI_LABEL and not all(0.0 <= value <= 1.0 for value in sequence.values):
        yield "values", f"{list(sequence.values)[:8]}; a multi-label head learns numbers from 0 to 1"


def _places(sequence: TrainSequence, task: TaskConfig) -> Iterator[Broken]:
    if task.name == TOKENS:
        yield from _ids(sequence, task, len(sequence.token_ids))
    elif len(sequence.labels) != 2:
        yield "labels", f"{len(sequence.labels)} numbers; give 2, the first and the last token of the answer"


def _ids(sequence: TrainSequence, task: TaskConfig, count: int) -> Iterator[Broken]:
    if len(sequence.labels) != count:
        yield "labels", f"{len(sequence.labels)} labels; give {count}"
    for i, label in enumerate(sequence.labels):
        if label != IGNORED_LABEL and not 0 <= label < task.num_labels:
            yield f"labels[{i}]", f"{label} is neither a class (0 to {task.num_labels - 1}) nor {IGNORED_LABEL}"
            return


def _choice(sequence: TrainSequence, limits: ModelLimits) -> Iterator[Broken]:
    length, labels = len(sequence.token_ids), sequence.labels
    if labels and len(labels) != length:
        yield "labels", f"{len(labels)} labels for {length} tokens; give {length}, one per token as in transformers"
    if any(label != IGNORED_LABEL and not 0 <= label < limits.vocab_size for label in labels):
        yield "labels", f"labels are tokens (0 to {limits.vocab_size - 1}) or {IGNORED_LABEL}"
    if sequence.mark is not None and sequence.mark >= length:
        yield "mark", f"{sequence.mark} is outside a sequence of {length} tokens"


def _questions(call: TrainCall) -> Iterator[Broken]:
    count = len(call.sequences)
    size = int(call.loss_options.get("num_choices", 0)) or count
    if not count or count % size:
        yield "loss_options.num_choices", f"{size} does not divide the {count} sequences into questions"
        return
    for first in range(0, count, size):
        right = sum(sequence.chosen for sequence in call.sequences[first : first + size])
        if right != 1:
            yield "sequences", f"{right} of sequences {first} to {first + size - 1} are chosen; one of a question is"
            return


def _learns(sequence: TrainSequence, task: TaskConfig) -> bool:
    if sequence.loss_weights and not any(sequence.loss_weights):
        return False
    if task.name == SPANS:
        return any(place < len(sequence.token_ids) for place in sequence.labels)
    if task.name == CHOICES or sequence.values:
        return True
    return any(label != IGNORED_LABEL for label in sequence.labels)

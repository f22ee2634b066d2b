"""Which fields of a training call its loss reads: one that it does not read is refused by name, never ignored.

A new field of the protocol belongs into one of these tables; tests hold them against the messages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cluster.training.train_calls import CROSS_ENTROPY, DPO, IMPORTANCE_SAMPLING, PPO, TASK, TrainCall, TrainSequence
from tp_decoders.model.task_config import CHOICES, SEQUENCES, SPANS, TOKENS, TaskConfig

ALWAYS = frozenset({"token_ids", "loss_weights", "labels"})
OF_SEQUENCES: Mapping[str, frozenset[str]] = {
    CROSS_ENTROPY: ALWAYS,
    IMPORTANCE_SAMPLING: ALWAYS | {"old_logprobs", "advantages"},
    PPO: ALWAYS | {"old_logprobs", "advantages"},
    DPO: ALWAYS | {"reference_logprobs"},
}
"""Fields of TrainSequence, by loss."""
OF_HEADS: Mapping[str, frozenset[str]] = {
    SEQUENCES: ALWAYS | {"values"},
    TOKENS: ALWAYS,
    SPANS: ALWAYS,
    CHOICES: ALWAYS | {"chosen"},
}
"""The same with the loss `task`, by the model's head; `mark` where the head looks at a place of its own choice."""
OPTIONS: Mapping[str, frozenset[str]] = {
    CROSS_ENTROPY: frozenset(),
    IMPORTANCE_SAMPLING: frozenset(),
    PPO: frozenset({"clip_low", "clip_high"}),
    DPO: frozenset({"beta", "label_smoothing"}),
    TASK: frozenset(),
}
"""Fields of LossOptions, by loss."""
CHOICE_OPTIONS = frozenset({"num_choices", "questions", "language_weight", "choice_weight"})
"""Those of double heads, with the loss `task`."""


def unread(call: TrainCall, task: TaskConfig | None) -> Iterator[tuple[str, str]]:
    """The fields that are given and not read, of a call whose loss is known."""
    reads, options = sequence_fields(call.loss, task), option_fields(call.loss, task)
    what = f"the loss {call.loss!r}" + (f" of {task.name}" if call.loss == TASK and task is not None else "")
    for name in sorted(call.loss_options.keys() - options):
        yield f"loss_options.{name}", f"not read by {what}{_instead(options)}; leave it out"
    for index, sequence in enumerate(call.sequences):
        for name in given(sequence) - reads:
            yield f"sequences[{index}].{name}", f"not read by {what}{_instead(reads)}; leave it out"


def sequence_fields(loss: str, task: TaskConfig | None) -> frozenset[str]:
    if loss != TASK or task is None:
        return OF_SEQUENCES[loss]
    marked = task.name == CHOICES and task.summary is not None and task.summary.kind == "cls_index"
    return OF_HEADS[task.name] | {"mark"} if marked else OF_HEADS[task.name]


def option_fields(loss: str, task: TaskConfig | None) -> frozenset[str]:
    return CHOICE_OPTIONS if loss == TASK and task is not None and task.name == CHOICES else OPTIONS[loss]


def given(sequence: TrainSequence) -> set[str]:
    """The fields that say something."""
    fields = {name for name, value in vars(sequence).items() if value not in ((), False, None)}
    return fields | ({"mark"} if sequence.mark is not None else set())  # 0 equals False


def _instead(reads: frozenset[str]) -> str:
    return f", which reads {', '.join(sorted(reads))}" if reads else ""

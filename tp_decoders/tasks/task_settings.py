"""What a model is for besides continuing text: which head it ends in, its labels, and how these are learned.

`task_from_hf` reads it from config.json with the defaults of transformers (id2label, problem_type, classifier_dropout,
GPT-2's summary_* options); `with_task` gives a decoder's config its task, and config.json the architecture's name.
Knows no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from parallel.errors import ConfigError
from parallel.matmul.activation import check_activation
from tp_decoders.files.json_fields import Fields, shown
from tp_decoders.model.config import DecoderConfig, probability
from tp_decoders.model.task_config import (
    CAUSAL,
    CHOICES,
    PROBLEMS,
    SEQUENCES,
    SPANS,
    TASKS,
    TOKENS,
    SummaryConfig,
    TaskConfig,
)
from tp_decoders.registry import FAMILIES, family_of

MOST_LABELS = 100_000
SUMMARIES = ("last", "first", "mean", "cls_index")
ENDINGS = {
    SEQUENCES: "ForSequenceClassification",
    TOKENS: "ForTokenClassification",
    SPANS: "ForQuestionAnswering",
    CHOICES: "DoubleHeadsModel",
}
"""Of transformers' names of classes; those of GPT-NeoX-Japanese and of GPT-BigCode's spans exist here only."""


def check_task(name: str, model_type: str | None = None) -> str:
    """The name itself, or an error that says what there is, for a family if one is given."""
    if name not in TASKS:
        raise ConfigError(f"task {name!r} is unknown; choose one of {', '.join(TASKS)}")
    if model_type is not None and name not in (tasks := family_of(model_type).tasks):
        have = ", ".join(other for other, family in FAMILIES.items() if name in family.tasks)
        raise ConfigError(
            f"task {name!r} of a {model_type} is not supported, only of {have}; choose one of {', '.join(tasks)}"
        )
    return name


def task_from_hf(
    name: str, hf: Mapping[str, Any], model_type: str, labels: Sequence[str] | int | None, problem: str | None
) -> TaskConfig:
    """From config.json; `labels` (names, or how many) and `problem` given by the caller win."""
    fields = Fields(hf, f"config.json ({model_type})")
    names = label_names(fields) if labels is None else _named(labels)
    problem = problem or fields.take("problem_type", None)
    if problem is not None and problem not in PROBLEMS:
        known = ", ".join(PROBLEMS)
        raise ConfigError(f"problem_type {shown(problem)} is unknown; choose one of {known}, or leave it out")
    return TaskConfig(
        name=name,
        layer=family_of(model_type).task_layers.get(name),
        labels={SPANS: ("start", "end"), CHOICES: ("LABEL_0",)}.get(name, names),
        problem=problem if name == SEQUENCES else None,
        pad_token_id=fields.take("pad_token_id", None),
        dropout=_classifier_dropout(fields) if name == TOKENS else 0.0,
        summary=_summary(fields) if name == CHOICES else None,
    )


def with_task(
    config: DecoderConfig, name: str, labels: Sequence[str] | int | None = None, problem: str | None = None
) -> DecoderConfig:
    """The same decoder ending in another head; what `save` then writes says so."""
    if check_task(name, config.model_type) == CAUSAL:
        return config
    task = task_from_hf(name, config.hf, config.model_type, labels, problem)
    summary = task.summary
    head = max(task.dropout, summary.first_dropout if summary else 0.0, summary.last_dropout if summary else 0.0)
    begins = family_of(config.model_type).types[config.model_type]
    hf: dict[str, Any] = {**config.hf, "architectures": [begins + ENDINGS[name]]}
    hf.pop("num_labels", None)
    if name in (SEQUENCES, TOKENS, CHOICES):
        hf |= {"id2label": {str(i): label for i, label in enumerate(task.labels)}}
        hf |= {"label2id": {label: i for i, label in enumerate(task.labels)}}
    if name == SEQUENCES:
        hf |= {"problem_type": task.problem}
    return replace(config, task=task, hf=hf, dropout=replace(config.dropout, head=head))


def task_of(hf: Mapping[str, Any]) -> str:
    """The task that a checkpoint was made for, by its config.json's architectures."""
    named = hf.get("architectures") or [""]
    return next((task for task, ending in ENDINGS.items() if str(named[0]).endswith(ending)), CAUSAL)


def label_names(fields: Fields) -> tuple[str, ...]:
    """In the order of their ids, which run from 0; two unless said otherwise."""
    count, given = fields.optional_integer("num_labels", most=MOST_LABELS), fields.take("id2label", None)
    if given is None:
        return _named(2 if count is None else count)
    try:
        names = {int(key): str(label) for key, label in given.items()}
    except (AttributeError, TypeError, ValueError):
        names = {}
    if sorted(names) != list(range(len(names))) or not names:
        raise ConfigError(f"{fields.where}: id2label is {shown(given)}; give an object of names by ids 0, 1, 2, ...")
    if count not in (None, len(names)):
        raise ConfigError(f"{fields.where}: num_labels is {count}, but id2label has {len(names)}; keep one of them")
    return tuple(names[i] for i in range(len(names)))


def _named(labels: Sequence[str] | int) -> tuple[str, ...]:
    names = tuple(f"LABEL_{i}" for i in range(labels)) if isinstance(labels, int) else tuple(labels)
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"labels {names} should be different names, at least one")
    return names


def _classifier_dropout(fields: Fields) -> float:
    """The reference's choice: its own key, else the hidden states', else 0.1."""
    for key in ("classifier_dropout", "hidden_dropout"):
        if fields.take(key, None) is not None:
            return probability(fields, key, 0.0)
    return 0.1


def _summary(fields: Fields) -> SummaryConfig:
    activation = fields.take("summary_activation", None)
    return SummaryConfig(
        kind=fields.choice("summary_type", "cls_index", SUMMARIES),
        projection=bool(fields.take("summary_use_proj", True)),
        activation=check_activation(str(activation)[:60]) if activation else None,
        to_labels=bool(fields.take("summary_proj_to_labels", True)),
        first_dropout=probability(fields, "summary_first_dropout", 0.1),
        last_dropout=probability(fields, "summary_last_dropout", 0.0),
    )

"""Calls whose prompts are read, not continued: classification by a task's head, and embeddings.

Before the engine: which rows are wanted, and what of a prompt matters (a causal model's row does not see what follows
it, so the prompt is cut there). After it: logits to probabilities, labels and answers. Plain numbers, no tensor.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.engine.request import ModelLimits, Pooling
from cluster.request_errors import InvalidRequest, Violation, WrongTask
from tp_decoders.model.task_config import CHOICES, MULTI_LABEL, REGRESSION, SEQUENCES, SPANS, TOKENS, TaskConfig

Row = tuple[float, ...]
MAX_SPANS = 100
SPANS_AT_ONCE = 1 << 20
"""Answers that are compared in one piece."""
MAX_ANSWER_TOKENS = 30


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a call wants of its prompts. `pooling` None: what the model's task needs (classification)."""

    pooling: Pooling | None = None
    num_choices: int = 0  # sequences that are choices of one question; 0: all of the call
    marks: tuple[int, ...] = ()  # the place in each sequence that stands for it
    num_spans: int = 1
    max_answer_tokens: int = MAX_ANSWER_TOKENS


def check_task(reading: Reading | None, task: TaskConfig | None) -> None:
    """Raises WrongTask where the model has not the head that the call needs."""
    if reading is None and task is not None and not task.has_vocabulary:
        raise WrongTask(f"this server was started for {task.name}; it has no vocabulary head: call Classify or Embed")
    if reading is not None and reading.pooling is None and task is None:
        raise WrongTask("this server has a language model without another head; start it with --task TASK to classify")


def problems(reading: Reading, task: TaskConfig | None, count: int) -> list[Violation]:
    """Every rule that the call's own fields break, for `count` sequences."""
    found = []
    name = task.name if task is not None and reading.pooling is None else ""
    if (reading.num_choices or reading.marks) and name != CHOICES:
        found.append(Violation("num_choices", f"and marks belong to {CHOICES}; leave them out"))
    if reading.num_choices < 0 or (reading.num_choices and count % reading.num_choices):
        found.append(Violation("num_choices", f"{reading.num_choices} does not divide the {count} sequences"))
    if reading.marks and len(reading.marks) != count:
        found.append(Violation("marks", f"{len(reading.marks)} for {count} sequences; give one each, or none"))
    if not 1 <= reading.num_spans <= MAX_SPANS:
        found.append(Violation("num_spans", f"{reading.num_spans} is not allowed; give 1 to {MAX_SPANS}"))
    if reading.max_answer_tokens < 1:
        found.append(Violation("max_answer_tokens", "0 is not allowed; give at least 1"))
    return found


def pooling_of(reading: Reading, limits: ModelLimits) -> Pooling:
    """Which rows the engine is asked for."""
    if reading.pooling is not None:
        return reading.pooling
    task = limits.task
    assert task is not None, "checked before"
    if task.name in (TOKENS, SPANS):
        return Pooling(rows="all")
    return Pooling(rows="mean" if task.summary is not None and task.summary.kind == "mean" else "last")


def matters(ids: tuple[int, ...], reading: Reading, task: TaskConfig | None, index: int) -> tuple[int, ...]:
    """The tokens up to the row that is wanted; the rest cannot change it."""
    if reading.pooling is not None or task is None:
        return ids
    if task.name == SEQUENCES and task.pad_token_id is not None:
        kept = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] != task.pad_token_id), 0)
        return ids[: kept + 1]
    if task.summary is not None and task.summary.kind == "first":
        return ids[:1]
    if task.summary is not None and task.summary.kind == "cls_index" and reading.marks:
        mark = reading.marks[index]
        if not 0 <= mark < len(ids):
            rule = f"{mark} is outside a sequence of {len(ids)} tokens; give a place from 0 to {len(ids) - 1}"
            raise InvalidRequest.of([Violation(f"marks[{index}]", rule)])
        return ids[: mark + 1]
    return ids


# ------------------------------------------------------------------------------------------------------------ answers


@dataclass(frozen=True)
class Scores:
    """A row of logits and what it says: no probabilities of a regression, no single label of a multi-label head."""

    logits: Row
    probabilities: Row = ()
    label_id: int | None = None


@dataclass(frozen=True)
class Span:
    """Tokens start .. end, both included; `score` is the product of their probabilities as start and as end."""

    start: int
    end: int
    score: float


def scores_of(logits: Row, task: TaskConfig) -> Scores:
    """A sequence's or token's labels."""
    problem = task.problem if task.name == SEQUENCES else None
    if problem == REGRESSION or (problem is None and len(logits) == 1):
        return Scores(logits)
    if problem == MULTI_LABEL:
        return Scores(logits, tuple(_sigmoid(x) for x in logits))
    found = softmax(logits)
    return Scores(logits, found, found.index(max(found)))


def softmax(logits: Sequence[float]) -> Row:
    most = max(logits)
    parts = [math.exp(x - most) for x in logits]
    total = math.fsum(parts)
    return tuple(part / total for part in parts)


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def best_spans(rows: Sequence[Row], count: int, max_tokens: int) -> list[Span]:
    """The likeliest answers, best first; of equals the earliest."""
    starts = np.array(softmax([row[0] for row in rows]))
    ends = np.array(softmax([row[1] for row in rows]))
    width, length = min(max_tokens, len(rows)), len(rows)
    ends = np.concatenate([ends, np.full(width - 1, -1.0)])  # no answer goes beyond the last token
    best: list[tuple[float, int, int]] = []
    for first in range(0, length, step := max(1, SPANS_AT_ONCE // width)):
        some = starts[first : first + step]
        windows = np.lib.stride_tricks.sliding_window_view(ends, width)[first : first + len(some)]
        scores = np.where(windows < 0, -1.0, some[:, None] * windows).ravel()
        least = np.partition(scores, -count)[-count] if count < scores.size else -1.0
        places = np.flatnonzero(scores >= max(least, 0.0))
        places = places[np.argsort(-scores[places], kind="stable")[:count]]
        found = ((-float(scores[p]), first + int(p) // width, first + int(p) // width + int(p) % width) for p in places)
        best = heapq.nsmallest(count, [*best, *found])
    return [Span(i, j, -score) for score, i, j in best]

"""What a model is for besides continuing text, as values: the tasks' names, and the head that a model ends in.

Reading them from config.json is tasks/task_settings'.
"""

from __future__ import annotations

from dataclasses import dataclass

CAUSAL, SEQUENCES, TOKENS, SPANS, CHOICES = TASKS = (
    "causal-lm",
    "sequence-classification",
    "token-classification",
    "question-answering",
    "double-heads",
)
REGRESSION, SINGLE_LABEL, MULTI_LABEL = PROBLEMS = (
    "regression",
    "single_label_classification",
    "multi_label_classification",
)


@dataclass(frozen=True, kw_only=True)
class SummaryConfig:
    """How GPT-2's double heads make one vector of a sequence: which row, then projection, activation, dropouts."""

    kind: str = "cls_index"
    projection: bool = True
    activation: str | None = None
    to_labels: bool = True
    first_dropout: float = 0.1
    last_dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A head. `problem` None: decided by the labels, as transformers does. `dropout` is that before the classifier."""

    name: str
    layer: str | None = None  # transformers' name of the head's, where it is not the task's usual one
    labels: tuple[str, ...] = ()
    problem: str | None = None
    pad_token_id: int | None = None
    dropout: float = 0.0
    summary: SummaryConfig | None = None

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    @property
    def has_vocabulary(self) -> bool:
        """Whether the model keeps its language-modelling head."""
        return self.name == CHOICES

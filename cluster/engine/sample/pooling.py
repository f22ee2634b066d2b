"""Prompts that are read, not continued: hidden states or a task head's outputs of some of their rows.

A pooled request ends with the step that computes its last token; it shares steps, blocks and the budget with all
others. States and heads are replicated, so rank 0 computes the answers alone and the other ranks need not know. An
answer does not depend on how its prompt was cut into steps: rows are independent, a mean adds them one after another in
float64.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.engine.sequences.fault_isolation import each_alone
from cluster.engine.sequences.gathered_rows import Gathered
from cluster.engine.sequences.sequence import Sequence
from parallel.errors import ConfigError
from parallel.exact import ordered_sum
from tp_decoders.model.decoder import Decoder

Rows = tuple[tuple[float, ...], ...]
BROKEN = "the model's states or its head hold no finite numbers: its weights or activations overflowed or are damaged"


@dataclass(frozen=True, slots=True)
class PoolRun:
    """Rows of one step, [first, stop), that a sequence's answer is made of; `last`: it is complete with them."""

    sequence: Sequence
    first: int
    stop: int
    last: bool


def pool_run(seq: Sequence, start: int, stop: int, first_row: int) -> PoolRun | None:
    """The rows wanted of tokens [start, stop) of a sequence, which stand from `first_row` on in the step."""
    pooling = seq.answer.request.pooling
    assert pooling is not None, "asked of pooled sequences only"
    last = stop == len(seq.tokens)
    if start == 0:  # the first time, or computed again: for new weights, or after it was set aside
        seq.answer.gathered = Gathered()
    if pooling.rows == "last":
        seq.answer.gathered = Gathered()
        return PoolRun(seq, first_row + stop - start - 1, first_row + stop - start, True) if last else None
    return PoolRun(seq, first_row, first_row + stop - start, last)


class Pooler:
    """Makes answers of a step's hidden states, on rank 0."""

    def __init__(self, model: Decoder) -> None:
        self._model = model

    def answers(self, runs: list[PoolRun], x_TD: Tensor) -> list[Rows | str | None]:
        """Of each run: the answer, why there is none, or None while rows are missing."""
        return each_alone(lambda some: self._answers(some, x_TD), runs, str)

    def _answers(self, runs: Many[PoolRun], x_TD: Tensor) -> list[Rows | str | None]:
        rows = [row for run in runs for row in range(run.first, run.stop)]
        states_RD = self._model.final(x_TD, torch.tensor(rows, dtype=torch.long, device=x_TD.device))
        parts = states_RD.split([run.stop - run.first for run in runs])
        return [self._answer(run, part) for run, part in zip(runs, parts, strict=True)]

    def _answer(self, run: PoolRun, states_RD: Tensor) -> Rows | str | None:
        answer = run.sequence.answer
        pooling, gathered = answer.request.pooling, answer.gathered
        assert pooling is not None and gathered is not None, "made with the run"
        apart = pooling.rows != "mean" and pooling.head
        gathered.add(self._head(states_RD) if apart else states_RD, pooling)
        if not run.last:
            return None
        if gathered.total is not None:
            made = (gathered.total / len(run.sequence.tokens)).to(states_RD.dtype)[None]
            made = self._head(made) if pooling.head else made
        else:
            made = torch.cat(gathered.rows)
        made = unit(made.float()) if pooling.normalize else made.float()
        if not bool(made.isfinite().all()):
            return BROKEN
        return tuple(tuple(row) for row in made.tolist())

    def _head(self, states_RD: Tensor) -> Tensor:
        if self._model.task_head is None:
            raise ConfigError("a head's outputs were asked of a language model; load it with task=...")
        return self._model.task_head(states_RD)  # type: ignore[no-any-return]


def unit(x_RD: Tensor) -> Tensor:
    """Each row divided by its length; a row of zeros stays."""
    wide = x_RD.double()
    return (wide / ordered_sum(wide.square(), 1)[:, None].sqrt().clamp(min=1e-30)).float()

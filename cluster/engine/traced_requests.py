"""Requests whose steps are reported to whoever asked: their front-end makes a trace of them.

While there is none a step looks at one empty set. A report is an event without tokens that goes before the step's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container

from cluster.engine.request import Request, StepReport, TokenEvent
from cluster.engine.schedule.step_plan import StepPlan, StepResult


class Traced:
    """The ids of traced requests that may still be open."""

    def __init__(self) -> None:
        self._ids: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._ids)

    def add(self, request: Request) -> None:
        if request.traced:
            self._ids.add(request.request_id)

    def reports(
        self, plan: StepPlan, result: StepResult, seconds: float, still_open: Container[str]
    ) -> list[TokenEvent]:
        """What a step that took so long did for each of them."""
        tokens: Counter[str] = Counter()
        preempted: dict[str, int] = {}
        for seq, count in zip(plan.sequences, plan.query_lens, strict=True):
            if seq.request_id in self._ids:
                tokens[seq.request_id] += count
                preempted[seq.request_id] = seq.answer.preempted
        self._ids = {request_id for request_id in self._ids if request_id in still_open}
        return [
            TokenEvent(
                request_id=request_id,
                step=StepReport(
                    step=plan.number, seconds=seconds, forward_seconds=result.forward_seconds,
                    sample_seconds=result.sample_seconds, tokens=count, batch_tokens=sum(plan.query_lens),
                    batch_sequences=len(plan.sequences), preempted=preempted[request_id],
                ),
            )
            for request_id, count in tokens.items()
        ]  # fmt: skip

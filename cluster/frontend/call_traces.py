"""Traces of calls, seen from the front-end: which parts of a call are timed, and from where their times come.

Spans are OpenTelemetry's; launch.observe.otel makes the tracer that sends them. A call that is not sampled has no span,
and then nothing is done. Ranks export nothing: rank 0 reports the steps of a sampled request with its tokens, by
their length, and they end here when they arrive, so all times are of one clock. Names, counts and times, never text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Mapping
from contextvars import ContextVar
from functools import wraps
from types import MappingProxyType
from typing import Any, TypeVar

from opentelemetry import trace
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cluster.engine.request import Request, StepReport
from cluster.frontend.output.streams import Chunk
from cluster.training.train_calls import TrainAnswer, TrainCall

Value = str | int | float | bool
Values = Mapping[str, Value]
NO_VALUES: Values = MappingProxyType({})
HEADERS = TraceContextTextMapPropagator()
MAX_STEPS = 128
"""Steps of one prompt that become spans; the others are counted."""


class Span:
    """A part of a call. Times are of time.monotonic; `offset_ns`, one for a whole trace, makes wall clock of them."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span, offset_ns: int) -> None:
        self._tracer, self._span, self._offset_ns = tracer, span, offset_ns

    def child(self, name: str, began: float, values: Values = NO_VALUES) -> Span:
        context, start = trace.set_span_in_context(self._span), self._wall(began)
        span = self._tracer.start_span(name, context, attributes=values, start_time=start)
        return Span(self._tracer, span, self._offset_ns)

    def event(self, name: str, at: float, values: Values = NO_VALUES) -> None:
        self._span.add_event(name, values, self._wall(at))

    def end(self, at: float, values: Values = NO_VALUES, error: str = "") -> None:
        self._span.set_attributes(values)
        if error:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end(self._wall(at))

    def _wall(self, at: float) -> int:
        return self._offset_ns + int(at * 1e9)


def begin(tracer: trace.Tracer, name: str, headers: Mapping[str, str], values: Values = NO_VALUES) -> Span | None:
    """The span of a call with these headers (traceparent, tracestate); None: it is not sampled."""
    offset = time.time_ns() - int(time.monotonic() * 1e9)
    span = tracer.start_span(name, HEADERS.extract(headers), kind=SpanKind.SERVER, attributes=values)
    return Span(tracer, span, offset) if span.is_recording() else None


SPAN: ContextVar[Span | None] = ContextVar("span", default=None)
"""Of the call that is being answered in this context, if it is sampled."""
Answer = TypeVar("Answer")
Work = Callable[..., Coroutine[Any, Any, Answer]]


def timed(name: str) -> Callable[[Work[Answer]], Work[Answer]]:
    """Makes a span of each run of a function that is part of a call."""

    def wrap(function: Work[Answer]) -> Work[Answer]:
        @wraps(function)
        async def run(*args: Any, **kwargs: Any) -> Answer:
            if (parent := SPAN.get()) is None:
                return await function(*args, **kwargs)
            span, error = parent.child(name, time.monotonic()), ""
            try:
                return await function(*args, **kwargs)
            except BaseException as raised:
                error = type(raised).__name__
                raise
            finally:
                span.end(time.monotonic(), error=error)

        return run

    return wrap


class PromptTrace:
    """One prompt: in the queue, read, continued; with the engine's steps in them."""

    def __init__(self, call: Span, request: Request, index: int, now: float) -> None:
        values = {"prompt": index, "prompt_tokens": len(request.token_ids), "samples": request.sampling.num_samples}
        self._span = call.child("prompt", now, values)
        self._part, self._name, self._began = self._span.child("queue", now), "queue", now
        self._admitted = now
        self._steps = self._tokens = self._preempted = self._version = 0
        self.outcome = self.failed = ""
        """Why it ended: the reason of its last sample, or an error's name."""

    def placed(self, replica: int) -> None:
        """It was given to a replica's engine; a second time: after the first was lost."""
        self._span.event("placed", time.monotonic(), {"replica": replica})

    def step(self, report: StepReport, now: float) -> None:
        """A step of the engine that computed something of it has ended."""
        began = max(self._began, now - report.seconds)
        if self._name == "queue":
            self._turn("prefill", began)
        self._steps += 1
        if report.preempted != self._preempted:
            self._preempted = report.preempted
            self._span.event("preempted", began, {"times": report.preempted})
        if self._steps <= MAX_STEPS:
            self._part.child("engine.step", began, report.values()).end(now)

    def took(self, chunk: Chunk, now: float) -> None:
        """News on the way to the reader."""
        if chunk.token_ids and self._name != "decode":
            self._span.event("first_token", now, {"time_to_first_token": now - self._admitted})
            self._turn("decode", now)
        self._tokens += len(chunk.token_ids)
        if chunk.weight_version > self._version:
            self._version = chunk.weight_version
            self._span.event("weights", now, {"weight_version": chunk.weight_version})
        if chunk.finish_reason is not None:
            self.outcome = chunk.finish_reason.value

    def over(self, now: float) -> None:
        """Nothing of it is open any more."""
        self._part.end(now)
        values: dict[str, Value] = {
            "outcome": self.failed or self.outcome, "tokens": self._tokens, "steps": self._steps,
            "preemptions": self._preempted, "weight_version": self._version,
        }  # fmt: skip
        self._span.end(now, values, error=self.failed)

    def _turn(self, name: str, now: float) -> None:
        self._part.end(now)
        self._part, self._name, self._began = self._span.child(name, now), name, now


def trace_of(request: Request, index: int, now: float) -> PromptTrace | None:
    """Of a prompt of the call that is being answered."""
    call = SPAN.get()
    return None if call is None else PromptTrace(call, request, index, now)


def trained(
    function: Callable[[Any, TrainCall], Coroutine[Any, Any, TrainAnswer]],
) -> Callable[[Any, TrainCall], Coroutine[Any, Any, TrainAnswer]]:
    """Makes spans of what a training call waited for and did."""

    @wraps(function)
    async def run(self: Any, call: TrainCall) -> TrainAnswer:
        began = time.monotonic()
        answer = await function(self, call)
        if (span := SPAN.get()) is not None:
            _train_spans(span, call, answer, began, time.monotonic())
        return answer

    return run


def _train_spans(span: Span, call: TrainCall, answer: TrainAnswer, began: float, now: float) -> None:
    """The answer says how long its parts took; they ended just now, one after the other."""
    values: dict[str, Value] = {
        "step": answer.step, "weight_version": answer.weight_version, "replayed": answer.replayed,
        "sequences": len(call.sequences), "tokens": answer.tokens, "collective_seconds": answer.collective_seconds,
        "bytes": answer.size,
    }  # fmt: skip
    whole = span.child(f"training.{call.kind.value}", began, values)
    if not answer.replayed:
        applied = max(began, now - answer.optimizer_seconds)
        passed = max(began, applied - answer.forward_seconds)
        parts = (("wait", began, passed), ("forward_backward", passed, applied), ("optimizer", applied, now))
        for name, start, end in parts if call.kind.takes_sequences or call.kind.applies_step else ():
            if name == "wait" or end > start:
                whole.child(name, start).end(end)
    whole.end(now)

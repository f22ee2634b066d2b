"""Tracing over OpenTelemetry's SDK: the spans of cluster.frontend.call_traces as OpenTelemetry's own.

The one module that imports OpenTelemetry, and only launch.observe.trace_export imports it. No global provider is set:
other libraries of this process (Ray has spans of its own) neither see these spans nor add to them. Spans leave in the
background, at most 2048 wait; what a collector cannot take is dropped.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cluster.frontend.call_traces import NO_VALUES, Values
from parallel.errors import ConfigError

SERVICE = "tp-decoders"
DELAY_MS, SEND_MS, SEND_S = 1000, 5000, 5


class OtelSpan:
    """A span and the moment that its trace's clock began by: the difference of wall clock and time.monotonic."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span, offset_ns: int) -> None:
        self._tracer, self._span, self._offset_ns = tracer, span, offset_ns

    def child(self, name: str, began: float, values: Values = NO_VALUES) -> OtelSpan:
        context = trace.set_span_in_context(self._span)
        start = self._wall(began)
        span = self._tracer.start_span(name, context, attributes=dict(values), start_time=start)
        return OtelSpan(self._tracer, span, self._offset_ns)

    def event(self, name: str, at: float, values: Values = NO_VALUES) -> None:
        self._span.add_event(name, dict(values), self._wall(at))

    def end(self, at: float, values: Values = NO_VALUES, error: str = "") -> None:
        self._span.set_attributes(dict(values))
        if error:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end(self._wall(at))

    def _wall(self, at: float) -> int:
        return self._offset_ns + int(at * 1e9)


class OtelTracer:
    """Samples a share of the calls that come without a trace; of those with one, the caller has decided."""

    def __init__(self, exporter: SpanExporter, ratio: float) -> None:
        self._exporter = exporter
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(ratio)),
            resource=Resource.create({"service.name": SERVICE}),
            shutdown_on_exit=False,
        )
        processor = BatchSpanProcessor(exporter, schedule_delay_millis=DELAY_MS, export_timeout_millis=SEND_MS)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer(SERVICE)
        self._headers = TraceContextTextMapPropagator()

    def begin(self, name: str, headers: Mapping[str, str], values: Values = NO_VALUES) -> OtelSpan | None:
        offset = time.time_ns() - int(time.monotonic() * 1e9)
        caller = self._headers.extract(headers)
        span = self._tracer.start_span(name, caller, kind=SpanKind.SERVER, attributes=dict(values))
        return OtelSpan(self._tracer, span, offset) if span.is_recording() else None

    def close(self) -> None:
        """Sends what waits, for a few seconds at most: a collector that is not there holds up no end."""
        sending = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        sending.start()
        sending.join(SEND_S)
        if sending.is_alive():
            self._exporter.shutdown()  # ends its attempts
            sending.join(SEND_S)


class Lines(SpanExporter):
    """One JSON object per span, written as they end."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._file.writelines(json.dumps(json.loads(span.to_json())) + "\n" for span in spans)
        self._file.flush()
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self._file.close()


def open_file(path: str) -> IO[str]:
    """To be appended to, by several servers at once where they must."""
    try:
        return Path(path).expanduser().open("a", encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"observe.traces is {path!r}, a file that cannot be written: {reason}; name another, or an address that "
            "begins with http:// or https://"
        ) from error


def lines(path: str) -> SpanExporter:
    return Lines(open_file(path))


def collector(address: str) -> SpanExporter:
    """OTLP over gRPC: encrypted where the address begins with https://."""
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=address, insecure=address.startswith("http://"), timeout=SEND_S)

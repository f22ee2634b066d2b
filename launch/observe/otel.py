"""The tracer of OpenTelemetry's SDK that the spans of cluster.frontend.call_traces are made with, and where they go.

The one module that imports the SDK, and only launch.observe.trace_export imports it. No global provider is set:
other libraries of this process (Ray has spans of its own) neither see these spans nor add to them. Spans leave in the
background, at most 2048 wait; what a collector cannot take is dropped.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from parallel.errors import ConfigError

SERVICE = "tp-decoders"
DELAY_MS, SEND_MS, SEND_S = 1000, 5000, 5


class TraceExport:
    """A tracer whose spans are sent. It samples a share of the calls that come without a trace; of those with one, the
    caller has decided.
    """

    def __init__(self, exporter: SpanExporter, ratio: float) -> None:
        self._exporter = exporter
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(ratio)),
            resource=Resource.create({"service.name": SERVICE}),
            shutdown_on_exit=False,
        )
        processor = BatchSpanProcessor(exporter, schedule_delay_millis=DELAY_MS, export_timeout_millis=SEND_MS)
        self._provider.add_span_processor(processor)
        self.tracer = self._provider.get_tracer(SERVICE)

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

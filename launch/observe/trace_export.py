"""Where traces go: to a collector (OTLP over gRPC), or as lines of JSON into a file, for looking without one.

Off unless `observe.traces` says where; the packages for it are then imported, and not before.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from launch.observe.observe_config import ObserveConfig
from parallel.errors import ConfigError

if TYPE_CHECKING:
    from launch.observe.otel import TraceExport

SCHEMES = ("http://", "https://")
SDK, EXPORTER = "opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.grpc"


def is_collector(target: str) -> bool:
    """An address, not a file's name."""
    return target.startswith(SCHEMES)


def check_traces(config: ObserveConfig) -> None:
    """One sentence where traces are asked for and their packages are not there, or their file cannot be written."""
    if config.traces is None:
        return
    needed = [SDK, EXPORTER] if is_collector(config.traces) else [SDK]
    missing = [name for name in needed if not _there(name)]
    if missing:
        raise ConfigError(
            f"observe.traces is set, but {' and '.join(missing)} is not installed; pip install 'tp-decoders[otel]', or "
            "leave observe.traces out"
        )
    if not is_collector(config.traces):
        from launch.observe.otel import open_file

        open_file(config.traces).close()


def open_traces(config: ObserveConfig) -> TraceExport | None:
    """For settings that `check_traces` has passed. None: nothing is traced."""
    if config.traces is None:
        return None
    from launch.observe.otel import TraceExport, collector, lines

    exporter = collector(config.traces) if is_collector(config.traces) else lines(config.traces)
    return TraceExport(exporter, config.trace_ratio)


def _there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False

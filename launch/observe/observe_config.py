"""How a server is watched: where Prometheus finds its metrics, how often a canary is sent, where faults leave their
dumps, where traces go. Values only; launch.observe.prometheus_metrics, launch.observe.trace_export and
launch.serving.run_server act on them.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ObserveConfig:
    """Metrics are off unless a port is given, and then for this machine alone unless a host is."""

    metrics_host: str = "127.0.0.1"  # where they are given
    metrics_port: int | None = None  # of Prometheus metrics; null: none
    canary_every_s: float = 10.0  # between two-token requests of the server's own
    canary_timeout_s: float = 20.0  # what a canary may wait for, a long step included
    traces: str | None = None  # http://HOST:4317 (or https) of an OTLP collector, or a file for lines of JSON
    trace_ratio: float = 1.0  # of the calls whose caller has not decided, the share that is traced
    flight_dir: str | None = None  # None: a folder of the user's among the system's temporary files, on each node

    def __post_init__(self) -> None:
        if self.metrics_port is not None and not 0 <= self.metrics_port < 65536:
            raise ConfigError(f"observe.metrics_port is {self.metrics_port}; give 1 to 65535, or 0 for any free one")
        if not 0.0 < self.trace_ratio <= 1.0:
            raise ConfigError(
                f"observe.trace_ratio is {self.trace_ratio}; give a number above 0, at most 1, or no observe.traces"
            )
        for name in ("canary_every_s", "canary_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"observe.{name} is {getattr(self, name)!r}; give seconds above 0")

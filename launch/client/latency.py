"""From the times at which tokens arrived to the figures of a benchmark: percentiles, throughput, a table.

Arithmetic only; who measures what is in bench.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class StreamTimes:
    """One stream: when it was sent, and (time, tokens) of every chunk that arrived. error: it ended badly."""

    sent: float
    chunks: tuple[tuple[float, int], ...]
    prompt_tokens: int = 0
    error: str | None = None

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.chunks)

    @property
    def first_token(self) -> float:
        return self.chunks[0][0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds per token after the first chunk, once per token: tokens that arrive together share their gap."""
        gaps: list[float] = []
        for (before, _), (now, count) in zip(self.chunks, self.chunks[1:], strict=False):
            gaps += [(now - before) / count] * count if count else []
        return gaps


@dataclass(frozen=True)
class Percentiles:
    """Milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @staticmethod
    def of(seconds: Sequence[float]) -> Percentiles | None:
        if not seconds:
            return None
        ordered = sorted(second * 1e3 for second in seconds)
        return Percentiles(sum(ordered) / len(ordered), *(percentile(ordered, share) for share in (0.5, 0.9, 0.99)))


@dataclass(frozen=True)
class Summary:
    """A whole run."""

    streams: int
    failed: int
    seconds: float
    prompt_tokens: int
    new_tokens: int
    tokens_per_second: float
    first_token_ms: Percentiles | None
    inter_token_ms: Percentiles | None
    errors: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of sorted values, interpolated between neighbours."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarise(streams: Sequence[StreamTimes]) -> Summary:
    """The figures of all streams together; failed ones count as failed and are left out of the latencies."""
    good = [stream for stream in streams if stream.error is None and stream.chunks]
    ends = [stream.chunks[-1][0] for stream in good]
    seconds = max(ends) - min(stream.sent for stream in good) if good else 0.0
    tokens = sum(stream.tokens for stream in good)
    return Summary(
        streams=len(streams),
        failed=len(streams) - len(good),
        seconds=seconds,
        prompt_tokens=sum(stream.prompt_tokens for stream in good),
        new_tokens=tokens,
        tokens_per_second=tokens / seconds if seconds else 0.0,
        first_token_ms=Percentiles.of([stream.first_token for stream in good]),
        inter_token_ms=Percentiles.of([gap for stream in good for gap in stream.gaps]),
        errors=tuple(sorted({stream.error for stream in streams if stream.error})),
    )


def table(summary: Summary) -> str:
    """The summary for a terminal."""
    lines = [
        f"{summary.streams} streams, {summary.failed} failed, {summary.seconds:.2f} s",
        f"{summary.prompt_tokens} prompt tokens in, {summary.new_tokens} out, {summary.tokens_per_second:.1f} tokens/s",
        f"{'ms':<22}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}",
    ]
    for name, figures in (("time to first token", summary.first_token_ms), ("between tokens", summary.inter_token_ms)):
        if figures is not None:
            cells = (figures.mean, figures.p50, figures.p90, figures.p99)
            lines.append(f"{name:<22}" + "".join(f"{cell:>10.2f}" for cell in cells))
    return "\n".join(lines + [f"error: {error}" for error in summary.errors])

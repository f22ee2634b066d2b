"""The benchmark's arithmetic."""

from __future__ import annotations

import pytest

from launch.client.latency import Percentiles, StreamTimes, percentile, summarise, table


def test_percentiles_interpolate_between_neighbours() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert percentile([7.0], 0.99) == 7.0
    assert Percentiles.of([]) is None


def test_a_stream_gives_first_token_and_gaps_per_token() -> None:
    stream = StreamTimes(sent=10.0, chunks=((10.5, 1), (10.6, 1), (11.0, 4)))
    assert stream.first_token == 0.5
    assert stream.gaps == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.1])
    assert stream.tokens == 6


def test_a_summary_counts_failures_and_leaves_them_out_of_the_times() -> None:
    good = StreamTimes(sent=0.0, chunks=((1.0, 1), (2.0, 1)), prompt_tokens=5)
    late = StreamTimes(sent=1.0, chunks=((3.0, 1), (5.0, 1)), prompt_tokens=5)
    bad = StreamTimes(sent=0.0, chunks=((9.0, 1),), error="UNAVAILABLE: gone")
    summary = summarise([good, late, bad])
    assert (summary.streams, summary.failed, summary.new_tokens, summary.prompt_tokens) == (3, 1, 4, 10)
    assert summary.seconds == 5.0
    assert summary.tokens_per_second == 0.8
    assert summary.first_token_ms is not None and summary.first_token_ms.p50 == 1500.0
    assert "error: UNAVAILABLE: gone" in table(summary)
    assert "between tokens" in table(summary)


def test_a_run_in_which_everything_failed_still_has_a_table() -> None:
    assert "1 streams, 1 failed" in table(summarise([StreamTimes(0.0, (), error="no")]))

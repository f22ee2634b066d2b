"""The soak's judgement on made-up samples, the harness itself for a few seconds, and a real soak where it is asked for
(SOAK_MINUTES=5)."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from parallel.native.compiled import library
from tests.chaos.harness.mixed import CALLS, EXPECTED
from tests.chaos.harness.usage import Sample, slope, verdicts
from tests.chaos.soak import Soak, main, table, write

MINUTES = float(os.environ.get("SOAK_MINUTES", "0"))


def grown(name: str, mb_per_minute: float, handles_per_minute: float = 0.0, until: float = 600.0) -> list[Sample]:
    """A process with a warm-up of its own, noise, and a peak now and then."""
    rng = random.Random(name)
    samples = []
    for i in range(int(until / 5)):
        seconds = 5.0 * i
        memory = 400.0 + min(seconds, 200.0) * 0.5 + mb_per_minute * seconds / 60 + rng.uniform(-0.5, 0.5)
        peak = 80.0 if i % 17 == 0 else 0.0
        samples.append(Sample(seconds, name, 1, memory + peak, int(60 + handles_per_minute * seconds / 60) + i % 2))
    return samples


def test_what_grows_after_the_warm_up_is_found_and_what_is_flat_is_not_accused() -> None:
    samples = grown("flat", 0.0) + grown("leaks memory", 2.0) + grown("leaks handles", 0.0, 0.5)
    found = {verdict.name: verdict for verdict in verdicts(samples, 200.0, 600.0)}
    assert {name: verdict.flat for name, verdict in found.items()} == {
        "flat": True, "leaks memory": False, "leaks handles": False,
    }  # fmt: skip
    assert found["leaks memory"].mb_per_minute == pytest.approx(2.0, abs=0.2)
    assert "| leaks memory |" in table(list(found.values())).splitlines()[2], "the worst comes first"


def test_a_process_that_ended_meanwhile_is_not_judged() -> None:
    assert not verdicts(grown("short", 9.0, until=300.0), 200.0, 600.0)


def test_a_slope_is_not_moved_by_a_few_outliers() -> None:
    x = [float(i) for i in range(40)]
    y = [3.0 * value + (1000.0 if value % 9 == 0 else 0.0) for value in x]
    assert slope(x, y) == pytest.approx(3.0, abs=0.5)


@pytest.mark.ray
@pytest.mark.slow
def test_a_few_seconds_of_everything_end_as_they_should_and_leave_a_table_and_a_picture(tmp_path: Path) -> None:
    library.available()
    (tmp_path / "server").mkdir()
    soak = Soak(tmp_path / "server", 5.0, 0.5)
    soak.run()
    assert not soak.tally.wrong
    assert {kind for kind, _ in soak.tally.ends} >= set(CALLS) | {"training step"} >= set(EXPECTED)
    assert {"server", "rank 0", "rank 1", "raylet"} <= {sample.name for sample in soak.samples}
    write(soak, tmp_path)
    assert len((tmp_path / "soak.csv").read_text().splitlines()) == len(soak.samples) + 1
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(60 * MINUTES + 300)
@pytest.mark.skipif(not MINUTES, reason="asked for with SOAK_MINUTES=5")
def test_memory_and_handles_of_every_process_stay_flat(tmp_path: Path) -> None:
    assert main(["--minutes", str(MINUTES), "--out", str(tmp_path)]) == 0

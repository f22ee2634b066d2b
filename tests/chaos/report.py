"""What a run of faults showed: a table with the median and the longest time of each kind, in Markdown and JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.chaos.faults.kinds import SERVING, TRAINING
from tests.chaos.faults.strike import Record
from tests.chaos.harness.jobs import Lap
from tests.chaos.harness.load import Load

WRONGS = ("lost", "doubled", "changed", "no answer")


def rows(records: Sequence[Record]) -> str:
    """A row per kind: how many, then median and maximum of naming and healing, serving and training apart."""
    head = "| fault | how many | named | served again | trained again | wrong |"
    lines = [head, "| --- | --- | --- | --- | --- | --- |"]
    for kind in dict.fromkeys(sorted(record.kind for record in records)):
        own = [record for record in records if record.kind == kind]
        named = [seconds for record in own for seconds in record.named.values()]
        healed = {job: [r.healed[job] for r in own if job in r.healed] for job in (SERVING, TRAINING)}
        wrong = sum(len(record.violations) for record in own)
        times = [spread(named), spread(healed[SERVING]), spread(healed[TRAINING])]
        lines.append(f"| {kind} | {len(own)} | {' | '.join(times)} | {wrong} |")
    return "\n".join(lines)


def spread(seconds: Sequence[float]) -> str:
    """Median and maximum."""
    return f"{statistics.median(seconds):.1f} s, {max(seconds):.1f} s" if seconds else ""


def summary(records: Sequence[Record], load: Load, laps: Sequence[Lap], minutes: float) -> str:
    """What the streams and the laps of training came to."""
    kinds = {name: sum(f": {name}" in word for word in load.violations) for name in WRONGS}
    ends = ", ".join(f"{count} {kind}" for kind, count in sorted(load.ends.items()))
    return (
        f"{len(records)} faults in {minutes:.1f} minutes; {load.total_tokens} tokens compared ({ends}): "
        f"{', '.join(f'{count} {name}' for name, count in kinds.items())}; "
        f"training: {sum(lap.same for lap in laps)} of {len(laps)} laps with the undisturbed bits, "
        f"{sum(lap.starts for lap in laps)} starts of its command"
    )


def write(out: Path, seed: int, records: Sequence[Record], load: Load, laps: Sequence[Lap], minutes: float) -> None:
    out.mkdir(parents=True, exist_ok=True)
    text = f"{rows(records)}\n\n{summary(records, load, laps, minutes)}\n"
    (out / "chaos.md").write_text(text, encoding="utf-8")
    found = {
        "seed": seed, "minutes": minutes, "faults": [asdict(record) for record in records],
        "laps": [asdict(lap) for lap in laps], "ends": dict(load.ends), "tokens": load.total_tokens,
        "violations": load.violations,
    }  # fmt: skip
    (out / "chaos.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

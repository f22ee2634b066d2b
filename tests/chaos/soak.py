"""A server under everything it can be asked for, for half an hour: does it keep what it should let go of?

    python -m tests.chaos.soak --minutes 30 --out FOLDER

Two ranks with TLS, tokens and training, a mixed load (harness/mixed.py); resident memory and open handles of the
server, its ranks and Ray's processes every few seconds (harness/usage.py). The first third is warm-up; after it every
process must be flat: a slope below 1 MB a minute and no handle more. Prints a table, writes soak.csv, soak.json and
soak.png, and exits with 1 where a process grew or a call ended as it should not.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import gc
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cluster.access.access_config import Access
from launch.commands.server_process import Server
from launch.main import main as tp_decoders
from tests.chaos.harness.mixed import Tally, load
from tests.chaos.harness.usage import MOST_MB_PER_MINUTE, Sample, Verdict, look, verdicts
from tests.cluster.engine.tiny_models import save_tiny
from tests.cluster.rpc.certificates import Authority

EVERY_S = 5.0
WARM_UP = 1 / 3


def options(folder: Path) -> tuple[list[str], Access]:
    """Of a server with TLS, tokens and training, and of those who call it."""
    authority = Authority(folder, "soak")
    pair = authority.sign("server")
    tokens, mine = folder / "tokens.toml", folder / "mine.token"
    if tp_decoders(["token", "soak", "--roles", "generate,train,control", "--add-to", str(tokens), "--out", str(mine)]):
        raise AssertionError("no token was made")
    model = save_tiny("gpt_neox", folder / "model")
    given = [
        "--model", str(model), "--cluster", "cpu-2", "--preset", "small", "-v",
        "--train", "--save-root", str(folder / "states"), "--token-file", str(tokens),
        "--tls-cert", pair.cert, "--tls-key", pair.key,
    ]  # fmt: skip
    return given, Access(tls_ca=authority.path, token_file=str(mine))


class Soak:
    """One run: what was sampled and how calls ended."""

    def __init__(self, folder: Path, seconds: float, every_s: float) -> None:
        self.folder, self.seconds, self.every_s = folder, seconds, every_s
        self.samples: list[Sample] = []
        self.tally = Tally()

    def run(self) -> None:
        given, access = options(self.folder)
        with Server(given) as server:
            print(server.ready, flush=True)
            asyncio.run(self._both(server, access))

    async def _both(self, server: Server, access: Access) -> None:
        sampling = asyncio.create_task(self._sample(server))
        try:
            await load(server.address, access, self.folder / "states", self.seconds, self.tally)
        finally:
            sampling.cancel()

    async def _sample(self, server: Server) -> None:
        began = time.monotonic()
        while True:
            ranks = {int(pid): int(rank) for rank, pid in re.findall(r"\(rank (\d+) pid=(\d+)\)", server.said)}
            gc.collect()  # connections of clients that left: gRPC holds them for as long as Python holds their calls
            self.samples += look(server.pid, ranks, time.monotonic() - began)
            await asyncio.sleep(self.every_s)

    @property
    def verdicts(self) -> list[Verdict]:
        return verdicts(self.samples, WARM_UP * self.seconds, self.seconds)


def table(found: Sequence[Verdict]) -> str:
    """In Markdown, the fastest growing first."""
    head = "| process | MB after the warm-up | MB at the end | MB a minute | handles | more handles | flat |"
    rows = [
        f"| {v.name} | {v.first_mb:.1f} | {v.last_mb:.1f} | {v.mb_per_minute:+.3f} "
        f"| {v.handles} | {v.more_handles:+.1f} | {'yes' if v.flat else 'NO'} |"
        for v in sorted(found, key=lambda v: -v.mb_per_minute)
    ]
    return "\n".join([head, "| --- | --- | --- | --- | --- | --- | --- |", *rows])


def write(soak: Soak, out: Path) -> None:
    """The samples, what was made of them, and a picture where there is matplotlib."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "soak.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["seconds", "process", "pid", "memory_mb", "handles"])
        rows.writerows([f"{s.seconds:.1f}", s.name, s.pid, f"{s.memory_mb:.3f}", s.handles] for s in soak.samples)
    found = [asdict(verdict) | {"flat": verdict.flat} for verdict in soak.verdicts]
    ends = {f"{kind}: {end}": count for (kind, end), count in sorted(soak.tally.ends.items())}
    given = {"seconds": soak.seconds, "warm_up_s": WARM_UP * soak.seconds, "bound_mb_per_minute": MOST_MB_PER_MINUTE}
    (out / "soak.json").write_text(json.dumps(given | {"processes": found, "ends": ends}, indent=1) + "\n")
    draw(soak, out / "soak.png")


def draw(soak: Soak, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    figure = Figure(figsize=(10, 7))
    memory, handles = figure.subplots(2, 1, sharex=True)
    for verdict in soak.verdicts:
        seen = [sample for sample in soak.samples if (sample.name, sample.pid) == (verdict.name, verdict.pid)]
        minutes = [sample.seconds / 60 for sample in seen]
        memory.plot(minutes, [sample.memory_mb for sample in seen], label=verdict.name)
        handles.plot(minutes, [sample.handles for sample in seen], label=verdict.name)
    for axes, label in ((memory, "resident memory, MB"), (handles, "open handles")):
        axes.set_ylabel(label)
        axes.axvline(WARM_UP * soak.seconds / 60, color="grey", linestyle=":")
    handles.set_xlabel("minutes")
    memory.legend(fontsize="small", ncols=3)
    figure.savefig(path, dpi=100)


def judge(soak: Soak) -> int:
    """0 where all is as it should be; says what is not."""
    found = soak.verdicts
    print(f"\n{table(found)}\n\n{soak.tally.table()}\n")
    complaints = [f"{v.name} (process {v.pid}) grew" for v in found if not v.flat] + soak.tally.wrong
    missing = {"server", "rank 0", "rank 1", "raylet"} - {v.name for v in found}
    complaints += [f"{name} was not there all the time" for name in sorted(missing)]
    for complaint in complaints[:20]:
        print(f"WRONG: {complaint}")
    print(f"{len(complaints)} complaints" if complaints else "flat: no process grew, and every call ended as it should")
    return 1 if complaints else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=EVERY_S, metavar="SECONDS", help="between samples (default 5)")
    parser.add_argument("--out", type=Path, help="for the table's data and the picture (default: a new folder)")
    args = parser.parse_args(arguments)
    out = args.out or Path(tempfile.mkdtemp(prefix="soak-"))
    with tempfile.TemporaryDirectory(prefix="soak-server-") as folder:
        soak = Soak(Path(folder), 60.0 * args.minutes, args.every)
        soak.run()
    write(soak, out)
    status = judge(soak)
    print(f"written to {out}")
    return status


if __name__ == "__main__":
    sys.exit(main())

"""`tp-decoders flight`: reads what the ranks' flight recorders left after a fault and names the rank that fell out of
step, and the command it was in.

Give the files of all ranks, from all nodes, or folders with them; of a folder the newest fault is read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.safe_text import for_terminal
from launch.observe.flight_analysis import RankRecord, judge, read_ranks
from parallel.errors import ConfigError

FORMAT = 1
NEEDED = ("group", "life", "rank", "world", "node", "time", "error", "consequence", "forgotten", "records")
Dump = Mapping[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dumps", nargs="+", type=Path, metavar="DUMP", help="flight-*.json files, or folders of them")
    parser.add_argument("--last", type=int, default=0, metavar="N", help="also list each rank's last N records")
    parser.add_argument("--json", action="store_true", help="the verdict as JSON")


def run(args: argparse.Namespace) -> int:
    dumps = of_one_fault([load(path) for path in paths(args.dumps)])
    ranks = read_ranks(dumps)
    verdict = judge(ranks)
    if args.json:
        print(json.dumps({"ranks": verdict.ranks, "command": verdict.command, "verdict": verdict.text}))
        return 0
    for record, dump in zip(ranks, dumps, strict=True):
        print(for_terminal(line(record)))
        for entry in dump["records"][-args.last :] if args.last > 0 else ():
            print(for_terminal(record_line(entry)))
    print(for_terminal(f"=> {verdict.text}"))
    return 0


def paths(given: Sequence[Path]) -> Iterator[Path]:
    for path in given:
        if not path.exists():
            raise ConfigError(f"{path} does not exist; give flight-*.json files, or folders that hold some")
        found = sorted(path.glob("flight-*.json")) if path.is_dir() else [path]
        if not found:
            raise ConfigError(f"{path} holds no flight-*.json; a dump is written when a rank fails")
        yield from found


def load(path: Path) -> Dump:
    try:
        dump = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a dump: {error}; give flight-*.json files") from error
    if not isinstance(dump, dict) or dump.get("format") != FORMAT or any(name not in dump for name in NEEDED):
        raise ConfigError(f"{path} is no dump of this version; give flight-*.json files")
    return dump


def of_one_fault(dumps: Sequence[Dump]) -> list[Dump]:
    """Those of the newest fault, one per rank."""
    newest = max(dumps, key=lambda dump: float(dump["time"]))
    same = [dump for dump in dumps if (dump["group"], dump["life"]) == (newest["group"], newest["life"])]
    return sorted({dump["rank"]: dump for dump in same}.values(), key=lambda dump: int(dump["rank"]))


def line(record: RankRecord) -> str:
    age = "" if record.last is None else f", {record.last[0]:.2f} s before the dump"
    error = record.error.splitlines()[0] if record.error else "no error of its own"
    return f"rank {record.rank} on {record.node}: {record.where()}{age}\n    {error}"


def record_line(entry: Sequence[Any]) -> str:
    age, what, name, number, nbytes = entry
    return f"    -{age:10.6f} s  {what:10} {number:>8}  {name} ({nbytes} bytes)"

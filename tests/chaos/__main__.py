"""Breaks things on purpose and shows that nothing is lost: `python -m tests.chaos --faults 100 --seed 0`.

Three hosts (network namespaces) with a standing Ray cluster; on it `tp-decoders serve`, its ranks on two hosts, with
sixteen streams and other calls, and `tp-decoders train` beside it. Faults of a dozen kinds, drawn from the seed. Exits
with 1 where a token was lost, doubled or changed, a call had no answer, a fault was not named or did not heal, or
training ended with other bits; then the logs are kept. Needs root, unshare, nsenter and ip; --raylets: several raylets
of this machine in place of hosts, without those.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.faults.kinds import KINDS
from tests.chaos.harness.hosts import Namespaces, Raylets, free_port
from tests.chaos.harness.jobs import DISK_BYTES
from tests.chaos.run import Plan, Run
from tests.multinode import ground

TOOLS = ("unshare", "nsenter", "ip", "mount")
DATA = ("tests/chaos", "tests/multinode", "tests/launch", "tests/cluster", "tests/data/text")
TEXT = "tests/data/text/tinyshakespeare.txt"
PORT = 50051


def main(arguments: Sequence[str] | None = None) -> int:
    args = parsed(arguments)
    plan = Plan(faults=args.faults, seed=args.seed, minutes=args.minutes, kinds=args.kind, steps=args.steps)
    if args.inside is not None:
        return inside(Path(args.inside), plan)
    if args.raylets:
        return on_raylets(plan, args.out)
    if missing := ground.lacking(TOOLS):
        print(f"three hosts need {', '.join(missing)}; --raylets does without", file=sys.stderr)
        return 2
    base = Path(tempfile.mkdtemp(prefix="tp-chaos-", dir="/var/tmp"))  # not below /tmp, which every host has for itself
    ground.furnish(base, DATA)
    given = list(arguments if arguments is not None else sys.argv[1:])
    again = [sys.executable, "-m", "tests.chaos", "--inside", str(base), *given]
    return kept(base, ground.enter(base, again, ground.environment(base, sshd=False)), args.out)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of kinds and targets (default 0)")
    parser.add_argument("--minutes", type=float, default=60.0, help="the longest a run may take (default 60)")
    parser.add_argument("--kind", action="append", choices=KINDS, default=[], help="these, in this order; repeatable")
    parser.add_argument("--steps", type=int, default=Plan.steps, help=f"of a lap of training (default {Plan.steps})")
    parser.add_argument("--raylets", action="store_true", help="raylets of this machine in place of hosts: no root")
    parser.add_argument("--out", type=Path, help="for table, figures and logs (default: a new folder)")
    parser.add_argument("--inside", metavar="BASE", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def inside(base: Path, plan: Plan) -> int:
    """In namespaces of its own: what is mounted, started or linked here ends with this process."""
    ground.make_private(base)
    disk = base / "disk"
    disk.mkdir()
    size = ["-o", f"size={DISK_BYTES}"]
    subprocess.run(["mount", "-t", "tmpfs", *size, "tmpfs", disk], check=True)  # before the hosts, which all see it
    hosts = Namespaces(base)
    return Run(hosts, base, base / "tree" / TEXT, hosts.node(1), PORT, disk).go(plan)


def on_raylets(plan: Plan, out: Path | None) -> int:
    base = Path(tempfile.mkdtemp(prefix="tp-chaos-"))
    (base / "logs").mkdir()
    hosts = Raylets(base)
    try:
        status = Run(hosts, base, Path(TEXT).resolve(), "127.0.0.1", free_port()).go(plan)
    finally:
        hosts.close()
    return kept(base, status, out)


def kept(base: Path, status: int, out: Path | None) -> int:
    """The logs and figures outlive the run."""
    out = out or Path(tempfile.mkdtemp(prefix="chaos-"))
    shutil.copytree(base / "logs", out, dirs_exist_ok=True)
    if status:
        for number in (1, 2, 3):
            ray = base / f"hosts/{number}/tmp/ray/session_latest"
            if ray.exists():
                shutil.copytree(ray.resolve() / "logs", out / f"ray-{number}", dirs_exist_ok=True)
    shutil.rmtree(base, ignore_errors=True)
    print(f"figures and logs are in {os.fspath(out)}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())

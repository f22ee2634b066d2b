"""`tp-decoders preflight`: looks at the nodes of a cluster before work is given to them, and names the odd one out.

One rank for each GPU (or core) reports its node's software, clock, memory and checkpoint, and how fast every link is;
this module compares. Exit status 1 where something is odd.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.actors.group.placement import Place, PlacementConfig
from launch.observe import log_setup
from launch.ray.private_ray import own_ray
from parallel.errors import ConfigError

if TYPE_CHECKING:
    from cluster.actors.programs.preflight_rank import Link

SLOW, MUCH_LATER = 0.5, 4.0
"""A link is slow below this part of the best bandwidth of its kind, or above four times the lowest latency."""
CLOCK_S = 1.0
LITTLE_MEMORY = 0.8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, required=True, help="how many, as tp x dp of the work to come")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", metavar="MODEL", help="a checkpoint that must be the same on every node")
    parser.add_argument(
        "--whole-files", action="store_true", help="compare every byte of it (default: names, sizes, ends)"
    )
    parser.add_argument("--strategy", default="PACK", help="STRICT_PACK, PACK (default), SPREAD or STRICT_SPREAD")
    parser.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="for nodes that are still joining")
    parser.add_argument("--ray-address", default="auto", help="the cluster (default auto: the one of this machine)")
    log_setup.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from launch.ray.ray_config import ENVIRONMENT

    level = log_setup.configure(args.verbose, args.log_json)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if args.ranks < 1:
        raise ConfigError(f"--ranks is {args.ranks}; give at least 1")
    with own_ray(None if args.ray_address == "local" else args.ray_address):
        reports = look(args, level)
    print("\n".join(table(reports)))
    odd = oddities(reports)
    print("\n".join(f"ODD: {line}" for line in odd) if odd else "nothing odd")
    return 1 if odd else 0


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one rank found."""

    place: Place
    software: dict[str, str]
    clock_offset_s: float
    free_bytes: int
    links: tuple[Link, ...] = ()


def look(args: argparse.Namespace, log_level: int = logging.WARNING) -> list[Report]:
    """Every rank's report, in rank order."""
    from cluster.actors.group.worker_group import WorkerGroup
    from cluster.actors.host.ray_session import ray_session
    from cluster.actors.programs.preflight_rank import PreflightSpec
    from tp_decoders.hub.repository import locate

    model = str(locate(args.model).absolute()) if args.model else None
    spec = PreflightSpec(model=model, device=args.device, whole_files=args.whole_files)
    quiet = logging.ERROR if log_level == logging.WARNING else log_level  # every slow transport is measured anyway
    placement = PlacementConfig(strategy=args.strategy, join_timeout_s=args.wait, log_level=quiet)
    address = None if args.ray_address == "local" else args.ray_address
    with ray_session(address, args.ranks if address is None else None):
        group = WorkerGroup(spec, args.ranks, args.device, placement)
        try:
            ready = group.start()
        finally:
            group.close()
    return [
        Report(
            place=rank.place,
            software=rank.facts.software,
            clock_offset_s=rank.facts.clock_s - rank.facts.rank0_clock_s,
            free_bytes=rank.facts.free_bytes,
            links=rank.facts.links,
        )
        for rank in ready
    ]


def table(reports: Sequence[Report]) -> list[str]:
    """What was found, as a person reads it."""
    lines = []
    for report in (report for report in reports if report.place.local_rank == 0):
        found = "  ".join(f"{name} {value}" for name, value in report.software.items())
        lines.append(
            f"{report.place.node}: {report.place.local_size} rank(s), {report.free_bytes / 2**30:.1f} GiB free each, "
            f"clock {report.clock_offset_s:+.3f} s; {found}"
        )
    for link in reports[0].links:
        ranks = f"all {len(link.ranks)} ranks" if len(link.ranks) > 2 else f"ranks {link.ranks[0]} - {link.ranks[1]}"
        lines.append(
            f"{ranks} ({' - '.join(link.nodes)}): {link.latency_us:.0f} us for 16 KB, {link.gigabytes_s:.2f} GB/s"
        )
    return lines


def oddities(reports: Sequence[Report]) -> list[str]:
    """One line for whatever sets a node or a link apart from the others; it names them."""
    nodes = [report for report in reports if report.place.local_rank == 0]
    return [*_odd_software(nodes), *_odd_clocks(nodes), *_odd_memory(reports), *_odd_links(reports[0].links)]


def _odd_software(nodes: Sequence[Report]) -> list[str]:
    found = []
    for name in dict.fromkeys(name for report in nodes for name in report.software):
        values = [report.software.get(name, "none") for report in nodes]
        usual, count = Counter(values).most_common(1)[0]
        if count == len(values):
            continue
        if 2 * count <= len(values):  # no majority: nobody is the odd one
            each = ", ".join(f"{value} on {report.place.node}" for value, report in zip(values, nodes, strict=True))
            found.append(f"{name} differs: {each}")
            continue
        odd = [(value, report) for value, report in zip(values, nodes, strict=True) if value != usual]
        found += [f"{report.place.node}: {name} is {value}, elsewhere {usual}" for value, report in odd]
    return found


def _odd_clocks(nodes: Sequence[Report]) -> list[str]:
    middle = statistics.median(report.clock_offset_s for report in nodes)
    return [
        f"{report.place.node}: its clock is {report.clock_offset_s - middle:+.1f} s off; is NTP running?"
        for report in nodes
        if abs(report.clock_offset_s - middle) > CLOCK_S
    ]


def _odd_memory(reports: Sequence[Report]) -> list[str]:
    usual = statistics.median(report.free_bytes for report in reports)
    return [
        f"{report.place}: {report.free_bytes / 2**30:.1f} GiB free, elsewhere {usual / 2**30:.1f}; "
        "does something else run there?"
        for report in reports
        if report.free_bytes < LITTLE_MEMORY * usual
    ]


def _odd_links(links: Sequence[Link]) -> list[str]:
    """Slow ones of their kind; where all slow links between nodes meet in one node, that node."""
    found: list[str] = []
    pairs = [link for link in links if len(link.ranks) == 2]
    for crossing in (False, True):
        kind = [link for link in pairs if (len(link.nodes) == 2) == crossing]
        slow = [link for link in kind if _slow(link, kind)]
        shared = set.intersection(*(set(link.nodes) for link in slow)) if slow else set()
        if crossing and len(slow) > 1 and len(shared) == 1:
            found.append(f"{shared.pop()}: all its links to other nodes are slow ({_figures(slow)})")
        else:
            found += [
                f"ranks {link.ranks[0]} - {link.ranks[1]} ({' - '.join(link.nodes)}): {_figures([link])}, "
                f"others of its kind {_figures([other for other in kind if other not in slow])}"
                for link in slow
            ]
    return found


def _slow(link: Link, kind: Sequence[Link]) -> bool:
    best = max(other.gigabytes_s for other in kind)
    quickest = min(other.latency_us for other in kind)
    return link.gigabytes_s < SLOW * best or link.latency_us > MUCH_LATER * quickest


def _figures(links: Sequence[Link]) -> str:
    latency = statistics.median(link.latency_us for link in links)
    return f"{latency:.0f} us, {statistics.median(link.gigabytes_s for link in links):.2f} GB/s"

"""How a process of ours logs: to stderr, one line per record, so that stdout stays for results.

Ranks name themselves in their own format (cluster.actors.group.worker); a message about one request carries its id in
its text. With --log-json each line is an object with time, level, logger, message, node, and request id and rank where
they are known (cluster.json_logs).
"""

from __future__ import annotations

import argparse
import logging

from cluster.json_logs import JsonLines
from cluster.safe_text import PlainLines

FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"
NOISY = ("asyncio", "filelock", "urllib3", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-v", "--verbose", action="store_true", help="log what happens, not only what goes wrong")
    parser.add_argument(
        "--log-json", action="store_const", const=True, help="log lines of JSON, with request id, rank and node"
    )


def configure(verbose: bool, as_json: bool | None = None) -> int:
    """Sets up logging and returns the level, for the ranks."""
    level = logging.INFO if verbose else logging.WARNING
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if as_json else PlainLines(FORMAT, "%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    return level

"""How a process of ours logs: to stderr, one line per record, so that stdout stays for results.

Ranks name themselves in their own format (cluster.actors.worker); a message about one request carries its id in its
text.
"""

from __future__ import annotations

import argparse
import logging

FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"
NOISY = ("asyncio", "filelock", "urllib3", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-v", "--verbose", action="store_true", help="log what happens, not only what goes wrong")


def configure(verbose: bool) -> int:
    """Sets up logging and returns the level, for the ranks."""
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format=FORMAT, datefmt="%H:%M:%S", force=True)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    return level

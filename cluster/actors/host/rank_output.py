"""What ranks write to their output, shown by the process that started them: their log lines as they are.

Ray brings the lines here and would print each behind a coloured `(rank 0 pid=...)`, which no reader of JSON takes, and
between them lines of its own C++. Here lines of JSON, which say all of it themselves, stay as they are.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from typing import Any

from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

from cluster.json_logs import JsonLines
from cluster.safe_text import visible

log = logging.getLogger(__name__)
NAME = "tp-decoders"
RAYS = "ray_print_logs"
"""Ray's own printer among those that get the lines."""
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
CPP = re.compile(r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ \w \d+ \d+\]|^\*\*\* SIG|^\[symbolize_|^\(raylet\)")
"""How a line of Ray's C++ begins, or of the stack it prints."""


def show_rank_output() -> None:
    """From now on, in place of Ray's own printing."""
    dispatcher.remove_handler(RAYS)
    dispatcher.remove_handler(NAME)
    dispatcher.add_handler(NAME, show)


def show(batch: Mapping[str, Any]) -> None:
    """Some lines of one process, as Ray describes them."""
    source, as_json = batch.get("pid"), _as_json()
    for line in (COLOURS.sub("", line) for line in batch["lines"]):
        if source in ("raylet", "autoscaler") or CPP.search(line):
            log.debug("%s: %s", source, line)
        elif as_json and not line.startswith("{"):
            log.warning("process %s: %s", source, line)
        else:
            sys.stderr.write(f"{'' if as_json else _source(batch)}{visible(line)}\n")


def _source(batch: Mapping[str, Any]) -> str:
    """Whose line it is: what Ray calls the process, as in "rank 0", and its number."""
    return f"({batch.get('actor_name') or 'process'} pid={batch.get('pid')}) "


def _as_json() -> bool:
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers)

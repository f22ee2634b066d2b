"""Writes a rank's flight recorder to a file when the rank fails: one JSON file per rank and fault, in a folder of its
node. Read by `tp-decoders flight`.

The folder belongs to its user alone and is bounded: the oldest dumps make room. Writing one must not hide the fault
itself, so a disk that refuses is only logged.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

from cluster.actors.group.placement import Place
from parallel.errors import CollectiveError
from parallel.private_folder import own_folder
from parallel.ranks.comm import Comm
from parallel.ranks.flight_recorder import Flight

log = logging.getLogger(__name__)
FORMAT = 1
KEPT = 64
"""Dumps that stay in a folder."""
ERROR_CHARACTERS = 2000


def default_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"tp-decoders-flight-{os.getuid()}"


def dump_of(
    flight: Flight, group: str, place: Place, error: BaseException | None, comm: Comm | None = None
) -> dict[str, Any]:
    """What a dump says: who, what ended it, and the records with their age in seconds."""
    now = time.monotonic()
    return {
        "format": FORMAT,
        "group": group,
        "life": place.life,
        "rank": place.rank,
        "world": place.world,
        "node": place.node,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": time.time(),
        "error": f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS] if error is not None else "",
        "consequence": isinstance(error, CollectiveError),
        "forgotten": flight.forgotten,
        "counts": {} if comm is None else dict(comm.counts),
        "byte_counts": {} if comm is None else dict(comm.byte_counts),
        "records": [[round(now - at, 6), *rest] for at, *rest in flight.records()],
    }


def write_dump(
    folder: Path | None, flight: Flight, group: str, place: Place, error: BaseException, comm: Comm | None = None
) -> Path | None:
    """The file; None where it could not be written."""
    folder = folder or default_folder()
    name = f"flight-{group}-life{place.life}-rank{place.rank}.json"
    try:
        own_folder(folder)
        draft = folder / f".{name}.{os.getpid()}"
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(dump_of(flight, group, place, error, comm), file)
        os.replace(draft, folder / name)
        _make_room(folder)
    except OSError as failure:
        log.error("the flight recorder could not be written to %s: %s", folder, failure)
        return None
    log.error("the last commands and collectives of rank %d are in %s", place.rank, folder / name)
    return folder / name


def _make_room(folder: Path) -> None:
    dumps = sorted(folder.glob("flight-*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in dumps[KEPT:]:
        old.unlink(missing_ok=True)

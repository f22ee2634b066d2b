"""The folder of the Ray clusters that our commands start, with their sessions and tokens: this user's alone, and short.

Ray's own choice is /tmp/ray, where every user may write. Its sockets lie some 70 characters below the folder, and the
name of a Unix socket has room for 107 bytes (unix(7)), which the temporary folders of batch systems exceed. What runs
that were killed have left is removed by the next one: tokens at once, sessions (Ray's logs) but for the newest.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from parallel.errors import ConfigError
from parallel.private_folder import own_folder

log = logging.getLogger(__name__)
SOCKET_BYTES = 107
LONGEST_SOCKET = "/ray/session_2026-01-31_23-59-59_123456_4194304/sockets/plasma_store"
VARIABLES = ("RAY_TMPDIR", "TMPDIR")
SESSIONS_KEPT = 8
TOKEN_PREFIX = "token-"


def ray_folder() -> Path:
    """A folder of mode 700 of this user: below RAY_TMPDIR, TMPDIR or /tmp, the first that will do. A setting that was
    passed over is named in a warning; where none will do a ConfigError names all of them.
    """
    refused: list[str] = []
    for source, parent in _candidates():
        folder = Path(parent) / f"tp-decoders-{os.getuid()}"
        reason = _unusable(folder)
        if reason is None:
            if refused:
                log.warning("Ray's files go to %s: %s", folder, "; ".join(refused))
            return folder
        refused.append(f"{source} {parent}: {reason}")
    raise ConfigError(
        f"Ray needs a folder for its sockets and none will do ({'; '.join(refused)}); set RAY_TMPDIR to a folder that "
        f"you can write and whose path has at most {_room() - len(f'/tp-decoders-{os.getuid()}')} characters"
    )


def _candidates() -> Iterator[tuple[str, str]]:
    """(setting, folder), each folder once."""
    given = {os.environ[name]: name for name in reversed(VARIABLES) if os.environ.get(name)}
    shared = (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm")
    for folder in dict.fromkeys((*reversed(given), *shared)):
        yield given.get(folder, "folder"), folder


def _room() -> int:
    return SOCKET_BYTES - len(LONGEST_SOCKET)


def _unusable(folder: Path) -> str | None:
    """Why not, or None with the folder made."""
    if len(os.fsencode(folder)) > _room():
        return f"its path is too long, a Unix socket's may have {SOCKET_BYTES} bytes"
    try:
        if folder.is_symlink():
            return f"{folder} is a link"
        folder.mkdir(mode=0o700, exist_ok=True)  # but nothing above it
        own_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def sweep(folder: Path) -> None:
    """Removes what processes that have ended left: their tokens, and all but the newest of their sessions."""
    dead = [path for path in folder.glob(f"{TOKEN_PREFIX}*") if not _runs(path.name.split("-")[1])]
    sessions = [path for path in folder.glob("ray/session_*_*") if not path.is_symlink()]
    ended = sorted((path for path in sessions if not _runs(path.name.rpartition("_")[2])), key=lambda path: path.name)
    for path in (*dead, *ended[:-SESSIONS_KEPT]):
        shutil.rmtree(path, ignore_errors=True)


def _runs(pid: str) -> bool:
    return not pid.isdigit() or Path("/proc", pid).exists()

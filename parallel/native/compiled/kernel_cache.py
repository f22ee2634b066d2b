"""Where built kernels are kept, and whether a file there may be loaded: only what nobody else could have written.

A folder is trusted that this user, root or the owner of our sources has, and that nobody else may write to. The folder
beside the sources is closed to others where it is this user's (a checkout under umask 002, or after chmod g+w). Any
other folder is left as it is, said once, and a private one used. A file that others could have written is not looked
into but built again.
"""

import functools
import logging
import os
import stat
import tempfile
from pathlib import Path

from parallel.errors import NativeUnavailable
from parallel.native.compiled import build

log = logging.getLogger(__name__)


def place(name: str, configured: Path | None) -> Path:
    """The path of the file of that name, there already or to be built: in the configured folder, else beside the
    sources, else in a private one.
    """
    if configured is not None:
        if not configured.exists():
            configured.mkdir(mode=0o755, parents=True, exist_ok=True)
        return (configured if _trusted(configured) else _private_dir()) / name
    return (_beside(name) or _private_dir()) / name


def contents(path: Path) -> bytes | None:
    """What is in the file; None where it is missing, or somebody else may have written it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        if _others(os.fstat(descriptor)):
            _say(f"{path} could have been written by others ({_mode(path)}), so the kernels are built again")
            return None
        return file.read()


def _beside(name: str) -> Path | None:
    """The folder beside the sources, where it is trusted and has the file or can take it."""
    beside = build.SOURCES / "_build"
    try:
        if (beside / name).exists():
            return beside if _closed(beside) else None
        beside.mkdir(mode=0o755, exist_ok=True)
        if not _closed(beside) or not os.access(beside, os.W_OK | os.X_OK):
            return None
        ignore = beside / ".gitignore"
        if not ignore.exists():
            ignore.write_text("*\n")
    except OSError:  # an installed package in a read-only tree
        return None
    return beside


def _closed(beside: Path) -> bool:
    """Whether others cannot write to the folder beside the sources; one of this user's that was left open is closed."""
    status = beside.stat()
    if status.st_uid == os.geteuid() and status.st_mode & 0o022:
        beside.chmod(0o755)
    return _trusted(beside)


def _trusted(folder: Path) -> bool:
    if not _others(folder.stat()):
        return True
    _say(
        f"the kernels are kept in a private folder and not in {folder}, which others can write to ({_mode(folder)}); "
        "run chmod go-w on it to have them there"
    )
    return False


def _others(status: os.stat_result) -> bool:
    """Whether a user can write there who cannot change our sources either. In a sticky folder, nobody can take away
    what is another's.
    """
    trusted = {0, os.geteuid(), build.SOURCES.stat().st_uid if build.SOURCES.exists() else 0}
    sticky_folder = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
    return status.st_uid not in trusted or bool(status.st_mode & 0o022 and not sticky_folder)


@functools.cache
def _say(once: str) -> None:
    log.warning("%s", once)


def _mode(path: Path) -> str:
    status = path.stat()
    return f"user {status.st_uid}, mode {status.st_mode & 0o7777:o}"


def _private_dir() -> Path:
    """A folder only this user can write, so that nobody else can plant code in it."""
    path = Path(tempfile.gettempdir(), f"tp-decoders-native-{os.geteuid()}")
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise NativeUnavailable(
            f"{path} is not a folder owned by and open to this user alone; "
            "remove it or give configure(cache_dir=...) another folder"
        )
    return path

"""Folders of this user's alone, which others must neither read nor change: states, flight records, copies of weights.

In a folder where everybody writes (/tmp) another user may have been there first, with a link or with a folder of the
same name. Once `own_folder` has returned, nobody else can put anything into the folder, or another into its place.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


def own_folder(folder: Path) -> None:
    """Makes it where it is missing, closes it to others where it is open. PermissionError with the reason where it is
    another user's, is reached through another's link, or others may replace it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(f"{folder} is no folder") from error
    for path in (folder, *folder.absolute().parents):
        if path.is_symlink() and path.lstat().st_uid not in (0, os.geteuid()):
            raise PermissionError(f"{path} is a link that user {path.lstat().st_uid} made")
    real = folder.resolve()
    found = real.stat()
    if found.st_uid != os.geteuid():
        raise PermissionError(f"{folder} belongs to user {found.st_uid}")
    if found.st_mode & 0o077:
        real.chmod(0o700)
    for parent in real.parents:
        if _others_rename_in(parent.stat()):
            raise PermissionError(f"in {parent} others may put another folder in its place (chmod o-w or +t would do)")


def _others_rename_in(status: os.stat_result) -> bool:
    """A group that this user or root lets write counts as trusted."""
    if status.st_mode & stat.S_ISVTX:
        return False
    foreign = status.st_uid not in (0, os.geteuid())
    return bool(status.st_mode & 0o002 or (foreign and status.st_mode & 0o020))


def no_file_for_everybody() -> None:
    """From now on this process, and those it starts, make no file that everybody may write: states, checkpoints, logs.
    What the group may do is left as the user has it.
    """
    os.umask(os.umask(0o077) | 0o002)

"""Git LFS pointers: what lies in a file's place where a repository was cloned without Git LFS, 130 bytes of text that
name a file of gigabytes.
"""

from __future__ import annotations

from pathlib import Path

from parallel.errors import CheckpointError

BEGINNING = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path) -> None:
    """An error where a plain file is a pointer; whatever else is wrong with it its reader will say."""
    try:
        if not path.is_file():  # opening a pipe would wait
            return
        with path.open("rb") as file:
            found = file.read(len(BEGINNING))
    except OSError:
        return
    if found == BEGINNING:
        raise CheckpointError(
            f"{path} is a Git LFS pointer in the file's place: run `git lfs pull` in its repository, or fetch the file"
        )

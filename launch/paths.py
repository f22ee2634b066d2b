"""Folders and files as settings name them: `~` is the user's folder wherever it is written, and a path means the same
in every process.
"""

from __future__ import annotations

import os
from pathlib import Path


def full_path(text: str | Path) -> Path:
    """From the root, links followed. Links that lead in a circle are left for the path's reader to refuse, where
    Path.resolve raises RuntimeError.
    """
    return Path(os.path.realpath(os.path.expanduser(text)))

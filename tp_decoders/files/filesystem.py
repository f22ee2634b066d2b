"""What kind of file system a checkpoint lies on, and whether the processes of one host share what they read from it.

A local disk's pages, NFS's and Lustre's are kept by the kernel for all processes: each is fetched once while memory
lasts. Mounts of object stores run in user space and may forget a file whenever another process opens it.
"""

from __future__ import annotations

import os
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")


def kind_of(path: Path) -> str:
    """The type of the file system at a path, as the kernel calls it; empty where that cannot be known."""
    found, longest = "", -1
    try:
        lines = MOUNTS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    for line in lines:
        before, _, after = line.partition(" - ")
        point = Path(before.split()[4].replace("\\040", " "))
        if (path == point or point in path.parents) and len(point.parts) >= longest:
            found, longest = after.split()[0], len(point.parts)
    return found


def advice(folder: Path) -> str | None:
    """What to say of a checkpoint that is read without a cache where each process may fetch it for itself."""
    kind = kind_of(Path(os.path.realpath(folder)))
    if not kind.startswith("fuse"):
        return None
    return (
        f"{folder} lies on {kind}, which may fetch it again for every rank; give placement.weights_cache, a folder on "
        "a disk of the nodes, where it is then copied once per node"
    )

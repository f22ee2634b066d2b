"""Which Ray cluster `auto` means: the one whose processes on this machine are this user's.

Ray itself takes the address in a file of /tmp that any user may have written, and so the cluster of whoever started one
last. What a cluster of this user is, is read from /proc: a raylet says in its arguments where its head is.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Iterator
from pathlib import Path

from parallel.errors import ConfigError

NEWEST = Path("/tmp/ray/ray_current_cluster")
"""Where `ray start` writes its head's address."""
PRIVATE = re.compile(r"/tp-decoders-\d+/ray/session_")
"""In the arguments of a cluster that one of our commands has started for itself alone."""
_HEAD = re.compile(r"--gcs-address=(\S+)")


def own_address(proc: Path = Path("/proc"), newest: Path = NEWEST) -> str:
    """HOST:PORT of the head of this user's cluster on this machine, of several the one that `ray start` began last;
    `auto` where none runs here at all, or where RAY_ADDRESS, which Ray reads itself, names one.
    """
    if "RAY_ADDRESS" in os.environ:
        return "auto"
    found = list(_raylets(proc))
    own = sorted({address for owner, address in found if owner == os.getuid()})
    others = sorted({f"{address} of {_name(owner)}" for owner, address in found if owner != os.getuid()})
    if len(own) > 1:
        own = [address for address in own if address == _last_started(newest)] or own
    if len(own) > 1:
        raise ConfigError(
            f"ray.address is auto and {len(own)} Ray clusters of yours run here: {', '.join(own)}; name one"
        )
    if own:
        return own[0]
    if others:
        raise ConfigError(
            f"ray.address is auto and the Ray cluster here is another user's ({', '.join(others)}); start one of your "
            "own with `ray start --head`, or give that address if you were told to use it"
        )
    return "auto"


def _raylets(proc: Path) -> Iterator[tuple[int, str]]:
    """Owner and head of every raylet of this machine."""
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            arguments = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            owner = folder.stat().st_uid
        except OSError:
            continue
        head = _HEAD.search(arguments)
        if head and Path(arguments.split()[0]).name == "raylet" and not PRIVATE.search(arguments):
            yield owner, head[1]


def _last_started(newest: Path) -> str | None:
    try:
        return newest.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _name(owner: int) -> str:
    try:
        return pwd.getpwuid(owner).pw_name
    except KeyError:
        return f"user {owner}"

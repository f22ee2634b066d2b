"""The surroundings of the Ray cluster that a command starts for itself: a folder of this user's, and a token, without
which every port of Ray's refuses a caller.

The token is made for this one run, lies in a file that only this user reads, and goes with the run, or, where that is
killed, with the next one. Ray takes both as its documentation says, from the environment, which its processes inherit:
the names of folder and file, not the token. A standing cluster has its own; a mode other than "token", or a token,
that the environment holds already is left as it is.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.ray.ray_folder import TOKEN_PREFIX, ray_folder, sweep

MODE, TOKEN, FILE, FOLDER = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR"


@contextmanager
def own_ray(address: str | None) -> Iterator[None]:
    """While a cluster of this machine alone lives; nothing is done where one is joined at `address`."""
    if address is not None:
        yield
        return
    with _ended_by_exception():
        yield from _own_ray()


def _own_ray() -> Iterator[None]:
    folder = ray_folder()
    sweep(folder)
    given = os.environ.get(MODE, "token").lower() != "token" or TOKEN in os.environ or FILE in os.environ
    before = {name: os.environ.get(name) for name in (MODE, TOKEN, FILE, FOLDER)}
    private = tempfile.mkdtemp(prefix=f"{TOKEN_PREFIX}{os.getpid()}-", dir=folder)  # of mode 700
    token = {} if given else {MODE: "token", TOKEN: None, FILE: str(_written(Path(private, "token")))}
    try:
        _environment({FOLDER: str(folder), **token})
        yield
    finally:
        _environment(before)
        shutil.rmtree(private, ignore_errors=True)


@contextmanager
def _ended_by_exception() -> Iterator[None]:
    """SIGTERM, where nobody handles it yet, so that it leaves no token; the commands' own handlers come later."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _written(path: Path) -> Path:
    path.touch(0o600)
    path.write_text(secrets.token_hex(32))
    return path


def _environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if "ray" in sys.modules:  # which otherwise reads it when it is imported
        from cluster.actors.host.ray_session import read_environment_again

        read_environment_again()

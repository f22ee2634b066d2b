"""A token for the Ray cluster that a command starts for itself: whoever has it not is refused at every port of Ray's.

It is made for this one run, lies in a file that only this user reads, and goes with the run. Ray takes it as its
documentation says, from the environment, which Ray's own processes inherit: the file's name, not the token. A standing
cluster has its own token; a mode other than "token", or a token, that the environment holds already is left as it is.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MODE, TOKEN, FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


@contextmanager
def token_of_this_run(address: str | None) -> Iterator[None]:
    """While a cluster of this machine alone lives; nothing is done where one is joined at `address`."""
    given = os.environ.get(MODE, "token").lower() != "token" or TOKEN in os.environ or FILE in os.environ
    if address is not None or given:
        yield
        return
    before = {name: os.environ.get(name) for name in (MODE, TOKEN, FILE)}
    folder = tempfile.mkdtemp(prefix="tp-decoders-ray-")  # of mode 700
    try:
        _environment({MODE: "token", TOKEN: None, FILE: str(_written(Path(folder, "token")))})
        yield
    finally:
        _environment(before)
        shutil.rmtree(folder, ignore_errors=True)


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
        from cluster.actors.session import read_environment_again

        read_environment_again()

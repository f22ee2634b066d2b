"""The names under which a server keeps training states: folders of one root, and nothing else of the file system.

A name that a client sends has passed `name_rule`, here again; what it leads to must lie inside the root, symbolic links
followed. Reads folders; writing is the Checkpointer's.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from cluster.training.train_calls import NoSuchState, SavedName, StateExists, name_rule
from parallel.errors import CheckpointError, ConfigError, RequestError, TpError

log = logging.getLogger(__name__)
T = TypeVar("T")
STATE = Path("training") / "state.json"
CONFIGS = ("config.json", "adapter_config.json")
MAX_LISTED = 1000


class StateFolder:
    """The states under one root, which is made if need be."""

    def __init__(self, root: Path) -> None:
        try:
            root.mkdir(parents=True, exist_ok=True)
            self.root = root.resolve(strict=True)
            if not os.access(self.root, os.W_OK | os.X_OK):
                raise PermissionError("it cannot be written")
        except OSError as error:
            raise ConfigError(f"training.save_root {root} cannot be used: {error}; give a writable folder") from error

    def free(self, name: str) -> Path:
        """Where a new state of this name goes."""
        path = self._path(name)
        if os.path.lexists(path):
            raise StateExists(f"{name!r} exists already; nothing is written over: choose another name")
        return path

    def find(self, name: str) -> Path:
        """The folder of a complete state of this name."""
        path = self._path(name)
        if not path.is_dir():
            raise NoSuchState(f"no state {name!r} was saved here; GetTrainState lists those that were")
        self._check_inside(name, path)
        if not (path / STATE).is_file():
            raise NoSuchState(
                f"{name!r} holds no optimiser state: it is an export; LoadState takes what SaveState wrote"
            )
        return path

    def listing(self) -> tuple[SavedName, ...]:
        """What lies under the root, by name: complete states and plain checkpoints."""
        found = []
        for entry in sorted(self.root.iterdir()):
            complete = any((entry / config).is_file() for config in CONFIGS)
            if complete and name_rule(entry.name) is None and not entry.is_symlink():
                found.append(SavedName(entry.name, _step(entry), folder_size(entry)))
            if len(found) == MAX_LISTED:
                log.warning("%s holds more than %d states; the rest is not listed", self.root, MAX_LISTED)
                break
        return tuple(found)

    def _path(self, name: str) -> Path:
        rule = name_rule(name)
        if rule is not None:
            raise RequestError(f"name: {rule}")
        return self.root / name

    def _check_inside(self, name: str, folder: Path) -> None:
        for path in (folder, *folder.rglob("*")):
            if not Path(os.path.realpath(path)).is_relative_to(self.root):
                raise NoSuchState(f"{name!r} leads out of the server's folder by a symbolic link; it is not followed")


def _step(folder: Path) -> int | None:
    try:
        return int(json.loads((folder / STATE).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def folder_size(folder: Path) -> int:
    """Bytes of its files; of one that is just being removed, what is left."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def in_thread(work: Callable[[], T]) -> Future[T]:
    """The result of reading what may take long, beside the engine's thread."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except TpError as error:
            future.set_exception(error)
        except Exception as error:  # noqa: BLE001  it belongs to whoever waits for the future
            future.set_exception(CheckpointError(f"the server's folder of states cannot be read: {error!r}"))

    threading.Thread(target=run, name="states", daemon=True).start()
    return future

"""What `serve` keeps in its state folder beside the ledger: where its ranks are, for the command that is started next.

The file holds the ranks' names on the Ray cluster and the keys of their engines, is readable by its owner alone, and is
written after each start and rebuild. Ranks are taken over only by the same package with the same settings and files.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

from cluster.actors.group.detached_actors import DetachedOptions, DetachedRanks
from cluster.actors.group.detached_group import DetachedGroup
from cluster.actors.group.placement import PlacementConfig
from cluster.actors.programs.serve_program import ServeProgram
from cluster.actors.programs.serve_spec import FlightSpec, ServeSpec
from cluster.frontend.ledger.request_ledger import Ledger
from cluster.rpc.services.control_service import software_version
from launch.serving.resolve_serve import StateConfig

log = logging.getLogger(__name__)
FILE = "ranks.json"


@dataclass(frozen=True)
class State:
    """What of a server outlives its process; nothing without a state folder."""

    ledger: Ledger | None = None
    file: StateFile | None = None


@contextmanager
def saved_state(
    config: StateConfig | None, program: ServeProgram, replicas: int, placement: PlacementConfig
) -> Iterator[State]:
    """The folder is this command's for as long as the block lasts."""
    if config is None:
        yield State()
        return
    ledger = Ledger(config.folder, identity_of(program), config.ledger)
    try:
        yield State(ledger, StateFile(config.folder, program, replicas, placement) if config.ranks else None)
    finally:
        ledger.close()


@dataclass(frozen=True)
class Left:
    """One replica that an earlier command left at work."""

    authkey: bytes
    where: DetachedRanks


class StateFile:
    """Ranks that outlive the command. From any thread."""

    def __init__(self, folder: Path, program: ServeProgram, replicas: int, placement: PlacementConfig) -> None:
        self._path = folder / FILE
        self._identity = identity_of(program, str(placement.strategy), str(replicas))
        self._timeout_s = placement.orphan_timeout_s
        self._replicas = replicas
        place = f"{socket.gethostname()}:{folder}"  # found again by the next command even without the file
        self._name = f"tp-decoders-{sha256(place.encode()).hexdigest()[:12]}"
        self._lock = threading.Lock()

    def detached(self, replica: int) -> DetachedOptions:
        return DetachedOptions(name=f"{self._name}-{replica}", orphan_timeout_s=self._timeout_s)

    def left(self) -> list[Left] | None:
        """What an earlier command left of every replica; None where there is none, or it was another server."""
        try:
            values = json.loads(self._path.read_text(encoding="utf-8"))
            if values["identity"] != self._identity or len(values["replicas"]) != self._replicas:
                log.warning("the ranks that were left serve something else: they are ended, others are started")
                return None
            return [_left(each) for each in values["replicas"]]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be read (%s): ranks are started anew", self._path, error)
            return None

    def write(self, groups: Sequence[DetachedGroup], specs: Sequence[ServeSpec]) -> None:
        """As of now; a reader sees the old file or the new one."""
        replicas = [
            {"authkey": spec.authkey.hex(), "where": asdict(group.whereabouts)}
            for group, spec in zip(groups, specs, strict=True)
        ]
        text = json.dumps({"identity": self._identity, "replicas": replicas})
        draft = self._path.with_suffix(".part")
        with self._lock:
            try:
                file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
                with os.fdopen(file, "w", encoding="utf-8") as open_file:
                    open_file.write(text)
                draft.replace(self._path)
            except OSError as error:
                log.error("%s cannot be written (%s): a restart would start the ranks anew", self._path, error)

    def clear(self) -> None:
        """The ranks were ended in order."""
        with self._lock:
            self._path.unlink(missing_ok=True)


def _left(values: dict[str, dict[str, list[str]]]) -> Left:
    where = values["where"]
    whereabouts = DetachedRanks(
        actors=tuple(map(str, where["actors"])),
        placement=str(where["placement"]),
        bundles=tuple(map(int, where["bundles"])),
        life=int(where["life"]),  # type: ignore[call-overload]
    )
    return Left(bytes.fromhex(str(values["authkey"])), whereabouts)


def identity_of(program: ServeProgram, *more: str) -> str:
    """A digest of all that decides on answers: settings, the checkpoint's files as they are now, this package."""
    plain = replace(program, flight=FlightSpec())
    folders = [Path(folder) for folder in (program.model, program.adapter) if folder]
    files = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for folder in folders
        for path in sorted(folder.iterdir())
        if path.is_file()
    ]
    return sha256(repr((plain, files, software_version(), *more)).encode()).hexdigest()

"""Models of the Hugging Face hub, by name: `ORG/NAME` or `ORG/NAME@revision` wherever a folder is taken.

    locate("EleutherAI/pythia-70m@main")    a folder: of that name here, else the commit's snapshot in the hub's cache

A revision is resolved to its commit once; what is handed on is the snapshot's folder, which names repository and
commit, so that a rank on another node finds or fetches the very same (`here`). huggingface_hub does the work and reads
its own environment: HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE. Weights come last: a fetch that was
broken off is never taken for whole.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import requests
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from parallel.errors import CheckpointError, ConfigError
from tp_decoders.hub.hub_errors import broke_off, explained, is_transient, is_unreachable
from tp_decoders.hub.snapshot_cache import (
    CHECKPOINT,
    COMMIT,
    Cached,
    Wanted,
    cached_of,
    files_of,
    is_whole,
    last_seen,
    refuse_incomplete,
    templates,
)
from tp_decoders.registry import read_config

log = logging.getLogger(__name__)
log.setLevel(logging.INFO)  # what is fetched from elsewhere is said whatever else is

PAUSES_S = (0.5, 2.0)
"""Before the second and third attempt of what the hub or the network failed to do."""
FAILURES = (HfHubHTTPError, requests.RequestException, TypeError, LookupError, AttributeError)
"""What huggingface_hub raises, also where an answer is none of a hub."""
SPARE = 1 << 28
"""Bytes of the disk that a fetch leaves free."""
REVISION = re.compile(r"[A-Za-z0-9_][\w.+-]*(/[A-Za-z0-9_][\w.+-]*)*")
_T = TypeVar("_T")


@dataclass(frozen=True)
class HubName:
    """A repository and a revision of it: a branch, a tag or a commit."""

    repo: str
    revision: str = "main"

    def __str__(self) -> str:
        return self.repo if self.revision == "main" else f"{self.repo}@{self.revision}"

    @staticmethod
    def of(text: str) -> HubName | None:
        """None for what can only be a path; an error for what can only be a name and is none."""
        repo, at, revision = text.partition("@")
        if repo.count("/") != 1 or repo[0] in "/.~" or repo[-1] == "/":
            return None
        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            raise ConfigError(
                f"{text} is no folder here and no name on the Hugging Face hub, which is ORG/NAME[@revision]: "
                f"{str(error).splitlines()[0]}"
            ) from error
        if at and not REVISION.fullmatch(revision):
            raise ConfigError(f"{text}: {revision!r} is no revision; give a branch, a tag or a commit after the @")
        return HubName(repo, revision or "main")


def locate(model: str | Path, wanted: Wanted = CHECKPOINT) -> Path:
    """The folder that a path or a name of the hub stands for; fetches what is not here yet. A folder wins over a
    repository of its name. What is neither comes back as it is, for its reader to refuse.
    """
    text = str(model)
    path = Path(model).expanduser()
    if path.exists():
        if path.is_dir() and is_name(text):
            log.info("%s is a folder here: it is read, not the hub's repository of that name", text)
        return path
    name = HubName.of(text)
    return path if name is None else _fetch(name, wanted)


def here(folder: str | Path, wanted: Wanted = CHECKPOINT) -> Path:
    """A folder that `locate` gave on another host, as this one has it: the same commit, fetched where it is missing."""
    path, cached = Path(folder), cached_of(folder)
    return path if cached is None or is_whole(path, wanted) else locate(f"{cached.repo}@{cached.commit}", wanted)


def pin(model: str | Path) -> str:
    """A name with its revision's commit in the revision's place; what is no name, or a folder here, as it is."""
    name = None if Path(model).expanduser().exists() else HubName.of(str(model))
    return str(model) if name is None else f"{name.repo}@{_listed(name).cached.commit}"


def is_name(model: str | Path) -> bool:
    """Whether a text could be a name of the hub, whatever folders there are."""
    try:
        return HubName.of(str(model)) is not None
    except ConfigError:
        return False


def shown_name(folder: Path) -> str:
    """What to call a folder's model: the repository and the beginning of its commit, or the folder's name."""
    cached = cached_of(folder)
    return folder.name if cached is None else f"{cached.repo}@{cached.commit[:12]}"


@dataclass(frozen=True)
class _Listing:
    """A commit and its files with their sizes; None for the files where the hub was not reached."""

    cached: Cached
    files: Mapping[str, int] | None


def _fetch(name: HubName, wanted: Wanted) -> Path:
    pinned = Cached(name.repo, name.revision)
    if COMMIT.fullmatch(name.revision) and pinned.knows_all(wanted):
        return pinned.folder
    listing = _listed(name)
    cached = listing.cached
    if listing.files is None:
        if not is_whole(cached.folder, wanted):
            raise CheckpointError(
                f"{name} is not whole in the cache {constants.HF_HUB_CACHE} and the hub cannot be asked "
                f"({_why_not_asked()}); fetch it once with the network"
            )
        return cached.folder
    refuse_incomplete(f"{name} on {constants.ENDPOINT}", wanted, listing.files)
    layout = wanted.layout(listing.files)
    if not cached.knows_all(wanted) or (layout and not (cached.folder / layout).is_file()):
        _download(name, cached, listing.files, wanted)
    cached.note(name.revision, [file for file in wanted.small if file not in listing.files])
    return cached.folder


def _listed(name: HubName) -> _Listing:
    """Asks the hub for the commit and its files; where it cannot be asked, the cache for the commit last seen."""
    seen = last_seen(name.repo, name.revision)
    if constants.HF_HUB_OFFLINE:
        if seen is None or not seen.folder.is_dir():
            raise CheckpointError(
                f"{name} is no folder here and not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; "
                "fetch it once without that"
            )
        return _Listing(seen, None)
    api, limit = HfApi(endpoint=constants.ENDPOINT), constants.HF_HUB_ETAG_TIMEOUT
    try:
        info = _tried(
            lambda: api.model_info(name.repo, revision=name.revision, files_metadata=True, timeout=limit), name
        )
    except _Unreachable as error:
        if seen is None or not seen.folder.is_dir():
            raise CheckpointError(f"{error}; it is not in the cache {constants.HF_HUB_CACHE} either") from error
        log.warning("%s; commit %s is taken from the cache", error, seen.commit[:12])
        return _Listing(seen, None)
    files = {file.rfilename: file.size if isinstance(file.size, int) else 0 for file in info.siblings or ()}
    if not COMMIT.fullmatch(info.sha or ""):
        raise CheckpointError(f"{name}: {constants.ENDPOINT} names no commit; is HF_ENDPOINT a Hugging Face hub?")
    return _Listing(Cached(name.repo, str(info.sha)), files)


def _download(name: HubName, cached: Cached, listed: Mapping[str, int], wanted: Wanted) -> None:
    """Small files first, by which the model is judged, weights last: where those are, everything is."""

    def get(file: str) -> Path:
        if file not in listed:
            raise CheckpointError(f"{name} on {constants.ENDPOINT} has no {file}, which its index names")
        got = _tried(
            lambda: hf_hub_download(name.repo, file, revision=cached.commit, endpoint=constants.ENDPOINT), name, file
        )
        return Path(got)

    for file in (*wanted.small, *templates(listed, wanted)):
        if file in listed:
            get(file)
    if wanted is CHECKPOINT:
        read_config(cached.folder, unread="ignore")  # another family is refused before gigabytes of it are here
    layout = wanted.layout(listed)
    if layout is None:
        return
    files = [file for file in files_of(layout, get) if not (cached.folder / file).is_file()]
    total = sum(listed.get(file, 0) for file in files)
    log.info(
        "fetching %s, commit %s, from %s: %d file(s) of weights, %.2f GB", name.repo, cached.commit[:12],
        constants.ENDPOINT, len(files), total / 1e9,
    )  # fmt: skip
    _check_room(name, total)
    for file in files:
        get(file)


def _check_room(name: HubName, nbytes: int) -> None:
    home = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(place for place in (home, *home.parents) if place.exists())).free
    if nbytes + SPARE > free and nbytes:
        raise CheckpointError(
            f"{name} needs {nbytes / 1e9:.1f} GB in {home}, where {free / 1e9:.1f} GB are free; make room, or give "
            "another folder as HF_HUB_CACHE"
        )


class _Unreachable(CheckpointError):
    """The hub did not answer, or with an error of its own."""


def _tried(call: Callable[[], _T], name: HubName, file: str | None = None) -> _T:
    """The call's result; what is the hub's or the network's fault is tried again, the rest put into one line."""
    for pause in (*PAUSES_S, None):
        try:
            return call()
        except (*FAILURES, OSError, ValueError) as error:
            tried_already = file is not None and is_unreachable(error) and not broke_off(error)  # by huggingface_hub
            if pause is None or tried_already or not is_transient(error):
                kind = _Unreachable if is_unreachable(error) else CheckpointError
                raise kind(explained(error, str(name), file)) from error
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _why_not_asked() -> str:
    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"no answer from {constants.ENDPOINT}"

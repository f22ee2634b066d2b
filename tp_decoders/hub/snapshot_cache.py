"""What of a repository of the Hugging Face hub is read, and what of that lies in the hub's cache on this host.

    HF_HUB_CACHE/models--ORG--NAME/refs/main                 the commit that a branch or tag was last seen at
                                   snapshots/COMMIT/...      the files, as links
                                   .no_exist/COMMIT/...      names that the commit is known not to have

The layout is huggingface_hub's own, which transformers shares: what one fetched the other finds. No network here.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from parallel.errors import CheckpointError
from tp_decoders.files.companion_files import COMPANIONS, TEMPLATE_FOLDER
from tp_decoders.files.tensor_files import LAYOUTS, read_weight_map

COMMIT = re.compile(r"[0-9a-f]{40}")
SNAPSHOT = re.compile(r"models--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is read of a repository: `small` files where it has them, some it must have, and the first of `weights`.
    A name that ends in .index.json stands for the files it names, too.
    """

    what: str
    small: tuple[str, ...]
    needed: tuple[str, ...]
    weights: tuple[str, ...] = ()

    def layout(self, names: Collection[str]) -> str | None:
        """The file, or index, of the weights: safetensors before .bin."""
        return next((name for name in self.weights if name in names), None)

    def lacks(self, names: Collection[str]) -> str | None:
        """Which of the files that it takes are not among these, if any."""
        missing = [name for name in self.needed if name not in names]
        if self.weights and self.layout(names) is None:
            missing.append(f"any of {', '.join(self.weights)}")
        return ", ".join(missing) or None


CHECKPOINT = Wanted(what="checkpoint", small=("config.json", *COMPANIONS), needed=("config.json",), weights=LAYOUTS)
CONFIG = Wanted(what="configuration", small=("config.json",), needed=("config.json",))
TOKENIZER = Wanted(what="tokenizer", small=("config.json", *COMPANIONS), needed=())
ADAPTER = Wanted(
    what="adapter", small=("adapter_config.json",), needed=("adapter_config.json",),
    weights=("adapter_model.safetensors", "adapter_model.bin"),
)  # fmt: skip


@dataclass(frozen=True)
class Cached:
    """A commit of a repository, as far as it lies in the cache."""

    repo: str
    commit: str

    @property
    def folder(self) -> Path:
        return _home(self.repo) / "snapshots" / self.commit

    @property
    def _absent(self) -> Path:
        return _home(self.repo) / ".no_exist" / self.commit

    def knows_all(self, wanted: Wanted) -> bool:
        """Whether the hub need not be asked: everything is here or is known not to be in the commit."""
        known = all((self.folder / name).is_file() or (self._absent / name).is_file() for name in wanted.small)
        return known and is_whole(self.folder, wanted)

    def note(self, revision: str, absent: Iterable[str]) -> None:
        """For later, without the network: the revision is this commit, which has none of these files."""
        with contextlib.suppress(OSError):  # a cache that may only be read serves as well; it is asked again
            for name in absent:
                self._absent.mkdir(parents=True, exist_ok=True)
                (self._absent / name).touch()
            ref = _home(self.repo) / "refs" / revision
            if revision != self.commit and (not ref.is_file() or ref.read_text(encoding="utf-8") != self.commit):
                ref.parent.mkdir(parents=True, exist_ok=True)
                ref.write_text(self.commit, encoding="utf-8")


def last_seen(repo: str, revision: str) -> Cached | None:
    """The commit of a revision when the hub was last asked; None where it never was."""
    if COMMIT.fullmatch(revision):
        return Cached(repo, revision)
    try:
        commit = (_home(repo) / "refs" / revision).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return Cached(repo, commit) if COMMIT.fullmatch(commit) else None


def cached_of(folder: str | Path) -> Cached | None:
    """The repository and commit that a folder of any host's cache holds; None for other folders."""
    match = SNAPSHOT.fullmatch("/".join(Path(folder).parts[-3:]))
    return Cached(match["repo"].replace("--", "/", 1), match["commit"]) if match else None


def is_whole(folder: Path, wanted: Wanted) -> bool:
    """Whether what must be there is; small files that a repository may lack are not missed."""
    present = [name for name in {*wanted.small, *wanted.weights} if (folder / name).is_file()]
    if not present or wanted.lacks(present):
        return False
    layout = wanted.layout(present)
    return layout is None or all((folder / name).is_file() for name in files_of(layout, lambda name: folder / name))


def files_of(layout: str, get: Callable[[str], Path]) -> list[str]:
    """The files that hold the weights: the layout itself, or what an index names."""
    return sorted(set(read_weight_map(get(layout)).values())) if layout.endswith(".index.json") else [layout]


def templates(names: Iterable[str], wanted: Wanted) -> list[str]:
    """The chat templates in a folder of their own, where a tokenizer is read."""
    pattern = re.compile(rf"{TEMPLATE_FOLDER}/\w[\w.-]*\.jinja")
    return [name for name in names if pattern.fullmatch(name)] if COMPANIONS[0] in wanted.small else []


def _home(repo: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def refuse_incomplete(where: str, wanted: Wanted, names: Collection[str]) -> None:
    """An error where a repository has not what is read of it."""
    lacking = wanted.lacks(names)
    if lacking is None:
        return
    others = sorted(names)
    shown = ", ".join(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else "")
    hint = ""
    if wanted is not ADAPTER and "adapter_config.json" in names:
        hint = "; it is an adapter: give it as --adapter, and its base model as --model"
    raise CheckpointError(f"{where} is no {wanted.what} this project reads: it lacks {lacking}; it holds {shown}{hint}")

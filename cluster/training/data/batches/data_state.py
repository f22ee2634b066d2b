"""Where a run is in its data, as a value that goes into a checkpoint: a place in the order of one dataset, and nothing
of how it is dealt out. The same state continues the same sequence of samples on any number of ranks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster.training.data.corpus.document import DataError

REASONS = {
    "tokenizer": "its tokens are another tokenizer's",
    "corpus": "its tokens are not the same (files were added, removed or changed)",
    "tokens_per_sample": "its rows are of another length",
}


class Folder(Protocol):
    """Where a dataset's tokens lie."""

    @property
    def folder(self) -> Path: ...


class Dataset(Protocol):
    """What a place in the data asks of them: what decides their order, and how many pieces an epoch has."""

    @property
    def identity(self) -> dict[str, Any]: ...

    @property
    def num_pieces(self) -> int: ...

    @property
    def store(self) -> Folder: ...


@dataclass(frozen=True, kw_only=True)
class DataState:
    """The next sample: number `sample` of the run, starting at `position` of `epoch`'s order of pieces. `batches` were
    dealt so far.
    """

    identity: dict[str, Any]
    epoch: int = 0
    position: int = 0
    sample: int = 0
    batches: int = 0

    @staticmethod
    def start(dataset: Dataset) -> DataState:
        return DataState(identity=dict(dataset.identity))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: object) -> DataState:
        """A state that was saved; an error where it is not one."""
        names = ("epoch", "position", "sample", "batches")
        if not isinstance(value, dict) or set(value) != {"identity", *names} or not isinstance(value["identity"], dict):
            raise DataError(
                f"the saved position in the data is not one: {value!r:.200}; resume from another checkpoint"
            )
        for name in names:
            if type(value[name]) is not int or value[name] < 0:
                raise DataError(
                    f"the saved position in the data has {name} = {value[name]!r}, not a count; resume from another "
                    "checkpoint"
                )
        return DataState(**value)

    def check(self, dataset: Dataset) -> None:
        """An error unless this is a place in `dataset`."""
        for name, mine in dataset.identity.items():
            saved = self.identity.get(name)
            if saved != mine:
                reason = REASONS.get(name, f"its {name} differs")
                raise DataError(
                    f"{dataset.store.folder} cannot continue the saved run: {reason} ({name} was {saved!r}, is "
                    f"{mine!r}); give the data of the saved run, or start at the beginning of this one"
                )
        if self.position >= dataset.num_pieces:
            raise DataError(
                f"the saved position {self.position} is beyond the {dataset.num_pieces} pieces of "
                f"{dataset.store.folder}; resume from another checkpoint"
            )

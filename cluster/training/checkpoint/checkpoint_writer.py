"""One save on one rank: which tensors it writes, decided while the caller waits, and the writing, which a thread does.

    rank 0 lays the files out --ready--> every rank writes its own byte ranges --done-r--> rank 0 adds config, state and
    checksums and gives the draft its name

Nothing is copied but a piece at a time: weights and moments are read as they are, so they may not change before
`read` is set, which the Checkpointer sees to. The ranks meet through files in the draft, and hear of a failure
through a FailureNotice; there is no collective here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.training.checkpoint.save_failure import FailureNotice
from cluster.training.step.optimizer import LocalState, ShardedAdamW
from parallel.errors import CheckpointError
from parallel.ranks.mesh import Groups
from parallel.sharding.rules import full_shape_of
from tp_decoders.adapters.peft_files import CONFIG as ADAPTER_CONFIG
from tp_decoders.adapters.peft_files import adapter_config, adapter_tensors
from tp_decoders.checkpoint.config_writer import config_to_write
from tp_decoders.checkpoint.slice_writer import SliceFiles, TensorPlan, owned_pieces
from tp_decoders.files.companion_files import companions, copy_files
from tp_decoders.model.decoder import Decoder
from tp_decoders.model.tensor_names import Name
from tp_decoders.registry import family_of

MAX_FILE_BYTES = 5_000_000_000
STEP_NAME = re.compile(r"step-(\d{8})")
STATE = Path("training") / "state.json"
POLL_S = 0.02
TOKEN = "[0-9a-f]" * 8


@dataclass(frozen=True)
class Line:
    """A parameter on its way to disk: its name there, whether it lies transposed, and itself."""

    name: Name
    theirs: str
    ours: str
    parameter: Tensor


@dataclass(frozen=True, kw_only=True)
class SaveOrder:
    """What a save is told besides the tensors. `latest`: it becomes the run's newest, and older ones are pruned."""

    target: Path
    groups: Groups
    notice: FailureNotice
    dropped: threading.Event
    timeout_s: float
    keep: int
    latest: bool
    extra: Mapping[str, Any]


Part = tuple[SliceFiles, Line, str, Tensor, tuple[int, int] | None]
"""The files, the parameter, what follows its name there, this rank's shard or its elements of it."""


class CheckpointWriter:
    """Made while the caller waits; `run` in a thread."""

    def __init__(self, order: SaveOrder, model: Decoder, optimizer: ShardedAdamW | None) -> None:
        self.order, self.target, self.notice = order, order.target, order.notice
        self.step, self.source = optimizer.steps if optimizer else None, model.source
        self.config_name, self.config = described(model)
        self.tp, self.dp = order.groups.tp, order.groups.dp
        self.leads = self.tp.rank == 0 and self.dp.rank == 0
        self.draft = order.notice.path.with_suffix(".part")
        lines = lines_of(model)
        self.read, self.all_read = threading.Event(), threading.Event()
        moments = _moments(optimizer, lines) if optimizer else []
        stem = "adapter_model" if model.lora else "model"
        self.weights = SliceFiles(
            self.draft, stem, [_plan(line, line.parameter.dtype, "") for line in lines], MAX_FILE_BYTES
        )
        self.state = SliceFiles(
            self.draft / "training",
            "optimizer",
            [_plan(line, torch.float32, f".{own.kind}") for line, own in moments],
            MAX_FILE_BYTES,
        )
        weights = lines if self.dp.rank == 0 else []
        self.parts: list[Part] = [(self.weights, line, "", line.parameter.detach(), None) for line in weights]
        self.parts += [(self.state, line, f".{own.kind}", own.values, own.elements) for line, own in moments]

    def run(self) -> Path:
        if self.leads:
            self._lay_out()
        self._await("laid out", [self.draft / "ready"])
        for files, line, suffix, local, elements in self.parts:
            self._check_dropped()
            for index, piece in owned_pieces(line.parameter, local, self.tp.rank, elements):
                transposed = line.name.transposed
                files.write(
                    line.theirs + suffix, index[::-1] if transposed else index, piece.t() if transposed else piece
                )
        self._let_go()
        self.weights.sync()
        if self.step is not None:
            self.state.sync()
        (self.draft / f"done-{self._number}").touch()
        if self.leads:
            self._commit()
        self._await("committed", [self.target / (self.config_name if self.step is None else STATE)])
        return self.target

    def fail(self, error: BaseException) -> CheckpointError:
        """What the save's future raises; all ranks learn of it, and the draft goes."""
        self._let_go()
        self.all_read.set()
        found = failure(self.order, error)
        if self.leads:
            shutil.rmtree(self.draft, ignore_errors=True)
        return found

    def _let_go(self) -> None:
        """The tensors may change."""
        self.parts.clear()
        self.read.set()

    @property
    def _number(self) -> int:
        return self.dp.rank * self.tp.size + self.tp.rank

    def _check_dropped(self) -> None:
        if self.order.dropped.is_set():
            raise CheckpointError(f"the save of {self.target} was given up before it was written")

    def _lay_out(self) -> None:
        if os.path.lexists(self.target):
            raise CheckpointError(f"{self.target} exists already; a checkpoint is never written over")
        _clear(self.target, self.notice)
        (self.draft / "training" if self.step is not None else self.draft).mkdir(parents=True)
        self.weights.lay_out()
        if self.step is not None:
            self.state.lay_out()
        (self.draft / "ready").touch()

    def _await(self, what: str, paths: list[Path]) -> None:
        limit = time.monotonic() + self.order.timeout_s
        while not all(path.exists() for path in paths):
            if (cause := self.notice.heard()) is not None:
                raise CheckpointError(cause)
            if self.order.dropped.is_set():
                raise CheckpointError(f"the save of {self.target} was given up before it was {what}")
            if time.monotonic() > limit:
                absent = ", ".join(path.name for path in paths if not path.exists())
                raise CheckpointError(
                    f"{self.target} was not {what} within {self.order.timeout_s:g} s; waiting for {absent}"
                )
            time.sleep(POLL_S)

    def _commit(self) -> None:
        self._await("written", [self.draft / f"done-{number}" for number in range(self.tp.size * self.dp.size)])
        self.all_read.set()
        for path in (self.draft / "ready", *self.draft.glob("done-*")):
            path.unlink()
        self.weights.write_index()
        self._write_config()
        if self.step is not None:
            self._write_state()
        if os.path.lexists(self.target):  # in the meantime; a rename would replace an empty folder
            raise CheckpointError(f"{self.target} exists already; a checkpoint is never written over")
        os.rename(self.draft, self.target)
        if self.order.latest:
            _point_to(self.target.parent, self.target.name)
            self._prune()

    def _write_state(self) -> None:
        files = sorted(path for path in self.draft.rglob("*") if path.is_file())
        state = {
            "step": self.step,
            "layout": {"tp": self.tp.size, "dp": self.dp.size},
            "extra": self.order.extra,
            "sha256": {str(path.relative_to(self.draft)): digest(path) for path in files},
        }
        _write_synced(self.draft / STATE, json.dumps(state, indent=1))

    def _write_config(self) -> None:
        _write_synced(self.draft / self.config_name, json.dumps(self.config, indent=2, sort_keys=True) + "\n")
        if self.source is not None:
            copy_files(companions(self.source), self.draft)

    def _prune(self) -> None:
        for old in complete_steps(self.target.parent)[: -self.order.keep] if self.order.keep else []:
            shutil.rmtree(old, ignore_errors=True)


def run(job: CheckpointWriter, future: Future[Path]) -> None:
    try:
        future.set_result(job.run())
    except BaseException as error:  # noqa: BLE001  it belongs to whoever waits for the future
        future.set_exception(job.fail(error))


def failure(order: SaveOrder, error: BaseException) -> CheckpointError:
    """The cause that another rank gave first, or this one's, told to all."""
    heard = order.notice.heard()
    if heard is not None:
        return CheckpointError(heard)
    cause = str(error) if isinstance(error, CheckpointError) else f"cannot write {order.target}: {error!r}"
    if order.groups.tp.size > 1:
        cause = f"rank {order.groups.tp.rank}: {cause}"
    order.notice.tell(cause)
    return CheckpointError(cause)


def _clear(target: Path, present: FailureNotice) -> None:
    """Removes what earlier saves of this name that were killed or failed have left."""
    for left in target.parent.glob(f".{target.name}.{TOKEN}.part"):
        shutil.rmtree(left, ignore_errors=True)
    for notice in target.parent.glob(f".{target.name}.{TOKEN}.failed*"):
        if not notice.name.startswith(present.path.name):  # another rank may have failed already
            notice.unlink(missing_ok=True)


def complete_steps(root: Path) -> list[Path]:
    """The complete checkpoints of a run, by step."""
    if not root.is_dir():
        return []
    return sorted(p for p in root.glob("step-*") if STEP_NAME.fullmatch(p.name) and (p / STATE).is_file())


def described(model: Decoder) -> tuple[str, Mapping[str, Any]]:
    """The name and contents of the file that describes a checkpoint: the adapter's where there is one."""
    if model.lora is not None:
        return ADAPTER_CONFIG, adapter_config(model)
    return "config.json", config_to_write(model.config, next(model.parameters()).dtype)


def lines_of(model: Decoder) -> list[Line]:
    """What a checkpoint holds: the adapter alone where there is one (its base does not change), else all weights."""
    if model.lora is not None:
        return [Line(Name(theirs, ours), theirs, ours, p) for theirs, ours, p in adapter_tensors(model)]
    names = family_of(model.config.model_type).names
    return [Line(*names.theirs(ours), ours, parameter) for ours, parameter in model.named_parameters()]


def _plan(line: Line, dtype: torch.dtype, suffix: str) -> TensorPlan:
    shape = full_shape_of(line.parameter)
    return TensorPlan(line.theirs + suffix, shape[::-1] if line.name.transposed else shape, dtype)


def _moments(optimizer: ShardedAdamW, lines: list[Line]) -> list[tuple[Line, LocalState]]:
    """The optimiser's part of this rank, in the order of the files."""
    by_name = {line.ours: line for line in lines}
    found = [(by_name[own.name], own) for own in optimizer.local_state()]
    return sorted(found, key=lambda entry: (entry[0].theirs, entry[1].kind))


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _point_to(root: Path, name: str) -> None:
    draft = root / ".latest.part"
    _write_synced(draft, name + "\n")
    os.replace(draft, root / "latest")

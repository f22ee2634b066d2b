"""Training checkpoints: a Hugging Face checkpoint, plus a folder with the optimiser and the state of the run.

    ROOT/step-00000100/  config.json  model*.safetensors  tokenizer files   what transformers opens
                         training/optimizer*.safetensors    moments (and masters), divided like their parameters
                         training/state.json                step, data position, layout, checksums of every file
    ROOT/latest          the name of the newest complete checkpoint

Every rank writes its own byte ranges; nothing is gathered. A save returns at once and a thread writes from the very
tensors, in pieces: the next update waits until they are read (`settle`). The folder gets its name when every rank has
synced its part, so a kill at any moment leaves the last good one. A rank that fails tells the others (save_failure.py),
and nobody waits for it. Moments are stored as full tensors: any layout resumes from them. Of a model with an adapter
only the adapter is saved, in PEFT's files.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cluster.training.checkpoint.checkpoint_writer import (
    STATE,
    CheckpointWriter,
    Line,
    SaveOrder,
    complete_steps,
    digest,
    failure,
    lines_of,
    run,
)
from cluster.training.checkpoint.save_failure import FailureNotice
from cluster.training.step.optimizer import ShardedAdamW
from parallel.errors import CheckpointError, CollectiveError
from parallel.ranks.mesh import Groups
from parallel.sharding.rules import Index, full_shape_of, rule_of
from tp_decoders.files.tensor_files import SafetensorsFile
from tp_decoders.model.decoder import Decoder

log = logging.getLogger(__name__)
MOMENTS = ("exp_avg", "exp_avg_sq")
DAMAGED = "damaged-"
READERS = 8


@dataclass(frozen=True)
class SavedState:
    """What a checkpoint says of the run it was taken from."""

    folder: Path
    step: int
    extra: Mapping[str, Any]


class Checkpointer:
    """One rank's side of saving and resuming under one root folder. All ranks call the same methods in the same
    order.
    """

    def __init__(self, root: Path, groups: Groups, keep: int = 2, timeout_s: float = 600.0) -> None:
        self.root, self.groups, self.keep, self.timeout_s = root, groups, keep, timeout_s
        self._pending: Future[Path] | None = None
        self._dropped = threading.Event()
        self._job: CheckpointWriter | None = None
        self._unread: list[CheckpointWriter] = []
        self._unsettled = False

    def save(
        self, model: Decoder, optimizer: ShardedAdamW | None, extra: Mapping[str, Any], name: str | None = None
    ) -> Future[Path]:
        """Begins to write and returns; the future is done when the checkpoint is complete, or has failed on some
        rank. Nothing of the model and the optimiser may change before `settle`. An earlier save is waited for first.
        Without an optimiser it is a plain Hugging Face checkpoint; only one without a name of its own becomes
        `latest`.
        """
        self._job, self._unsettled = None, True
        self.wait()
        assert name is not None or optimizer is not None, "the steps taken are a checkpoint's name unless one is given"
        target = self.root / (name or f"step-{optimizer.steps if optimizer else 0:08d}")
        token = _agreed_token(self.groups)
        self._dropped = threading.Event()
        order = SaveOrder(
            target=target, groups=self.groups, dropped=self._dropped, timeout_s=self.timeout_s, keep=self.keep,
            notice=FailureNotice(target.parent, f"{target.name}.{token}", self.groups.store),
            latest=name is None, extra=dict(extra),
        )  # fmt: skip
        self._pending = future = Future[Path]()
        try:
            job = self._job = CheckpointWriter(order, model, optimizer)
            self._unread.append(job)
        except CollectiveError:
            raise
        except Exception as error:  # noqa: BLE001  whatever it is, all ranks must learn of it
            future.set_exception(failure(order, error))
            return future
        threading.Thread(target=run, args=(job, future), name=f"checkpoint {target.name}", daemon=True).start()
        return future

    @property
    def reading(self) -> bool:
        """On rank 0: whether some rank still reads what a save writes."""
        return self._job is not None and not self._job.all_read.is_set()

    def settle(self) -> None:
        """On every rank at once, before weights or moments change: waits until those of a save under way are read."""
        if not self._unsettled:
            return
        for job in self._unread:
            if not job.read.wait(self.timeout_s):
                raise CheckpointError(f"{job.target} was not read within {self.timeout_s:g} s; no step can be taken")
        self._unread.clear()
        self._unsettled = False
        for group in (self.groups.dp, self.groups.tp):
            if group.size > 1:
                group.talk.barrier(self.timeout_s)  # ranks whose disks are slower are waited for

    def drop(self) -> None:
        """Forgets the save under way, which is known to be over elsewhere; its thread ends at its next wait."""
        self._dropped.set()
        self._pending = None

    def wait(self) -> Path | None:
        """Waits for the save under way, if any, and raises what went wrong in it."""
        pending, self._pending = self._pending, None
        return None if pending is None else pending.result(self.timeout_s)

    def latest(self) -> Path | None:
        """The newest complete checkpoint: what `latest` names, or else the highest step that is there."""
        return latest_checkpoint(self.root)


def latest_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint of a run, None where there is none."""
    steps = complete_steps(root)
    pointer = root / "latest"
    if pointer.is_file():
        named = root / Path(pointer.read_text(encoding="utf-8").strip()).name
        if (named / STATE).is_file() and (not steps or named.name >= steps[-1].name):
            return named
    return steps[-1] if steps else None


def sound_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint whose files are those that were written; None where there is none at all. A damaged one is
    named in the log and gets another name, so that the run goes on from the one before; an error where all are damaged.
    """
    refused: CheckpointError | None = None
    while (newest := latest_checkpoint(root)) is not None:
        try:
            verify(newest)
            return newest
        except CheckpointError as error:
            refused, aside = error, newest.with_name(f"{DAMAGED}{newest.name}")
            log.error("%s; it is now %s, and the run goes on from the one before", error, aside.name)
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(newest, aside)
    if refused is not None:
        raise CheckpointError(f"{refused}; {root} has no other: choose a new folder to begin anew") from refused
    return None


def read_state(folder: Path) -> SavedState:
    """The state of a checkpoint; an error naming the file where it is missing, damaged or of another version."""
    path = folder / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return SavedState(folder, int(state["step"]), state["extra"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not the state of a complete training checkpoint ({error!r}); resume from another"
        ) from error


def verify(folder: Path) -> None:
    """Compares every file with the checksum written beside it; one error names all that differ."""
    read_state(folder)
    sums: dict[str, str] = json.loads((folder / STATE).read_text(encoding="utf-8"))["sha256"]

    def differs(name: str) -> bool:
        return not (folder / name).is_file() or digest(folder / name) != sums[name]

    with ThreadPoolExecutor(READERS) as readers:
        bad = [name for name, different in zip(sums, readers.map(differs, sums), strict=True) if different]
    if bad:
        raise CheckpointError(
            f"{folder}: {', '.join(sorted(bad))} differ from their checksums; resume from another checkpoint"
        )


@torch.no_grad()
def restore_optimizer(folder: Path, model: Decoder, optimizer: ShardedAdamW, groups: Groups) -> None:
    """Reads step, masters and moments into the optimiser, whatever layout they were written by. The weights are
    `load`'s.
    """
    lines = {line.ours: line for line in lines_of(model)}
    with ExitStack() as stack:
        files = [SafetensorsFile(path, stack) for path in sorted((folder / "training").glob("optimizer*.safetensors"))]
        where = {name: file for file in files for name in file.shapes}
        optimizer.prepare_state(read_state(folder).step)
        for flat in optimizer.flats:
            for ours in flat.parameters:
                for moment in (*MOMENTS, "master"):
                    stored = f"{lines[ours].theirs}.{moment}"
                    if stored in where:
                        local = read_local(where[stored], stored, lines[ours], groups.tp.rank)
                        optimizer.restore(flat, ours, moment, local)
                    elif moment in MOMENTS:
                        raise CheckpointError(f"{folder / 'training'} holds no {stored}; it belongs to another model")


class Tensors(Protocol):
    """A file, or all files of a folder, from which slices of named tensors are read."""

    def read(self, name: str, index: Index) -> Tensor: ...


def read_local(file: Tensors, stored: str, line: Line, rank: int) -> Tensor:
    """A rank's shard of a tensor that lies under the name `stored`, divided like the line's parameter."""
    rule = rule_of(line.parameter)
    pieces = []
    for index in rule.pieces(full_shape_of(line.parameter), rank):
        piece = file.read(stored, index[::-1] if line.name.transposed else index)
        pieces.append(piece.t() if line.name.transposed else piece)
    return torch.cat(pieces, rule.dim) if len(pieces) > 1 else pieces[0]


def _agreed_token(groups: Groups) -> str:
    """A name for this save alone, the same on all ranks: what a killed one left behind is never taken for it."""
    token = secrets.token_hex(4).encode()
    for group in (groups.dp, groups.tp):
        if group.size > 1:
            token = group.talk.broadcast_bytes(token if group.rank == 0 else None)
    return token.decode()

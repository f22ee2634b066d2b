"""Training checkpoints: a Hugging Face checkpoint, plus a folder with the optimiser and the state of the run.

    ROOT/step-00000100/  config.json  model*.safetensors  tokenizer files   what transformers opens
                         training/optimizer*.safetensors    moments (and masters), divided like their parameters
                         training/state.json                step, data position, layout, checksums of every file
    ROOT/latest          the name of the newest complete checkpoint

Every rank writes its own byte ranges; nothing is gathered over tensor-parallel ranks. A save copies what it needs
and returns; a thread writes. The folder gets its name when every rank has synced its part, so a kill at any moment
leaves the last good one. Moments are stored as full tensors: any layout resumes from them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
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

from cluster.training.optimizer import ShardedAdamW
from parallel.errors import CheckpointError
from parallel.mesh import Groups
from parallel.shard import full_shape_of
from tp_decoders.decoder import Decoder
from tp_decoders.names import Name
from tp_decoders.registry import family_of
from tp_decoders.save_files import COMPANIONS, TensorPlan
from tp_decoders.slice_files import SliceFiles, owned_pieces
from tp_decoders.tensor_files import SafetensorsFile

MAX_FILE_BYTES = 5_000_000_000
STEP_NAME = re.compile(r"step-(\d{8})")
STATE = Path("training") / "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
POLL_S = 0.02


@dataclass(frozen=True)
class SavedState:
    """What a checkpoint says of the run it was taken from."""

    folder: Path
    step: int
    extra: Mapping[str, Any]


@dataclass(frozen=True)
class _Line:
    """A parameter on its way to disk: its name there, whether it lies transposed, and itself."""

    name: Name
    theirs: str
    ours: str
    parameter: Tensor


class Checkpointer:
    """One rank's side of saving and resuming under one root folder. All ranks call the same methods in the same
    order.
    """

    def __init__(self, root: Path, groups: Groups, keep: int = 2, timeout_s: float = 600.0) -> None:
        self.root, self.groups, self.keep, self.timeout_s = root, groups, keep, timeout_s
        self._pending: Future[Path] | None = None

    def save(
        self, model: Decoder, optimizer: ShardedAdamW, extra: Mapping[str, Any], name: str | None = None
    ) -> Future[Path]:
        """Copies out and returns; the future is done when the checkpoint is complete. An earlier save is waited for
        first.
        """
        self.wait()
        target = self.root / (name or f"step-{optimizer.steps:08d}")
        job = _Job(self, target, model, optimizer, extra)
        future: Future[Path] = Future()
        threading.Thread(target=_run, args=(job, future), name=f"checkpoint {target.name}", daemon=True).start()
        self._pending = future
        return future

    def wait(self) -> Path | None:
        """Waits for the save under way, if any, and raises what went wrong in it."""
        pending, self._pending = self._pending, None
        return None if pending is None else pending.result(self.timeout_s)

    def latest(self) -> Path | None:
        """The newest complete checkpoint: what `latest` names, or else the highest step that is there."""
        return latest_checkpoint(self.root)


def latest_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint of a run, None where there is none."""
    steps = (
        sorted(p for p in root.glob("step-*") if STEP_NAME.fullmatch(p.name) and (p / STATE).is_file())
        if root.is_dir()
        else []
    )
    pointer = root / "latest"
    if pointer.is_file():
        named = root / Path(pointer.read_text(encoding="utf-8").strip()).name
        if (named / STATE).is_file() and (not steps or named.name >= steps[-1].name):
            return named
    return steps[-1] if steps else None


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
    bad = [name for name, wanted in sums.items() if not (folder / name).is_file() or _digest(folder / name) != wanted]
    if bad:
        raise CheckpointError(
            f"{folder}: {', '.join(sorted(bad))} differ from their checksums; resume from another checkpoint"
        )


@torch.no_grad()
def restore_optimizer(folder: Path, model: Decoder, optimizer: ShardedAdamW, groups: Groups) -> None:
    """Reads step, masters and moments into the optimiser, whatever layout they were written by. The weights are
    `load`'s.
    """
    from contextlib import ExitStack

    lines = {line.ours: line for line in _lines(model)}
    with ExitStack() as stack:
        files = [SafetensorsFile(path, stack) for path in sorted((folder / "training").glob("optimizer*.safetensors"))]
        where = {name: file for file in files for name in file.shapes}
        optimizer.prepare_state(read_state(folder).step)
        for flat in optimizer.flats:
            for ours in flat.parameters:
                for moment in (*MOMENTS, "master"):
                    stored = f"{lines[ours].theirs}.{moment}"
                    if stored in where:
                        local = _read_local(where[stored], stored, lines[ours], groups.tp.rank)
                        optimizer.restore(flat, ours, moment, local)
                    elif moment in MOMENTS:
                        raise CheckpointError(f"{folder / 'training'} holds no {stored}; it belongs to another model")


def _read_local(file: SafetensorsFile, stored: str, line: _Line, rank: int) -> Tensor:
    from parallel.shard import rule_of

    rule = rule_of(line.parameter)
    pieces = []
    for index in rule.pieces(full_shape_of(line.parameter), rank):
        piece = file.read(stored, index[::-1] if line.name.transposed else index)
        pieces.append(piece.t() if line.name.transposed else piece)
    return torch.cat(pieces, rule.dim) if len(pieces) > 1 else pieces[0]


def _lines(model: Decoder) -> list[_Line]:
    names = family_of(model.config.model_type).names
    return [_Line(*names.theirs(ours), ours, parameter) for ours, parameter in model.named_parameters()]


class _Job:
    """One save on one rank: the copies taken while the caller waits, the writing done by a thread."""

    def __init__(
        self, owner: Checkpointer, target: Path, model: Decoder, optimizer: ShardedAdamW, extra: Mapping[str, Any]
    ) -> None:
        self.owner, self.target, self.extra = owner, target, dict(extra)
        self.step, self.config, self.source = optimizer.steps, model.config, model.source
        self.dtype = next(model.parameters()).dtype
        self.tp, self.dp = owner.groups.tp, owner.groups.dp
        self.draft = target.with_name(f".{target.name}.{_agreed_token(owner.groups)}.part")
        lines = _lines(model)
        moments = _moments(optimizer, lines)
        self.weights = SliceFiles(
            self.draft, "model", [_plan(line, line.parameter.dtype, "") for line in lines], MAX_FILE_BYTES
        )
        self.state = SliceFiles(
            self.draft / "training",
            "optimizer",
            [_plan(line, torch.float32, f".{kind}") for line, kind, _ in moments],
            MAX_FILE_BYTES,
        )
        writes = self.dp.rank == 0
        self.copies = [(self.weights, line, "", line.parameter.detach().clone()) for line in lines if writes]
        self.copies += [(self.state, line, f".{kind}", local) for line, kind, local in moments if writes]

    def run(self) -> Path:
        leader = self.tp.rank == 0 and self.dp.rank == 0
        if leader:
            self._lay_out()
        self._await("laid out", [self.draft / "ready"])
        for files, line, suffix, local in self.copies:
            for index, piece in owned_pieces(line.parameter, local, self.tp.rank):
                transposed = line.name.transposed
                files.write(
                    line.theirs + suffix, index[::-1] if transposed else index, piece.t() if transposed else piece
                )
        self.copies.clear()
        if self.dp.rank == 0:
            self.weights.sync()
            self.state.sync()
            (self.draft / f"done-{self.tp.rank}").touch()
        if leader:
            self._commit()
        self._await("committed", [self.target / STATE])
        return self.target

    def _lay_out(self) -> None:
        if self.target.exists():
            raise CheckpointError(f"{self.target} exists already; a checkpoint is never written over")
        for left in self.target.parent.glob(f".{self.target.name}.*.part"):  # by a save that was killed
            shutil.rmtree(left, ignore_errors=True)
        (self.draft / "training").mkdir(parents=True)
        self.weights.lay_out()
        self.state.lay_out()
        (self.draft / "ready").touch()

    def _await(self, what: str, paths: list[Path]) -> None:
        limit = time.monotonic() + self.owner.timeout_s
        while not all(path.exists() for path in paths):
            if time.monotonic() > limit:
                absent = ", ".join(path.name for path in paths if not path.exists())
                raise CheckpointError(
                    f"{self.target} was not {what} within {self.owner.timeout_s:g} s; waiting for {absent}"
                )
            time.sleep(POLL_S)

    def _commit(self) -> None:
        self._await("written", [self.draft / f"done-{rank}" for rank in range(self.tp.size)])
        for path in (self.draft / "ready", *self.draft.glob("done-*")):
            path.unlink()
        self.weights.write_index()
        self._write_config()
        files = sorted(path for path in self.draft.rglob("*") if path.is_file())
        state = {
            "step": self.step,
            "layout": {"tp": self.tp.size, "dp": self.dp.size},
            "extra": self.extra,
            "sha256": {str(path.relative_to(self.draft)): _digest(path) for path in files},
        }
        _write_synced(self.draft / STATE, json.dumps(state, indent=1))
        os.replace(self.draft, self.target)
        _point_to(self.owner.root, self.target.name)
        self._prune()

    def _write_config(self) -> None:
        key = "torch_dtype" if "torch_dtype" in self.config.hf else "dtype"
        config = {**self.config.hf, key: str(self.dtype).removeprefix("torch.")}
        _write_synced(self.draft / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        for name in COMPANIONS:
            if self.source is not None and (self.source / name).is_file():
                shutil.copyfile(self.source / name, self.draft / name)

    def _prune(self) -> None:
        complete = sorted(
            p for p in self.owner.root.glob("step-*") if STEP_NAME.fullmatch(p.name) and (p / STATE).is_file()
        )
        for old in complete[: -self.owner.keep] if self.owner.keep else []:
            shutil.rmtree(old, ignore_errors=True)


def _agreed_token(groups: Groups) -> str:
    """A name for this save alone, the same on all ranks: what a killed one left behind is never taken for it."""
    token = secrets.token_hex(4).encode()
    for group in (groups.dp, groups.tp):
        if group.size > 1:
            token = group.talk.broadcast_bytes(token if group.rank == 0 else None)
    return token.decode()


def _plan(line: _Line, dtype: torch.dtype, suffix: str) -> TensorPlan:
    shape = full_shape_of(line.parameter)
    return TensorPlan(line.theirs + suffix, shape[::-1] if line.name.transposed else shape, dtype)


def _moments(optimizer: ShardedAdamW, lines: list[_Line]) -> list[tuple[_Line, str, Tensor]]:
    """Copies of this tp rank's moments (gathered over dp), and of the masters of parameters that are not float32
    themselves.
    """
    by_name = {line.ours: line for line in lines}
    found = [(by_name[ours], kind, local) for ours, kind, local in optimizer.local_state()]
    return sorted(found, key=lambda entry: (entry[0].theirs, entry[1]))


def _run(job: _Job, future: Future[Path]) -> None:
    try:
        future.set_result(job.run())
    except BaseException as error:  # noqa: BLE001  it belongs to whoever waits for the future
        future.set_exception(error)


def _digest(path: Path) -> str:
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

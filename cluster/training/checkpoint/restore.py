"""A saved state into a model and an optimiser that are in use: first all of it is read, then all of it takes effect.

Reading changes nothing and may fail on any rank; `apply` cannot fail. Between the two the ranks agree that all of them
have read. Whatever layout and type the state was written by, this rank's part of it is read. No collectives.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cluster.training.checkpoint.checkpoint_writer import Line, lines_of
from cluster.training.checkpoint.checkpointer import MOMENTS, read_local, read_state
from cluster.training.step.optimizer import ShardedAdamW
from parallel.errors import CheckpointError
from parallel.sharding.rules import full_shape_of
from tp_decoders.files.tensor_files import Checkpoint, SafetensorsFile, open_checkpoint
from tp_decoders.model.decoder import Decoder

MASTER = "master"


@dataclass(frozen=True)
class LoadedState:
    """One rank's part of a state. `moments`: (parameter, kind) -> its local shard, masters included."""

    step: int
    weights: Mapping[str, Tensor]
    moments: Mapping[tuple[str, str], Tensor]


def read(folder: Path, model: Decoder, rank: int) -> LoadedState:
    """This rank's part of the state; CheckpointError where it is not one of this model."""
    lines = lines_of(model)
    with open_checkpoint(folder) as checkpoint:
        weights = {line.ours: _weight(checkpoint, line, rank) for line in lines}
    moments: dict[tuple[str, str], Tensor] = {}
    with ExitStack() as stack:
        files = [SafetensorsFile(path, stack) for path in sorted((folder / "training").glob("optimizer*.safetensors"))]
        where = {name: file for file in files for name in file.shapes}
        for line in lines:
            for kind in (*MOMENTS, MASTER):
                stored = f"{line.theirs}.{kind}"
                if stored in where:
                    _check_shape(folder, stored, where[stored].shapes[stored], line)
                    moments[line.ours, kind] = read_local(where[stored], stored, line, rank).clone()
    return LoadedState(read_state(folder).step, weights, moments)


def _weight(checkpoint: Checkpoint, line: Line, rank: int) -> Tensor:
    if line.theirs not in checkpoint.shapes:
        raise CheckpointError(f"{checkpoint.folder} holds no {line.theirs}; it belongs to another model")
    _check_shape(checkpoint.folder, line.theirs, checkpoint.shapes[line.theirs], line)
    return read_local(checkpoint, line.theirs, line, rank).clone()


def _check_shape(folder: Path, stored: str, shape: tuple[int, ...], line: Line) -> None:
    full = full_shape_of(line.parameter)
    wanted = full[::-1] if line.name.transposed else full
    if shape != wanted:
        raise CheckpointError(
            f"{folder}: {stored} is {list(shape)}, here it is {list(wanted)}; it belongs to another model"
        )


def check_moments(state: LoadedState, optimizer: ShardedAdamW, folder: Path) -> None:
    """Refuses a state that lacks what the optimiser keeps."""
    lost = [
        f"{name}.{kind}"
        for flat in optimizer.flats
        for name in flat.parameters
        for kind in MOMENTS
        if (name, kind) not in state.moments
    ]
    if lost:
        raise CheckpointError(f"{folder} holds no moments of {', '.join(lost[:3])}; it belongs to another model")


@torch.no_grad()
def apply(state: LoadedState, model: Decoder, optimizer: ShardedAdamW) -> None:
    """Weights, masters, moments and the number of steps become the state's; waiting gradients are forgotten."""
    for name, parameter in model.named_parameters():
        parameter.copy_(state.weights[name])
    optimizer.prepare_state(state.step)
    for flat in optimizer.flats:
        for name in flat.parameters:
            master = state.moments.get((name, MASTER), state.weights[name])
            optimizer.restore(flat, name, MASTER, master.float())
            for kind in MOMENTS:
                optimizer.restore(flat, name, kind, state.moments[name, kind])
    optimizer.zero_grad()

"""A checkpoint written anew from any source, one tensor at a time: what `convert` does, whatever it reads.

A source gives full tensors under the names and in the shapes of transformers; which those are, and in which order,
follows from the configuration. Nothing of the model is held beyond the tensor under way, and the folder appears when it
is complete or not at all. Layouts play no part: a checkpoint holds full tensors, and any number of ranks reads its
slices from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from parallel.errors import CheckpointError
from parallel.sharding.rules import full_shape_of
from tp_decoders.checkpoint.downcast import Lost
from tp_decoders.checkpoint.folder_writer import FolderWriter
from tp_decoders.checkpoint.load_save import MAX_SHARD_SIZE, build
from tp_decoders.checkpoint.slice_writer import TensorPlan
from tp_decoders.checkpoint.tensor_matching import match_tensors, shown, stored_dtype, warn_of_different_twins
from tp_decoders.families.family import AUTO
from tp_decoders.files.companion_files import companions, copy_files
from tp_decoders.files.tensor_files import Checkpoint, open_checkpoint
from tp_decoders.model.config import DecoderConfig
from tp_decoders.registry import family_of, read_config
from tp_decoders.tasks.task_settings import task_of, with_task


class TensorSource(Protocol):
    """Full tensors by transformers' names."""

    @property
    def folder(self) -> Path: ...

    @property
    def dtype(self) -> torch.dtype:
        """The type to write unless another is asked for."""
        ...

    def read(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Rewritten:
    """The type that was written, and what it could not hold."""

    dtype: torch.dtype
    lost: Lost


def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint of this configuration, in the order they are written."""
    names = family_of(config.model_type).names
    shapes = {}
    for ours, parameter in build(config, device="meta").named_parameters():
        name, theirs = names.theirs(ours)
        shapes[theirs] = full_shape_of(parameter)[::-1] if name.transposed else full_shape_of(parameter)
    return shapes


def rewrite(
    source: TensorSource,
    config: DecoderConfig,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    files: Mapping[str, Path] | None = None,
    allow_overflow: bool = False,
) -> Rewritten:
    """Writes the folder. `files` are copied along under the names given, before any tokenizer that lies beside the
    source. Where values are too large for the type nothing is written, unless that is allowed.
    """
    dtype, lost = dtype or source.dtype, Lost()
    plans = [TensorPlan(name, shape, dtype) for name, shape in tensor_shapes(config).items()]
    writer = FolderWriter(target, plans, max_shard_size)
    _check(writer.start())
    try:
        for plan in plans:
            stored = source.read(plan.name)
            tensor = stored.to(dtype)
            lost.count(plan.name, stored, tensor)
            if allow_overflow or not lost.overflowed:  # else only counted: the error names all of them
                writer.write(plan.name, tensor)
            _check(writer.error)
        if lost.overflowed and not allow_overflow:
            raise CheckpointError(
                f"{shown(dtype)} cannot hold {sum(lost.overflowed.values())} values, which would become infinite "
                f"({lost.overflow()}); choose bfloat16 or float32, or write them all the same with --allow-overflow"
            )
        copy_files({**companions(source.folder), **(files or {})}, writer.draft)
    except BaseException as error:
        writer.error = writer.error or repr(error)
        writer.finish(config, None)  # takes the draft away
        raise
    _check(writer.finish(config, None))
    return Rewritten(dtype, lost)


def _check(error: str | None) -> None:
    if error:
        raise CheckpointError(error)


class HuggingFaceSource:
    """A Hugging Face folder, in any of the forms that `load` reads."""

    def __init__(self, folder: Path, stack: ExitStack, mpt_reference: str = AUTO) -> None:
        """The files stay open until `stack` closes."""
        self.folder = folder
        config = read_config(folder, mpt_reference=mpt_reference)
        self.config = with_task(config, task_of(config.hf))  # a head is carried along, never made
        self._checkpoint: Checkpoint = stack.enter_context(open_checkpoint(folder))
        names = family_of(self.config.model_type).names
        shapes = build(self.config, device="meta")
        found = match_tensors(shapes, self._checkpoint, names)
        warn_of_different_twins(shapes, self._checkpoint, names, found)
        self._stored: Mapping[str, str] = {names.theirs(ours)[1]: stored for ours, (stored, _) in found.items()}
        self.dtype = stored_dtype(self.config, self._checkpoint, names)
        lost = sorted(set(tensor_shapes(self.config)) - set(self._stored))
        if lost:
            raise CheckpointError(f"{folder} holds no {', '.join(lost)}, which its architectures promise; mend it")

    def read(self, name: str) -> Tensor:
        stored = self._stored[name]
        return self._checkpoint.read(stored, tuple(slice(0, n) for n in self._checkpoint.shapes[stored]))

"""Loading and saving Hugging Face checkpoints, and fresh weights: always by slices, never by whole models.

Each rank reads the pieces that its parameters' sharding rules name, straight into place: beyond its shard it holds
one slice at a time. Saving gathers one full tensor at a time on rank 0, which streams it to disk. Collectives: none
in `load`; in `save` one gather per sharded parameter, and two broadcasts that tell every rank whether rank 0 could
write.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from parallel.errors import CheckpointError, TpError
from parallel.layers.norm import Norm
from parallel.native.memory import give_back
from parallel.options import Scheme, check_scheme
from parallel.ranks.gather_parameter import full_tensor
from parallel.ranks.group import Group
from parallel.sharding.released_weight import assign, is_released
from parallel.sharding.rules import full_shape_of, rule_of
from tp_decoders.checkpoint.downcast import Lost
from tp_decoders.checkpoint.folder_writer import FolderWriter
from tp_decoders.checkpoint.quantised_shards import quantised_shard, schemes_of
from tp_decoders.checkpoint.slice_writer import TensorPlan
from tp_decoders.checkpoint.tensor_matching import Sources, match_tensors, shown, stored_dtype, warn_of_different_twins
from tp_decoders.families.family import AUTO
from tp_decoders.files.tensor_files import Checkpoint, TensorFile, open_checkpoint
from tp_decoders.files.weights_cache import Progress, WeightsCache
from tp_decoders.hub.repository import is_name, locate, pin
from tp_decoders.model.adapted_layers import linears, whole_parameters
from tp_decoders.model.config import DecoderConfig
from tp_decoders.model.decoder import Decoder
from tp_decoders.model.place import Place
from tp_decoders.registry import UnknownKeys, family_of, read_config
from tp_decoders.tasks.task_settings import check_task, with_task

log = logging.getLogger(__name__)

MAX_SHARD_SIZE = 5_000_000_000
HEAD_SEED = 0
HUB_ANSWERS_S = 120.0


def build(
    config: DecoderConfig,
    group: Group | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Decoder:
    """The model with uninitialised parameters; device "meta" makes shapes only."""
    return family_of(config.model_type).model(config, group or Group.single(), Place(dtype=dtype, device=device))


def load(
    path: str | Path,
    task: str = "causal-lm",
    group: Group | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    labels: Sequence[str] | int | None = None,
    problem: str | None = None,
    mpt_reference: str = AUTO,
    cache: WeightsCache | None = None,
    progress: Progress | None = None,
    packed: bool = False,
    quantize: Scheme | None = None,
) -> Decoder:
    """This rank's shard of a checkpoint, in eval mode; in the checkpoint's own type unless one is given.

    `path` is a folder, or ORG/NAME[@revision] of the Hugging Face hub, which all ranks read at one commit.

    `labels` (names, or how many) and `problem` are for a head that the checkpoint lacks and that is made anew;
    `mpt_reference` says whose meaning an MPT's options have ("transformers" or "llm-foundry"; else its origin); `cache`
    is where this host keeps a copy of the files; `progress` is told the bytes of the shard that were read.

    `packed` is for serving only: each matrix of a product is held once, as the native kernels read it, where they do
    (else nothing changes); such a model is saved, merged and pruned like any other and cannot be trained.

    `quantize`, for serving in bfloat16 on CPUs: the matrices of products are rounded to whole numbers as they are read
    (see quantised_shards), and held so.
    """
    check_scheme("quantize", quantize)
    group = group or Group.single()
    check_task(task)
    folder = locate_together(path, group)
    unread: UnknownKeys = "warn" if group.rank == 0 else "ignore"
    config = with_task(read_config(folder, mpt_reference=mpt_reference, unread=unread), task, labels, problem)
    names = family_of(config.model_type).names
    with open_checkpoint(folder, cache) as checkpoint:
        sources = match_tensors(build(config, group, device="meta"), checkpoint, names)  # before memory is taken
        default = torch.bfloat16 if quantize else stored_dtype(config, checkpoint, names)
        model = build(config, group, dtype or default, device)
        warn_of_different_twins(model, checkpoint, names, sources)
        _fill_all(model, checkpoint, sources, progress or (lambda what, done, total: None), packed, quantize)
    model.source = folder
    give_back()  # what reading took: caches are sized by what is free
    return model


def checkpoint_dtype(folder: Path) -> torch.dtype:
    """The type that `load` reads a checkpoint in, from names and shapes alone."""
    config = read_config(folder, unread="ignore")
    with open_checkpoint(folder) as checkpoint:
        return stored_dtype(config, checkpoint, family_of(config.model_type).names)


def locate_together(path: str | Path, group: Group) -> Path:
    """The folder to read; where the ranks can talk, rank 0 says which commit a name of the hub means now."""
    if group.size == 1 or group.comm is None or not is_name(path):
        return locate(path)
    word = b""
    if group.rank == 0:
        try:
            word = b"=" + pin(path).encode()
        except TpError as error:
            word = b"!" + str(error).encode()
    word = group.talk.broadcast_bytes(word or None, HUB_ANSWERS_S)
    if word[:1] == b"!":
        raise CheckpointError(word[1:].decode())
    return locate(word[1:].decode())


def _fill_all(
    model: Decoder, checkpoint: Checkpoint, sources: Sources, progress: Progress, packed: bool, quantize: Scheme | None
) -> None:
    """Reads what the checkpoint holds of a shard, and makes the rest."""
    packs = {id(layer.weight): layer for layer in linears(model).values()} if packed or quantize else {}
    schemes = {} if quantize is None else schemes_of(model, quantize)
    parameters = dict(model.named_parameters())
    sizes = {ours: parameters[ours].numel() * checkpoint.itemsize(theirs) for ours, (theirs, _) in sources.items()}
    done, total, lost = 0, sum(sizes.values()), Lost()
    for ours, parameter in parameters.items():
        layer = packs.get(id(parameter))
        if ours in sources:
            if layer is not None and (scheme := schemes.get(id(parameter))):
                layer.quantise(quantised_shard(scheme, parameter, checkpoint, *sources[ours], model.group.rank))
            elif layer is None:
                fill(parameter, checkpoint, *sources[ours], model.group.rank, lost)
            else:  # its own memory is never touched
                layer.release(shard_of(parameter, checkpoint, *sources[ours], model.group.rank, lost))
            done += sizes[ours]
            progress("reading weights", done, total)
        else:
            fresh(model, ours, parameter, HEAD_SEED)
            if layer is not None:
                layer.release()
    if lines := lost.report():
        tell = log.warning if lost.overflowed else log.info
        tell("%s in %s, rank %d: %s", checkpoint.folder, shown(parameter.dtype), model.group.rank, "; ".join(lines))


@torch.no_grad()
def fill(
    parameter: nn.Parameter,
    checkpoint: Checkpoint | TensorFile,
    theirs: str,
    transposed: bool,
    rank: int,
    lost: Lost | None = None,
) -> None:
    """Reads the rank's slices of a stored tensor into its parameter; what its type cannot hold is counted in `lost`."""
    if is_released(parameter):
        assign(parameter, shard_of(parameter, checkpoint, theirs, transposed, rank, lost))
    else:
        _read(parameter, parameter, checkpoint, theirs, transposed, rank, lost)


@torch.no_grad()
def shard_of(
    parameter: nn.Parameter,
    checkpoint: Checkpoint | TensorFile,
    theirs: str,
    transposed: bool,
    rank: int,
    lost: Lost | None = None,
) -> Tensor:
    """The rank's part of a stored tensor as its parameter is to hold it: the file's own memory where that will do."""
    pieces = rule_of(parameter).pieces(full_shape_of(parameter), rank)
    if len(pieces) == 1:
        piece = checkpoint.read(theirs, pieces[0][::-1] if transposed else pieces[0])
        if piece.dtype == parameter.dtype and piece.data_ptr() % piece.itemsize == 0:
            return piece.t() if transposed else piece
    local = torch.empty(parameter.shape, dtype=parameter.dtype)
    _read(local, parameter, checkpoint, theirs, transposed, rank, lost)
    return local


def _read(
    local: Tensor,
    parameter: nn.Parameter,
    checkpoint: Checkpoint | TensorFile,
    theirs: str,
    transposed: bool,
    rank: int,
    lost: Lost | None,
) -> None:
    rule, start = rule_of(parameter), 0
    for index in rule.pieces(full_shape_of(parameter), rank):
        width = index[rule.dim].stop - index[rule.dim].start
        if width:
            piece = checkpoint.read(theirs, index[::-1] if transposed else index)
            place = local.narrow(rule.dim, start, width).copy_(piece.t() if transposed else piece)
            if lost is not None:
                lost.count(theirs, piece, place)
        start += width


def save(model: Decoder, path: str | Path, max_shard_size: int = MAX_SHARD_SIZE) -> None:
    """Writes a folder that transformers loads, complete or not at all; it must be new or empty. All ranks call this."""
    group, names = model.group, family_of(model.config.model_type).names
    lines = [(*names.theirs(ours), parameter) for ours, parameter in whole_parameters(model)]
    plans = [
        TensorPlan(theirs, full_shape_of(p)[::-1] if name.transposed else full_shape_of(p), p.dtype)
        for name, theirs, p in lines
    ]
    writer = FolderWriter(Path(path), plans, max_shard_size) if group.rank == 0 else None
    agree(group, writer.start() if writer else None)
    for name, theirs, parameter in lines:
        full = full_tensor(parameter, group)
        if writer is not None and full is not None:
            writer.write(theirs, full.t() if name.transposed else full)
    agree(group, writer.finish(model.config, model.source) if writer else None)


def agree(group: Group, error: str | None) -> None:
    """Raises on every rank what rank 0 could not do."""
    if group.size > 1:
        error = group.talk.broadcast_bytes((error or "").encode() if group.rank == 0 else None).decode()
    if error:
        raise CheckpointError(error)


@torch.no_grad()
def initialise(model: Decoder, seed: int = 0) -> Decoder:
    """Fresh weights by the family's rule, norms 1, biases 0; the same full tensors at every parallel size."""
    norms = {id(module.weight) for module in model.modules() if isinstance(module, Norm)}
    for name, parameter in model.named_parameters():
        if id(parameter) in norms:
            parameter.fill_(1.0)
        else:
            fresh(model, name, parameter, seed)
    return model


@torch.no_grad()
def fresh(model: Decoder, name: str, parameter: nn.Parameter, seed: int) -> None:
    """One parameter that is no norm's gain: 0 for a bias, drawn for a matrix."""
    if name.endswith(".bias"):
        parameter.fill_(0.0)
        return
    std = model.init_std(model.config, name)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    full = torch.empty(full_shape_of(parameter)).normal_(0.0, std, generator=generator)
    assign(parameter, rule_of(parameter).take(full, model.group.rank))

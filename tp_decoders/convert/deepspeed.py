"""The original checkpoints of GPT-NeoX (the 20B's): one file per layer and model-parallel part, as DeepSpeed's pipeline
saves them.

    layer_00-model_00-model_states.pt     word embeddings          layers 1 and n+2 have no weights
    layer_02 ... layer_{n+1}              the n blocks
    layer_{n+3}, layer_{n+4}              last norm, output projection (not where it is tied)

Every part holds its cut of the matrices. What each rank had whole was trained apart, and is joined as the parts worked
together: every rank added its bias to a row-parallel product before the sum over ranks, so those biases are summed;
norms are averaged. Files are mapped, one layer at a time. Checkpoints without the pipeline (mp_rank_*) are not read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from parallel.errors import CheckpointError
from tp_decoders.convert.neox_settings import MODEL_TYPE
from tp_decoders.convert.rewrite import tensor_shapes
from tp_decoders.files.tensor_files import PickledFile
from tp_decoders.model.config import DecoderConfig

FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
BLOCK = re.compile(r"gpt_neox\.layers\.(\d+)\.(.+)")
SUMMED = ("attention.dense.bias", "mlp.dense_4h_to_h.bias")
BUFFERS = {"attention.rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"}
EMBEDDING, FIRST_BLOCK = 0, 2
SHOWN = 4  # names in an error


def find_layers(folder: Path) -> Path:
    """The folder with the layers' files: the one given, or the step that its `latest` names."""
    latest = folder / "latest"
    if not any(FILE.fullmatch(path.name) for path in folder.glob("layer_*")) and latest.is_file():
        step = latest.read_text(encoding="utf-8").strip()
        if Path(step).name != step:
            raise CheckpointError(f"{latest} holds {step!r}; it should name a folder beside it")
        folder = folder / step
    _Parts(folder)  # or an error that says what is missing
    return folder


def vocab_rows(folder: Path) -> int:
    """The rows of the embedding, padding included: the vocabulary that the checkpoint has."""
    parts = _Parts(folder).layer(EMBEDDING)
    return sum(_shape(part, "word_embeddings.weight", path)[0] for path, part in parts)


def place_of(name: str, n_layers: int) -> tuple[int, str]:
    """The layer and the key of one of transformers' names."""
    block = BLOCK.fullmatch(name)
    if block:
        return FIRST_BLOCK + int(block[1]), block[2]
    last = FIRST_BLOCK + n_layers + 1
    return {
        "gpt_neox.embed_in.weight": (EMBEDDING, "word_embeddings.weight"),
        "gpt_neox.final_layer_norm.weight": (last, "norm.weight"),
        "gpt_neox.final_layer_norm.bias": (last, "norm.bias"),
        "embed_out.weight": (last + 1, "final_linear.weight"),
    }[name]


class DeepSpeedSource:
    """The tensors of such a checkpoint. Everything that can be wrong with its files is found when it is made."""

    def __init__(self, folder: Path, config: DecoderConfig) -> None:
        """`folder` holds the layers' files."""
        if config.model_type != MODEL_TYPE:
            raise CheckpointError(
                f"{folder}: these checkpoints are of GPT-NeoX models, the configuration is of a {config.model_type}; "
                "give the one that belongs to it"
            )
        self.folder = folder
        self._n_layers, self._shapes = config.n_layers, tensor_shapes(config)
        self._parts = _Parts(folder)
        self._parts.check_layers({place_of(name, self._n_layers)[0] for name in self._shapes}, config.n_layers)
        for name in self._shapes:
            self._cut_dim(name)
        self._refuse_unread()
        path, part = self._parts.layer(EMBEDDING)[0]
        dtype = part.dtype("word_embeddings.weight")
        if dtype is None:
            raise CheckpointError(f"{path}: word_embeddings.weight is not of a floating-point type")
        self.dtype = dtype

    def read(self, name: str) -> Tensor:
        """A full tensor; what is added up is added in float64, to be rounded once."""
        layer, key = place_of(name, self._n_layers)
        parts = [_read(part, key) for _, part in self._parts.layer(layer)]
        dim = self._cut_dim(name)
        if dim is not None:
            return torch.cat(parts, dim)
        total = torch.stack(parts).double().sum(0)
        return total if key in SUMMED else total / len(parts)

    def _cut_dim(self, name: str) -> int | None:
        """The dimension along which the parts are cut, None where each holds a full vector of its own."""
        layer, key = place_of(name, self._n_layers)
        parts, wanted = self._parts.layer(layer), self._shapes[name]
        shapes = [_shape(part, key, path) for path, part in parts]
        if len(wanted) == 1 and not _is_column_bias(key):
            found = None if all(shape == wanted for shape in shapes) else -1
        else:
            found = next((dim for dim in range(len(wanted)) if _joined(shapes, dim) == wanted), -1)
        if found == -1:
            given = ", ".join(f"{path.name} {list(shape)}" for (path, _), shape in zip(parts, shapes, strict=True))
            raise CheckpointError(
                f"{key} in {self.folder} does not make the {list(wanted)} that the configuration asks for: {given}; "
                "give the configuration that belongs to the checkpoint, or fetch the file again"
            )
        return found

    def _refuse_unread(self) -> None:
        """A tensor that nobody asked for would make another model."""
        read: dict[int, set[str]] = {}
        for name in self._shapes:
            layer, key = place_of(name, self._n_layers)
            read.setdefault(layer, set()).add(key)
        for layer, keys in read.items():
            for path, part in self._parts.layer(layer):
                extra = sorted(set(part.shapes) - keys - BUFFERS)
                if extra:
                    raise CheckpointError(f"{path} holds {', '.join(extra)}, which the configuration has no place for")


class _Parts:
    """The files of a folder by layer and part; keeps those of one layer open."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        matches = [FILE.fullmatch(path.name) for path in folder.glob("layer_*")] if folder.is_dir() else []
        self._files = {(int(found[1]), int(found[2])): folder / found[0] for found in matches if found}
        if not self._files:
            raise CheckpointError(
                f"{folder} holds no layer_XX-model_YY-model_states.pt; give the folder of one step of a GPT-NeoX "
                "checkpoint (global_step...), or the one above it with its `latest`"
            )
        self._num_parts = 1 + max(part for _, part in self._files)
        self._open: tuple[int, Sequence[tuple[Path, PickledFile]]] | None = None

    def check_layers(self, wanted: set[int], n_layers: int) -> None:
        """Every part of every layer is there, and no layer more."""
        missing = [self._name(layer, part) for layer in sorted(wanted) for part in range(self._num_parts)]
        missing = [name for name in missing if not (self._folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{self._folder} has no {_some(missing)}, which a model of {n_layers} blocks in {self._num_parts} "
                "model-parallel parts has; fetch what is missing"
            )
        last = FIRST_BLOCK + n_layers + 2  # where the projection is tied, a copy of the embedding may lie there
        extra = sorted(path.name for (layer, _), path in self._files.items() if layer > last)
        if extra:
            raise CheckpointError(
                f"{self._folder} holds {_some(extra)}, which a model of {n_layers} blocks does not have; give the "
                "configuration that belongs to the checkpoint"
            )

    def layer(self, layer: int) -> Sequence[tuple[Path, PickledFile]]:
        """The files of a layer, opened."""
        if self._open is None or self._open[0] != layer:
            self._open = None
            paths = [self._folder / self._name(layer, part) for part in range(self._num_parts)]
            absent = [path.name for path in paths if not path.is_file()]
            if absent:
                raise CheckpointError(f"{self._folder} has no {', '.join(absent)}; fetch what is missing")
            self._open = layer, [(path, PickledFile(path)) for path in paths]
        return self._open[1]

    def _name(self, layer: int, part: int) -> str:
        path = self._files.get((layer, part))
        return path.name if path else f"layer_{layer:02d}-model_{part:02d}-model_states.pt"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _shape(part: PickledFile, key: str, path: Path) -> tuple[int, ...]:
    if key not in part.shapes:
        raise CheckpointError(f"{path} holds no {key}; it holds {', '.join(sorted(part.shapes)) or 'nothing'}")
    if part.dtype(key) is None:
        raise CheckpointError(f"{path}: {key} is not of a floating-point type")
    return part.shapes[key]


def _read(part: PickledFile, key: str) -> Tensor:
    return part.read(key, tuple(slice(0, n) for n in part.shapes[key]))


def _is_column_bias(key: str) -> bool:
    return key in ("attention.query_key_value.bias", "mlp.dense_h_to_4h.bias")


def _joined(shapes: Sequence[tuple[int, ...]], dim: int) -> tuple[int, ...] | None:
    """The shape of the parts put together, if they fit."""
    first = shapes[0]
    others = {(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}
    if len(others) != 1 or any(len(shape) != len(first) for shape in shapes) or dim >= len(first):
        return None
    return (*first[:dim], sum(shape[dim] for shape in shapes), *first[dim + 1 :])

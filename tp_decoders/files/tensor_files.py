"""The tensors of a checkpoint folder, by name, read slice by slice.

Safetensors (one file or an index) and, failing those, PyTorch's .bin through weights_only. Files are memory-mapped:
opening reads names and shapes, `read` touches the pages of one slice. The oldest .bin files cannot be mapped and are
loaded whole, with a warning.
"""

from __future__ import annotations

import json
import logging
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from parallel.errors import CheckpointError
from parallel.sharding.rules import Index
from tp_decoders.files.git_lfs import refuse_pointer
from tp_decoders.files.weights_cache import WeightsCache

log = logging.getLogger(__name__)

LAYOUTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
LONGEST_HEADER = 100_000_000
"""Bytes, as safetensors itself reads."""
UNREADABLE = (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
              ArithmeticError, ImportError, MemoryError, zipfile.BadZipFile)  # fmt: skip
"""What unpickling a damaged or made-up file may raise."""
TRAINERS_KEYS = ("state_dict", "model_state_dict", "module", "model")
"""Under which trainers (Lightning, plain loops, DeepSpeed) put a state dict beside what else they save."""
ELSEWHERE = {
    "adapter_config.json": "it is an adapter: give it as --adapter, and its base model as --model",
    "zero_to_fp32.py": "its weights are DeepSpeed's shards: `python zero_to_fp32.py . pytorch_model.bin` joins them",
    "tf_model.h5": "save it from transformers as safetensors",
    "flax_model.msgpack": "save it from transformers as safetensors",
}
"""What tells where the weights of a folder are that has none of these."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorFile(Protocol):
    """One file of a checkpoint."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def name(self) -> str: ...

    def dtype(self, name: str) -> torch.dtype | None:
        """None for a tensor that is not of a type that weights can have."""
        ...

    def type_name(self, name: str) -> str: ...

    def read(self, name: str, index: Index) -> Tensor: ...


class SafetensorsFile:
    """A .safetensors file, mapped; or its copy, read in its place."""

    def __init__(self, path: Path, stack: ExitStack, copy: Path | None = None) -> None:
        self.name = path.name
        refuse_pointer(path)
        try:
            self._file = stack.enter_context(safe_open(copy or path, framework="pt"))
            self.shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise _corrupt(path, error, _misplaced(copy or path)) from error

    def dtype(self, name: str) -> torch.dtype | None:
        return DTYPES.get(self.type_name(name))

    def type_name(self, name: str) -> str:
        return str(self._file.get_slice(name).get_dtype())

    def read(self, name: str, index: Index) -> Tensor:
        return self._file.get_slice(name)[index]


class PickledFile:
    """A .bin file; nothing but tensors is unpickled."""

    def __init__(self, path: Path, copy: Path | None = None) -> None:
        self.name = path.name
        refuse_pointer(path)
        self._tensors = _load_pickled(copy or path)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype | None:
        dtype = self._tensors[name].dtype
        return dtype if dtype in DTYPES.values() else None

    def type_name(self, name: str) -> str:
        return str(self._tensors[name].dtype).removeprefix("torch.")

    def read(self, name: str, index: Index) -> Tensor:
        return self._tensors[name][index]


def _load_pickled(path: Path) -> dict[str, Tensor]:
    try:
        mapped = path.open("rb").read(2) == b"PK"
        if mapped:
            _refuse_compressed(path)
        else:
            log.warning(
                "%s has the format of before torch 1.6: it is read whole into memory; save it again as safetensors",
                path,
            )
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped or None)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} cannot be read: it holds more than tensors, or is damaged, and nothing in it is run; fetch it "
            "again, or convert it to safetensors where you trust it"
        ) from error
    except UNREADABLE as error:
        raise _corrupt(path, error) from error
    if isinstance(loaded, dict):
        loaded = next((loaded[key] for key in TRAINERS_KEYS if isinstance(loaded.get(key), dict)), loaded)
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise CheckpointError(f"{path} does not hold a table of tensors; give a state dict saved by torch.save")
    others = [name for name, value in loaded.items() if not _is_plain(value)]
    if others:
        raise CheckpointError(
            f"{path} does not hold a table of tensors (plain ones; {', '.join(others[:8])} are none); give a state "
            "dict saved by torch.save"
        )
    return loaded


def _refuse_compressed(path: Path) -> None:
    """torch.save stores bytes as they are; mapped, compressed ones would be read as numbers."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise CheckpointError(f"{path} is compressed, which torch.save does not do; save it again as safetensors")


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _misplaced(path: Path) -> str | None:
    """The first tensor whose bytes are not where and as many as a safetensors header says, where that can be known."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= LONGEST_HEADER:
                return None
            header = json.loads(file.read(length))
        room = path.stat().st_size - 8 - length
        for name, entry in header.items():
            start, stop = entry["data_offsets"] if name != "__metadata__" else (0, 0)
            if not 0 <= start <= stop <= room:
                return str(name)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass  # the reason that is given names no tensor then
    return None


def _corrupt(path: Path, error: Exception, tensor: str | None = None) -> CheckpointError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    reason += f" ({tensor!a})" if tensor is not None and tensor not in reason else ""
    return CheckpointError(
        f"{path} cannot be read ({path.stat().st_size if path.exists() else 0} bytes): {reason}; fetch it again"
    )


class Checkpoint:
    """All tensors of a folder, whichever files they are in."""

    def __init__(self, folder: Path, files: Mapping[str, TensorFile], stack: ExitStack) -> None:
        self.folder = folder
        self._files = files
        self._stack = stack
        self.shapes = {name: file.shapes[name] for name, file in files.items()}

    def dtype_of(self, name: str) -> torch.dtype | None:
        """None for a tensor of a type that weights cannot have."""
        return self._files[name].dtype(name)

    def is_floating(self, name: str) -> bool:
        return self.dtype_of(name) is not None

    def type_name(self, name: str) -> str:
        """A tensor's type in words, whatever it is."""
        return self._files[name].type_name(name)

    def file_of(self, name: str) -> str:
        """The name of the file that a tensor lies in."""
        return self._files[name].name

    def itemsize(self, name: str) -> int:
        """Bytes of one number of a floating-point tensor, as it is stored."""
        return (self.dtype_of(name) or torch.float32).itemsize

    def read(self, name: str, index: Index) -> Tensor:
        return self._files[name].read(name, index)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def open_checkpoint(folder: Path, cache: WeightsCache | None = None) -> Checkpoint:
    """Opens the first of the layouts that the folder has; with a cache, the copies there of what holds the tensors."""
    layout = next((name for name in LAYOUTS if (folder / name).is_file()), None)
    if layout is None:
        raise CheckpointError(f"{folder} has none of {', '.join(LAYOUTS)}; {_held(folder)}")
    with ExitStack() as stack:
        if layout.endswith(".json"):
            files = _open_index(folder, layout, stack, cache)
        else:
            file = _open_files([folder / layout], stack, cache)[layout]
            files = dict.fromkeys(file.shapes, file)
        return Checkpoint(folder, files, stack.pop_all())
    raise AssertionError("an ExitStack that is given away suppresses nothing")


def _held(folder: Path) -> str:
    """What a folder without weights holds, and what to do about it where that is known."""
    if not folder.is_dir():
        return "it is no folder"
    names = sorted(path.name for path in folder.iterdir())
    hint = next((f"; {what}" for name, what in ELSEWHERE.items() if name in names), "")
    more = f" and {len(names) - 24} more" if len(names) > 24 else ""
    return f"it holds {', '.join(names[:24]) or 'nothing'}{more}{hint}"


def _open_files(paths: Sequence[Path], stack: ExitStack, cache: WeightsCache | None) -> dict[str, TensorFile]:
    """By name: the one place where files with tensors are opened."""
    copies = cache.local(paths) if cache is not None else {}
    return {
        path.name: SafetensorsFile(path, stack, copies.get(path))
        if path.suffix == ".safetensors"
        else PickledFile(path, copies.get(path))
        for path in paths
    }


def _open_index(folder: Path, layout: str, stack: ExitStack, cache: WeightsCache | None) -> dict[str, TensorFile]:
    weight_map = read_weight_map(folder / layout)
    absent = sorted({name for name in weight_map.values() if not (folder / name).is_file()})
    if absent:
        raise CheckpointError(
            f"{folder / layout} names files that are not there: {', '.join(absent)}; fetch the whole checkpoint"
        )
    opened = _open_files([folder / name for name in sorted(set(weight_map.values()))], stack, cache)
    lost = [f"{tensor} (in {name})" for tensor, name in weight_map.items() if tensor not in opened[name].shapes]
    if lost:
        raise CheckpointError(f"{folder / layout} names tensors that its files do not hold: {', '.join(lost)}")
    return {tensor: opened[name] for tensor, name in weight_map.items()}


def read_weight_map(path: Path) -> dict[str, str]:
    refuse_pointer(path)
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} has no readable 'weight_map': {error!r}") from error
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name and name != ".." for name in weight_map.values()
    ):
        raise CheckpointError(f"{path}: weight_map should give each tensor the name of a file in the same folder")
    return weight_map

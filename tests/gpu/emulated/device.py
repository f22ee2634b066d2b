"""A CUDA device that is not there: tensors say cuda:0, values are computed on the CPU, mixing devices is an error.

Counted: kernels, waits of the host for the device (synchronisations), copies to it, indices left on the CPU. Load the
guard before this module: it imports torch.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen as _registers_the_operators
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.gpu.emulated import flash_reference

assert _registers_the_operators is not None
ROOT = str(Path(__file__).resolve().parents[3])
CUDA = torch.device("cuda:0")
FREE = frozenset((
    "view", "detach", "t", "expand", "slice", "select", "unsqueeze",
    "transpose", "permute", "split", "split_with_sizes", "unbind", "as_strided", "alias",
    "squeeze", "narrow", "_unsafe_view", "lift_fresh", "empty", "empty_like", "empty_strided",
    "new_empty", "_reshape_alias", "detach_", "diagonal",
))  # fmt: skip
"""Operators without a kernel."""
WAITS = frozenset(["_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "is_nonzero", "_unique2"])
"""Operators whose answer, or its shape, is read by the host."""
INDEXED = frozenset(["index", "index_put", "index_put_", "_index_put_impl_"])


class MixedDevicesError(RuntimeError):
    """An operator over CUDA and CPU tensors, which a real device refuses."""


class Emulation(TorchDispatchMode):
    """Inside `with`, everything on cuda:0 is emulated and counted, one at a time."""

    current: Emulation | None = None

    def __init__(self) -> None:
        super().__init__()
        self.cpu_indices = Counter[str]()
        self.clear()

    def clear(self) -> None:
        """Kernels, copies and waits from here on; indices on the CPU are kept, as none is right."""
        self.kernels, self.copies, self.waits = Counter[str](), Counter[str](), Counter[str]()

    def __enter__(self) -> Emulation:
        Emulation.current = self
        with contextlib.ExitStack() as undo:
            super().__enter__()
            undo.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        Emulation.current = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self)


class CudaTensor(Tensor):
    """A tensor whose values lie in `on_host`."""

    on_host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: Tensor) -> CudaTensor:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=CUDA, requires_grad=False,
        )  # fmt: skip
        made.on_host = values
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {}, None)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"CudaTensor({self.on_host!r})"

    def tolist(self) -> Any:
        _count("waits", "tolist")
        return self.on_host.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a CUDA tensor has no numpy view; copy it to the CPU first")

    def data_ptr(self) -> int:
        return self.on_host.data_ptr()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        self.on_host = host(value)


def host(x: Any) -> Any:
    """The values of an emulated tensor; anything else as it is."""
    return x.on_host if isinstance(x, CudaTensor) else x


def install() -> None:
    """What torch itself has to believe in this process. Before the first import of the project's modules."""
    torch.cuda._lazy_init = lambda: None  # type: ignore[attr-defined]
    torch.inference_mode = lambda mode=True: torch.no_grad()  # type: ignore  # wrappers have no inference tensors


def _where() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and "/tests/gpu/emulated/" not in name and "/.venv/" not in name:
            return f"{name[len(ROOT) + 1 :]}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside the project"


def _count(kind: str, what: str) -> None:
    if Emulation.current is not None:
        getattr(Emulation.current, kind)[what if kind == "kernels" else f"{what} at {_where()}"] += 1


def _run(func: Any, args: Any, kwargs: Any, mode: Emulation | None) -> Any:
    torch._C._set_only_lift_cpu_tensors(True)  # a thread's own flag, and autograd has threads of its own
    name = func._schema.name.split("::")[-1]
    if func.namespace == "prim":
        return func(*args, **kwargs)
    if name == "_to_copy":
        return _to_copy(func, args[0], kwargs)
    if name == "copy_":
        return _copy(args[0], args[1])
    leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    ours = [x for x in leaves if isinstance(x, CudaTensor)]
    to_cuda = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
    if not ours and not to_cuda:
        return func(*args, **kwargs)
    if ours:
        _check(func, name, args, leaves)
    if to_cuda:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = _computed(func, name, tree_map(host, args), tree_map(host, kwargs))
    if name not in FREE:
        _count("kernels", name)
    if name == "_local_scalar_dense":
        return out
    known = {id(x.on_host): x for x in ours}  # in-place operators give back the tensor they were given

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return known[id(x)] if id(x) in known else CudaTensor(x)

    return tree_map(wrapped, out)


def _computed(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    if name == "_varlen_attn":
        return flash_reference.forward(*args, **kwargs)
    if name == "_varlen_attn_backward":
        return flash_reference.backward(*args, **kwargs)
    return func(*args, **kwargs)


def _check(func: Any, name: str, args: Any, leaves: list[Tensor]) -> None:
    indices = [x for x in args[1] if isinstance(x, Tensor)] if name in INDEXED else []
    for index in indices:
        if not isinstance(index, CudaTensor):
            _count("cpu_indices", name)
        if index.dtype is torch.bool:
            _count("waits", f"{name} by a mask")
    if name in WAITS:
        _count("waits", name)
    stray = [x for x in leaves if not isinstance(x, CudaTensor) and x.dim() and not any(x is i for i in indices)]
    if stray:
        raise MixedDevicesError(f"{func} over tensors on cuda:0 and on the CPU at {_where()}")


def _to_copy(func: Any, source: Tensor, kwargs: Any) -> Tensor:
    device = kwargs.get("device")
    to_cuda = isinstance(source, CudaTensor) if device is None else torch.device(device).type == "cuda"
    plain = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking", "pin_memory")}
    out = func(host(source), **plain)
    if isinstance(source, CudaTensor):
        _count("kernels" if to_cuda else "waits", "_to_copy")
    elif to_cuda:
        _count("copies", "_to_copy")
    return CudaTensor(out) if to_cuda else out


def _copy(target: Tensor, source: Tensor) -> Tensor:
    ours, theirs = isinstance(target, CudaTensor), isinstance(source, CudaTensor)
    if ours or theirs:
        _count("kernels" if ours and theirs else "copies" if ours else "waits", "copy_")
    host(target).copy_(host(source))
    return target

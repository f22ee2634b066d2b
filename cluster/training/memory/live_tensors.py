"""How many bytes of tensors are alive, operator by operator: what an allocator would have to hold.

Counts every storage made inside the context until its last reference goes, and beside it what an operator's kernel
needs while it runs; what is made for a moment inside functions that a kernel computes in one piece is left out. On
the meta device nothing is really allocated, so this says what a computation would take.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WRAPPERS = ("torch/_dynamo/eval_frame.py", "torch/_compile.py")
"""Files of torch's whose frames lie between an operator and a mode."""
Scratch = Callable[[Any, Sequence[Any]], int]
"""(operator, its arguments) to the bytes its kernel holds while it runs."""


class LiveBytes(TorchDispatchMode):
    """`now` and `most` bytes of tensors made inside; `known` ones were there before and are not counted."""

    def __init__(
        self,
        known: Iterable[Tensor] = (),
        scratch: Scratch | None = None,
        whole: Iterable[Callable[..., Any]] = (),
    ) -> None:
        super().__init__()
        self.now = self.most = 0
        self._scratch = scratch
        self._whole = {function.__code__ for function in whole}
        self._alive: dict[int, Any] = {tensor.untyped_storage()._cdata: tensor for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.add.Tensor and _called_by_engine():
            return args[0].add_(args[1])
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        if not (self._whole and self._inside(sys._getframe(1))):
            self.most = max(self.most, self.now + (self._scratch(function, args) if self._scratch else 0))
        return result

    def hold(self, nbytes: int) -> None:
        """So many more were there for a moment."""
        self.most = max(self.most, self.now + nbytes)

    def _inside(self, frame: FrameType | None) -> bool:
        """Whether a call of one of the whole functions is under way."""
        while frame is not None and frame.f_code is not _engine_run_backward.__code__:
            if frame.f_code in self._whole:
                return True
            frame = frame.f_back
        return False

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: object) -> None:
            self.now -= nbytes
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self.now += nbytes


def _called_by_engine() -> bool:
    """Whether autograd itself adds two gradients of one tensor: in place, but for a mode like this one being active."""
    caller: FrameType | None = sys._getframe(2)
    while caller is not None and caller.f_code.co_filename.endswith(WRAPPERS):
        caller = caller.f_back
    return caller is not None and caller.f_code is _engine_run_backward.__code__

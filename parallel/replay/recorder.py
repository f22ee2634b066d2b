"""Watches one forward and makes a program of it, if it can be one.

    kernel calls        recorded as they are made (native.library.Entry)
    operations of torch views need nothing, new memory is kept, a few become kernels with the same bits (LOWERED); any
                        other is computed, and there will be no program, for `refusal` says why

So nothing can run unseen between two recorded calls. The watched forward computes what it always does, and its results
are as good as any. What it makes stays where it is, since a program calls with addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.errors import OperandError
from parallel.native import step_kernels
from parallel.native.compiled import library
from parallel.native.compiled.library import Entry
from parallel.replay.program import Node, NotRecordable, Program

_aten = torch.ops.aten
_MEMORY = frozenset(
    (
        _aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default,
        _aten.new_empty_strided.default,
    )
)  # fmt: skip
_UNSAFE_VIEWS = frozenset((_aten._unsafe_view.default,))  # not told apart from computations by their schema


class Recorder(TorchDispatchMode):
    """`with Recorder() as recorder: forward()`, then `recorder.program()`. Of the thread that enters it."""

    def __init__(self) -> None:
        super().__init__()
        self.refusal = ""
        self._nodes: list[Node] = []
        self._made: dict[int, torch.UntypedStorage] = {}
        self._before: library.Recorder | None = None
        self._depth = 0

    def __enter__(self) -> Recorder:
        if self._depth == 0:
            self._before = library.record(self)
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._depth -= 1
        if self._depth == 0:
            library.record(self._before)

    def program(self, *keep: object) -> Program | None:
        """What was recorded, which keeps those too; None where there was something that cannot be."""
        if self.refusal or not self._nodes:
            return None
        nbytes = sum(storage.nbytes() for storage in self._made.values())
        return Program(self._nodes, [*self._made.values(), *keep], nbytes)

    def called(self, entry: Entry, arguments: tuple[Any, ...]) -> None:
        """A kernel is about to be called."""
        try:
            self._nodes.append(Node(entry, arguments))
        except NotRecordable as error:
            self._refuse(str(error))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _MEMORY:
            return self._kept(func(*args, **kwargs))
        if (lowered := LOWERED.get(func)) is not None:
            try:
                with self:
                    return lowered(*args, **kwargs)
            except (NotRecordable, OperandError) as error:
                self._refuse(f"{func}: {error}")
                return func(*args, **kwargs)
        with self:
            found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
        if not _is_view(func):
            self._refuse(f"{func} is no kernel")
        return func(*args, **kwargs)

    def _kept(self, made: Tensor) -> Tensor:
        storage = made.untyped_storage()
        self._made[storage.data_ptr()] = storage
        return made

    def _refuse(self, why: str) -> None:
        self.refusal = self.refusal or why


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    if any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments):
        return False
    return func in _UNSAFE_VIEWS or (bool(returns) and all(r.alias_info is not None for r in returns))


def _add(a: Tensor, b: Tensor | float, *, alpha: float = 1) -> Tensor:
    if alpha != 1:
        raise NotRecordable("a sum with a factor")
    if isinstance(b, Tensor):
        return step_kernels.added(a, b)
    return step_kernels.added_scalar(a, _real(b))


def _mul(a: Tensor, b: Tensor | float) -> Tensor:
    return step_kernels.scaled(a, _real(b))


def _clamp(a: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    infinity = float("inf")
    return step_kernels.clamped(a, -infinity if low is None else low, infinity if high is None else high)


def _embedding(table: Tensor, index: Tensor, *_: object) -> Tensor:
    return step_kernels.rows_of(table, index)


def _index(table: Tensor, indices: list[Tensor | None]) -> Tensor:
    if len(indices) != 1 or indices[0] is None or indices[0].dtype is not torch.int64:
        raise NotRecordable("rows by anything but their numbers")
    return step_kernels.rows_of(table, indices[0])


def _clone(a: Tensor, *, memory_format: torch.memory_format | None = None) -> Tensor:
    if memory_format is not torch.contiguous_format and not a.is_contiguous():
        raise NotRecordable("a copy that keeps its strides")
    return step_kernels.copied(a, a.dtype)


def _to_copy(a: Tensor, *, dtype: torch.dtype | None = None, **more: object) -> Tensor:
    if any(value is not None and value is not False for value in more.values()) or not a.is_contiguous():
        raise NotRecordable("a copy to another place or in other strides")
    return step_kernels.copied(a, dtype or a.dtype)


def _real(value: object) -> float:
    if not isinstance(value, int | float):
        raise NotRecordable(f"arithmetic with a {type(value).__name__}")
    return float(value)


LOWERED: dict[Any, Callable[..., Tensor]] = {
    _aten.add.Tensor: _add,
    _aten.mul.Tensor: _mul,
    _aten.clamp.default: _clamp,
    _aten.embedding.default: _embedding,
    _aten.index.Tensor: _index,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
}
"""Operations of torch that become kernels, with the same bits."""

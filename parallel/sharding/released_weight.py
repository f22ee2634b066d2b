"""A weight whose plain storage was given back, and how its values, which are elsewhere, are read and written.

    values(p)          all of them, a plain tensor        rows(p, ids)        some rows
    assign(p, x)       new ones                           is_released(p)      whether they are elsewhere

All four take plain parameters, too, so that who saves, merges or looks up need not know. A released weight keeps name,
shape, type, device and sharding rule. Any other use of it as a tensor is an error that says what to call: nothing is
made plain in passing, and nothing reads what is not there. Who holds the values is behind `Store`; releasing is the
owner's (parallel.matmul.packed_store).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from parallel.errors import WeightReleased
from parallel.sharding.parameter import Stamp, Weight

_TENSOR: Any = torch.Tensor
_DESCRIBED = frozenset(
    getattr(_TENSOR, name).__get__
    for name in (
        "shape", "dtype", "device", "layout", "ndim", "nbytes", "itemsize", "requires_grad", "grad", "grad_fn",
        "is_leaf", "is_cpu", "is_cuda", "is_meta", "is_sparse", "is_quantized",
    )
)  # fmt: skip
_ASKED = frozenset(
    getattr(_TENSOR, name)
    for name in (
        "size", "dim", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "is_inference",
        "untyped_storage", "__len__", "__hash__",
    )
)  # fmt: skip


class Store(Protocol):
    """Where the values [N, K] of a released weight are, to the bit."""

    def values(self) -> Tensor: ...
    def rows(self, ids_T: Tensor) -> Tensor:
        """[T, K]; IndexError for an id outside 0..N-1."""
        ...

    def assign(self, values: Tensor) -> None: ...


class ReleasedWeight(Weight):
    """What a `Weight` becomes when it is released, in place: whoever holds it holds this."""

    store: Store
    assigned: int
    """Times that its values were replaced."""

    def stamp(self) -> Stamp:
        return -1, self.assigned, id(self.store)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _DESCRIBED and func not in _ASKED:
            _refuse(getattr(func, "__name__", str(func)))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def requires_grad_(self, requires_grad: bool = True) -> ReleasedWeight:
        if requires_grad:
            _refuse("requires_grad_")
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        _refuse("deepcopy")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse("pickle")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ReleasedWeight(shape={list(self.shape)}, dtype={self.dtype})"


def _refuse(what: str) -> NoReturn:
    raise WeightReleased(
        f"{what} was asked of a weight that is stored packed only, for serving; read it with "
        "parallel.sharding.released_weight.values, write it with assign, or load the model with packed=False to train"
    )


def release(weight: Weight, store: Store) -> None:
    """Gives the weight's own storage back; the store has its values already."""
    weight.requires_grad_(False)
    weight.grad = None
    with torch.inference_mode(False):  # memory of that mode would be copied, in full
        weight.data = torch.full((1,), torch.nan, dtype=weight.dtype).expand(weight.shape)
    weight.__class__ = ReleasedWeight
    assert isinstance(weight, ReleasedWeight), "just made one"
    weight.store, weight.assigned = store, 0


def is_released(parameter: Tensor) -> bool:
    return isinstance(parameter, ReleasedWeight)


def values(parameter: Tensor) -> Tensor:
    """A plain parameter's own memory, or a new tensor with a released one's values."""
    return parameter.store.values() if isinstance(parameter, ReleasedWeight) else parameter.detach()


def rows(parameter: Tensor, ids_T: Tensor) -> Tensor:
    """[T, K]; IndexError for an id outside."""
    if isinstance(parameter, ReleasedWeight):
        return parameter.store.rows(ids_T)
    return functional.embedding(ids_T, parameter)


@torch.no_grad()
def assign(parameter: nn.Parameter | Tensor, new: Tensor) -> None:
    """Takes over values of the parameter's shape, rounded to its type; products see them from the next one on."""
    if not isinstance(parameter, ReleasedWeight):
        parameter.copy_(new)
        return
    parameter.store.assign(new.detach().to(parameter.dtype))
    parameter.assigned += 1

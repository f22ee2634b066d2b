"""The one check of what goes into the C++ kernels: whose memory a tensor is, and whether a kernel can read it so.

    words in Python     type, device, layout, gradient, shapes that fit together      OperandError says which and why
    status from C++     the enum, sizes, null, alignment, indices (operands.h)        `succeeded` makes it an exception

A wrapper asks `number` (or `checked`) of every operand, makes contiguous what must be, and hands the address on. The
kernels know no gradient, so an operand that wants one is refused while gradients are recorded.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from parallel.errors import NativeMemoryError, OperandError


class DType(IntEnum):
    """operands::DType of operands.h; 0, which a missing or boolean argument would be, is none."""

    FLOAT32 = 1
    BFLOAT16 = 2


NUMBERS: dict[torch.dtype, int] = {torch.float32: int(DType.FLOAT32), torch.bfloat16: int(DType.BFLOAT16)}
"""Types that the kernels read, by the number that tells them which."""
DTYPES = tuple(NUMBERS)


class Status(IntEnum):
    """operands::Status of operands.h."""

    OK, NO_MEMORY, BAD_TYPE, BAD_SIZE, NO_DATA, MISALIGNED, BAD_INDEX, UNKNOWN, STALE = range(9)


REASONS = {
    Status.BAD_TYPE: "a type that is neither float32 nor bfloat16",
    Status.BAD_SIZE: "a size that is negative, too large, or no multiple of what it must be",
    Status.NO_DATA: "a tensor without memory, such as one whose storage was freed",
    Status.MISALIGNED: "a tensor whose address is no multiple of its element's size; give a clone() of it",
    Status.BAD_INDEX: "an index (a leaf's border, a target, a block, a position) outside of what it points into",
    Status.STALE: "a weight that another thread keeps writing to; let it end first",
    Status.UNKNOWN: "operands that raised an unexpected error inside",
}
_strided = torch.strided


def number(operation: str, operand: str, x: Tensor) -> int:
    """The kernels' number of the type of x, plain float32 or bfloat16 memory of this machine."""
    known = NUMBERS.get(x.dtype)
    if known is None or not x.is_cpu or x.layout is not _strided or (x.requires_grad and torch.is_grad_enabled()):
        raise _misfit(operation, operand, x, DTYPES)
    return known


def checked(operation: str, operand: str, x: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
    """x itself, or a contiguous copy: plain memory of one of these types and of this shape."""
    if (
        x.dtype not in dtypes
        or not x.is_cpu
        or x.layout is not _strided
        or (x.requires_grad and torch.is_grad_enabled())
    ):
        raise _misfit(operation, operand, x, dtypes)
    if x.shape != shape:
        raise refused(operation, operand, words(x), f"its shape must be {list(shape)}")
    return x if x.is_contiguous() else x.contiguous()


def written(operation: str, operand: str, out: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
    """Checks a tensor that a kernel writes to: it can be no copy, so it must be contiguous itself."""
    checked(operation, operand, out, shape, *dtypes)
    if not out.is_contiguous():
        raise refused(operation, operand, words(out), "what is written to must be contiguous")
    return out


def apart(operation: str, operand: str, out: Tensor, *others: Tensor | None) -> None:
    """Refuses an output that shares memory with an operand that is read after it was written."""
    first, last = _extent(out)
    for other in others:
        if other is None:
            continue
        begin, end = _extent(other)
        if begin < last and first < end:
            raise refused(
                operation, operand, words(out), f"it shares memory with {words(other)}; give an output of its own"
            )


def refused(operation: str, operand: str, given: str, rule: str) -> OperandError:
    """The error: operation, operand, what was given, the rule."""
    return OperandError(f"{operation}: {operand} is {given}; {rule}")


def succeeded(operation: str, status: int) -> None:
    """Raises what a kernel's status says; nothing for 0."""
    if status == Status.OK:
        return
    if status == Status.NO_MEMORY:
        raise NativeMemoryError(
            f"{operation}: the memory for its working room could not be had; free some, or give less at once"
        )
    raise OperandError(f"{operation}: the kernel was given {REASONS[Status(status)]}")


def words(x: Tensor) -> str:
    """A tensor as an error shows it."""
    layout = f"with strides {list(x.stride())}" if x.layout is _strided else f"in layout {x.layout}"
    return f"a {list(x.shape)} {x.dtype} tensor on {x.device} {layout}"


def _misfit(operation: str, operand: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> OperandError:
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    if x.dtype not in dtypes or not x.is_cpu or x.layout is not _strided:
        rule = f"the native kernel takes strided {names} on the CPU"
    else:
        rule = "the native kernels know no gradient; call it under torch.no_grad() or give a detach()ed tensor"
    return refused(operation, operand, words(x), rule)


def _extent(x: Tensor) -> tuple[int, int]:
    """Its first byte and the one after its last."""
    if x.numel() == 0:
        return 0, 0
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x.data_ptr(), x.data_ptr() + reach * x.element_size()

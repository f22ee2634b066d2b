"""Elementwise and row kernels for CPUs: activations and gates, exp, log, softmax pieces, norms, rotary embedding.

float32 or bfloat16 in memory, float32 inside, rounded once. What comes out for an element (or row, or leaf) does not
depend on where it stands, on the rows around it or on the thread count. No autograd; callers fall back to torch for
dtypes and activations that are not here (`NAMES`).
"""

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from parallel.errors import ConfigError
from parallel.native.compiled.library import entry
from parallel.native.operands import checked, number, refused, succeeded, words

_IDS = {
    "gelu": 1,
    "gelu_new": 2,
    "gelu_pytorch_tanh": 2,
    "gelu_fast": 2,
    "quick_gelu": 3,
    "relu": 4,
    "silu": 5,
    "swish": 5,
    "tanh": 6,
    "sigmoid": 7,
}  # activation::Id
NAMES: frozenset[str] = frozenset(_IDS)

_SMALL = 1 << 16  # elements below which a call keeps the interpreter lock
_ROTARY = struct.Struct("11q")  # Turn of elementwise.cpp
_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_SIGNATURES: dict[str, tuple] = {
    "ew_activate": (_L, _I, _L, _P, _P),
    "ew_activate_grad": (_L, _I, _L, _P, _P, _P),
    "ew_gate": (_L, _I, _L, _P, _P, _P),
    "ew_gate_grad": (_L, _I, _L, _P, _P, _P, _P, _P),
    "ew_exp": (_L, _P, _P),
    "ew_log": (_L, _P, _P),
    "ew_row_max": (_I, _L, _L, _P, _L, _P),
    "ew_exp_sum": (_I, _L, _L, _P, _L, _P, _L, _P, _P),
    "ew_layer_norm": (_I, _L, _L, _P, _L, _P, _P, _I, _P, _I, _F),
    "ew_square_sum": (_L, _P, _P),
    "ew_rms_norm": (_I, _L, _L, _P, _L, _P, _P, _I, _F),
    "ew_layer_norm_grad": (_I, _L, _L, _P, _L, _P, _L, _P, _I, _F, _L, _P, _P, _P, _I),
    "ew_softmax_grad": (_L, _L, _P, _P, _P, _P, _P, _P),
    "ew_column_sums": (_I, _L, _L, _P, _L, _P),
    "ew_rotary": (ctypes.c_char_p,),
}


def activation_id(name: str | None) -> int:
    """The kernels' number of an activation; 0 for None."""
    if name is None:
        return 0
    if name not in _IDS:
        raise ConfigError(f"activation {name!r} has no native kernel; those that have: {', '.join(sorted(NAMES))}")
    return _IDS[name]


def activate(x: Tensor, name: str) -> Tensor:
    """The activation of every element."""
    dtype, x = number("activate", "x", x), x.contiguous()
    out, n = torch.empty(x.shape, dtype=x.dtype), x.numel()
    _call("ew_activate", n, activation_id(name), dtype, n, x.data_ptr(), out.data_ptr())
    return out


def activate_grad(x: Tensor, dy: Tensor, name: str) -> Tensor:
    """dy times the activation's derivative at x."""
    dtype = number("activate_grad", "x", x)
    dy, x = checked("activate_grad", "dy", dy, x.shape, x.dtype), x.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype)
    n = x.numel()
    _call("ew_activate_grad", n, activation_id(name), dtype, n, x.data_ptr(), dy.data_ptr(), dx.data_ptr())
    return dx


def gate(gate: Tensor, up: Tensor, name: str) -> Tensor:
    """The activation of every element of `gate` times that of `up`."""
    dtype, gate = number("gate", "gate", gate), gate.contiguous()
    up = checked("gate", "up", up, gate.shape, gate.dtype)
    out, n = torch.empty(gate.shape, dtype=gate.dtype), gate.numel()
    _call("ew_gate", n, activation_id(name), dtype, n, gate.data_ptr(), up.data_ptr(), out.data_ptr())
    return out


def gate_grad(gate: Tensor, up: Tensor, dy: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """What dy gives to `gate` and to `up`."""
    dtype, gate = number("gate_grad", "gate", gate), gate.contiguous()
    up, dy = (checked("gate_grad", what, x, gate.shape, gate.dtype) for what, x in (("up", up), ("dy", dy)))
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype) for _ in range(2))
    addresses = [x.data_ptr() for x in (gate, up, dy, dgate, dup)]
    _call("ew_gate_grad", gate.numel(), activation_id(name), dtype, gate.numel(), *addresses)
    return dgate, dup


def exp(x: Tensor) -> Tensor:
    """exp of every element, float32."""
    return _map("exp", x)


def log(x: Tensor) -> Tensor:
    """Natural logarithm of every element, float32."""
    return _map("log", x)


def row_max(x: Tensor) -> Tensor:
    """The largest element of each row of x [R, C], float32 [R]; -inf where C is 0, NaN where the row holds one."""
    dtype = number("row_max", "x", x)
    x, stride = _rows("row_max", "x", x)
    rows, columns = x.shape
    out = torch.empty(rows, dtype=torch.float32)
    _call("ew_row_max", rows * columns, dtype, rows, columns, x.data_ptr(), stride, out.data_ptr())
    return out


def column_sums(x: Tensor) -> Tensor:
    """The sum of each column of x [R, C], in x's type [C]; from the first row to the last."""
    dtype = number("column_sums", "x", x)
    x, stride = _rows("column_sums", "x", x)
    rows, columns = x.shape
    out = torch.empty(columns, dtype=x.dtype)
    _call("ew_column_sums", rows * columns, dtype, rows, columns, x.data_ptr(), stride, out.data_ptr())
    return out


def exp_sum(x: Tensor, top: Tensor, borders: Sequence[int]) -> Tensor:
    """Sum of exp(x - top) over each leaf of columns, float32 [R, n_leaves]; the order of a leaf's sum is its own."""
    dtype = number("exp_sum", "x", x)
    x, stride = _rows("exp_sum", "x", x)
    rows, columns = x.shape
    cuts = list(borders)
    if not cuts or cuts != sorted(cuts) or cuts[0] < 0 or cuts[-1] > columns:
        raise ConfigError(f"exp_sum: borders {tuple(cuts)} must ascend within the {columns} columns")
    top = checked("exp_sum", "top (the row maxima)", top, (rows,), torch.float32)
    out = torch.empty(rows, len(cuts) - 1, dtype=torch.float32)
    c_cuts = (ctypes.c_int64 * len(cuts))(*cuts)
    _call(
        "ew_exp_sum", rows * columns, dtype, rows, columns, x.data_ptr(), stride, top.data_ptr(), len(cuts) - 1, c_cuts,
        out.data_ptr(),
    )  # fmt: skip
    return out


def square_sum(x: Tensor) -> Tensor:
    """The sum of squares of a float32 tensor, a float32 scalar; its order is that of x's memory and size alone."""
    x = checked("square_sum", "x", x, x.shape, torch.float32)
    out = torch.empty(())
    _call("ew_square_sum", x.numel(), x.numel(), x.data_ptr(), out.data_ptr())
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm of the rows of x [T, D], float32 statistics per row, rounded once."""
    dtype = number("layer_norm", "x", x)
    x, stride = _rows("layer_norm", "x", x)
    rows, width = x.shape
    weight, weight_type = _vector("layer_norm", "weight", weight, width)
    bias, bias_type = (None, 0) if bias is None else _vector("layer_norm", "bias", bias, width)
    y = torch.empty(rows, width, dtype=x.dtype)
    _call(
        "ew_layer_norm", rows * width, dtype, rows, width, x.data_ptr(), stride, y.data_ptr(), weight.data_ptr(),
        weight_type, None if bias is None else bias.data_ptr(), bias_type, eps,
    )  # fmt: skip
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of the rows of x [T, D], float32 statistics per row."""
    dtype = number("rms_norm", "x", x)
    x, stride = _rows("rms_norm", "x", x)
    rows, width = x.shape
    weight, weight_type = _vector("rms_norm", "weight", weight, width)
    y = torch.empty(rows, width, dtype=x.dtype)
    _call(
        "ew_rms_norm", rows * width, dtype, rows, width, x.data_ptr(), stride, y.data_ptr(), weight.data_ptr(),
        weight_type, eps,
    )  # fmt: skip
    return y


def layer_norm_grad(
    x: Tensor, dy: Tensor, weight: Tensor | None, eps: float, borders: Sequence[int], centred: bool = True
) -> tuple[Tensor, Tensor]:
    """dx [T, D], and of each leaf of rows the sums [leaves, 2, D] float32 of dy * (x - mean) * rstd and of dy; of an
    RMS norm, which takes no mean, where it is not centred.
    """
    dtype = number("layer_norm_grad", "x", x)
    x, stride = _rows("layer_norm_grad", "x", x)
    rows, width = x.shape
    dy = checked("layer_norm_grad", "dy", dy, (rows, width), x.dtype)
    cuts = list(borders)
    if not cuts or cuts != sorted(cuts) or cuts[0] != 0 or cuts[-1] != rows:
        raise ConfigError(f"layer_norm_grad: borders {tuple(cuts)} must ascend from 0 to the {rows} rows")
    weight, weight_type = (None, 0) if weight is None else _vector("layer_norm_grad", "weight", weight, width)
    dx, sums = torch.empty(rows, width, dtype=x.dtype), torch.empty(len(cuts) - 1, 2, width)
    c_cuts = (ctypes.c_int64 * len(cuts))(*cuts)
    gains = None if weight is None else weight.data_ptr()
    _call(
        "ew_layer_norm_grad", rows * width, dtype, rows, width, x.data_ptr(), stride, dy.data_ptr(), width,
        gains, weight_type, eps, len(cuts) - 1, c_cuts, dx.data_ptr(), sums.data_ptr(), centred,
    )  # fmt: skip
    return dx, sums


def softmax_grad(logits: Tensor, top: Tensor, total: Tensor, targets: Tensor, scales: Tensor) -> Tensor:
    """(exp(logits - top) / total - one-hot of the target) * scale, [R, C] float32; a target below 0 has no column here.

    top, total, scales: [R] float32; targets: [R] int64 below C.
    """
    name = "softmax_grad"
    if logits.dim() != 2:
        raise refused(name, "logits", words(logits), "a matrix [rows, columns] is needed")
    rows, columns = logits.shape
    logits = checked(name, "logits", logits, (rows, columns), torch.float32)
    top, total, scales = (
        checked(name, operand, x, (rows,), torch.float32)
        for operand, x in (("top", top), ("total", total), ("scales", scales))
    )
    targets = checked(name, "targets", targets, (rows,), torch.int64)
    out = torch.empty(rows, columns)
    addresses = [x.data_ptr() for x in (logits, top, total, targets, scales, out)]
    _call("ew_softmax_grad", rows * columns, rows, columns, *addresses)
    return out


def rotary_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotary embedding of x [T, N, H] in place, half-rotation style, on the first R = 2 * cos.shape[1] elements of each
    head; x may have any strides. cos, sin: [T, R/2] float32. Inverse turns back, which is the backward pass.
    """
    dtype = number("rotary", "x", x)
    if x.dim() != 3:
        raise refused("rotary", "x", words(x), "it must be [tokens, heads, head_dim]")
    if cos.dim() != 2:
        raise refused("rotary", "cos (a table of angles)", words(cos), "it must be [tokens, angles]")
    tokens, heads, width = x.shape
    half = cos.shape[-1]
    angles = tokens, half
    cos = checked("rotary", "cos (a table of angles)", cos, angles, torch.float32)
    sin = checked("rotary", "sin (a table of angles)", sin, angles, torch.float32)
    if 2 * half > width:
        raise ConfigError(
            f"rotary: {2 * half} elements to turn do not fit heads of {width}; give cos and sin at most {width // 2}"
        )
    _distinct(x)
    token_stride, head_stride, stride = x.stride()
    if stride != 1:
        return x.copy_(rotary_(x.contiguous(), cos, sin, inverse))
    addresses = x.data_ptr(), cos.data_ptr(), sin.data_ptr()
    given = _ROTARY.pack(dtype, inverse, tokens, heads, width, half, token_stride, head_stride, *addresses)
    _call("ew_rotary", tokens * heads * width, given)
    return x


def _distinct(x: Tensor) -> None:
    """Refuses a tensor to write to of which several elements may be one place in memory, as in an expanded head."""
    reach = 1  # of the dimensions that lie closer together
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < reach:
                rule = "several of its elements are one place in memory; give a copy of it"
                raise refused("rotary", "x", words(x), rule)
            reach += (size - 1) * stride


@cache
def _function(name: str, small: bool) -> Callable[..., int]:
    return entry(name, _SIGNATURES[name], ctypes.c_int, keep_lock=small)


def _call(name: str, elements: int, *arguments: object) -> None:
    status = _function(name, elements < _SMALL)(*arguments)
    if status:
        succeeded(name, status)


def _map(name: str, x: Tensor) -> Tensor:
    x = checked(name, "x", x, x.shape, torch.float32)
    out = torch.empty(x.shape)
    n = x.numel()
    _call("ew_" + name, n, n, x.data_ptr(), out.data_ptr())
    return out


def _rows(operation: str, operand: str, x: Tensor) -> tuple[Tensor, int]:
    """A matrix whose rows are contiguous, and how far apart they lie."""
    if x.dim() != 2:
        raise refused(operation, operand, words(x), "a matrix [rows, columns] is needed")
    stride, within = x.stride()
    if within == 1:
        return x, stride
    x = x.contiguous()
    return x, x.shape[1]


def _vector(operation: str, operand: str, x: Tensor, width: int) -> tuple[Tensor, int]:
    """A norm's gains, contiguous, and the number of their type."""
    dtype = number(operation, operand, x)
    return checked(operation, operand, x, (width,), x.dtype), dtype

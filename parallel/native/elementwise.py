"""Elementwise and row kernels for CPUs: activations, exp, log, softmax pieces, layer norm, rotary embedding.

float32 or bfloat16 in memory, float32 inside, rounded once. What comes out for an element (or row, or leaf) does not
depend on where it stands, on the rows around it or on the thread count. No autograd; callers fall back to torch for
dtypes and activations that are not here (`NAMES`).
"""

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from parallel.errors import ConfigError
from parallel.native.library import entry

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
_ROTARY = struct.Struct("15q")  # Turn of elementwise.cpp
_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_SIGNATURES: dict[str, tuple] = {
    "ew_activate": (_L, _I, _L, _P, _P),
    "ew_activate_grad": (_L, _I, _L, _P, _P, _P),
    "ew_exp": (_L, _P, _P),
    "ew_log": (_L, _P, _P),
    "ew_row_max": (_I, _L, _L, _P, _L, _P),
    "ew_exp_sum": (_I, _L, _P, _L, _P, _L, _P, _P),
    "ew_layer_norm": (_I, _L, _L, _P, _L, _P, _L, _P, _P, _P, _I, _P, _I, _F, _P, _P),
    "ew_layer_norm_grad": (_I, _L, _P, _L, _P, _L, _P, _I, _F, _L, _P, _P, _P),
    "ew_softmax_grad": (_L, _L, _P, _P, _P, _P, _P, _P),
    "ew_column_sums": (_I, _L, _L, _P, _L, _P),
    "ew_rotary": (ctypes.c_char_p,),
}


class Normed(NamedTuple):
    """A layer norm's result; mean and rstd [T] float32 where asked for, `total` = x + residual where one was given."""

    y: Tensor
    mean: Tensor | None
    rstd: Tensor | None
    total: Tensor | None


def activation_id(name: str | None) -> int:
    """The kernels' number of an activation; 0 for None."""
    if name is None:
        return 0
    if name not in _IDS:
        raise ConfigError(f"activation {name!r} has no native kernel; those that have: {', '.join(sorted(NAMES))}")
    return _IDS[name]


def activate(x: Tensor, name: str, out: Tensor | None = None) -> Tensor:
    """The activation of every element; `out` may be x itself."""
    x = _checked(x).contiguous()
    out = _like(x) if out is None else _checked_out(out, x)
    _call("ew_activate", x, activation_id(name), x.dtype is torch.bfloat16, x.numel(), x.data_ptr(), out.data_ptr())
    return out


def activate_grad(x: Tensor, dy: Tensor, name: str) -> Tensor:
    """dy times the activation's derivative at x."""
    x, dy = _checked(x).contiguous(), _checked(dy).contiguous()
    if dy.shape != x.shape or dy.dtype != x.dtype:
        raise ConfigError(f"dy is {_words(dy)}; it must match x, {_words(x)}")
    dx = _like(x)
    _call(
        "ew_activate_grad",
        x,
        activation_id(name),
        x.dtype is torch.bfloat16,
        x.numel(),
        x.data_ptr(),
        dy.data_ptr(),
        dx.data_ptr(),
    )
    return dx


def exp(x: Tensor) -> Tensor:
    """exp of every element, float32."""
    return _map("ew_exp", x)


def log(x: Tensor) -> Tensor:
    """Natural logarithm of every element, float32."""
    return _map("ew_log", x)


def row_max(x: Tensor) -> Tensor:
    """The largest element of each row of x [R, C], float32 [R]; -inf where C is 0, NaN where the row holds one."""
    x = _rows(x)
    out = torch.empty(x.shape[0], dtype=torch.float32)
    _call("ew_row_max", x, x.dtype is torch.bfloat16, x.shape[0], x.shape[1], x.data_ptr(), x.stride(0), out.data_ptr())
    return out


def column_sums(x: Tensor) -> Tensor:
    """The sum of each column of x [R, C], in x's type [C]; from the first row to the last."""
    x = _rows(x)
    out = torch.empty(x.shape[1], dtype=x.dtype)
    half = x.dtype is torch.bfloat16
    _call("ew_column_sums", x, half, x.shape[0], x.shape[1], x.data_ptr(), x.stride(0), out.data_ptr())
    return out


def exp_sum(x: Tensor, top: Tensor, borders: Sequence[int]) -> Tensor:
    """Sum of exp(x - top) over each leaf of columns, float32 [R, n_leaves]; the order of a leaf's sum is its own."""
    x = _rows(x)
    cuts = list(borders)
    if not cuts or cuts != sorted(cuts) or cuts[0] < 0 or cuts[-1] > x.shape[1]:
        raise ConfigError(f"borders {tuple(cuts)} must ascend within the {x.shape[1]} columns")
    if top.shape != (x.shape[0],) or top.dtype != torch.float32 or not top.is_contiguous():
        raise ConfigError(f"the row maxima are {_words(top)}; they must be a contiguous [{x.shape[0]}] float32 tensor")
    out = torch.empty(x.shape[0], len(cuts) - 1, dtype=torch.float32)
    _call(
        "ew_exp_sum",
        x,
        x.dtype is torch.bfloat16,
        x.shape[0],
        x.data_ptr(),
        x.stride(0),
        top.data_ptr(),
        len(cuts) - 1,
        (ctypes.c_int64 * len(cuts))(*cuts),
        out.data_ptr(),
    )
    return out


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    stats: bool = False,
) -> Normed:
    """Layer norm of the rows of x [T, D] (of x + residual, rounded, where given), float32 statistics per row."""
    x = _rows(x)
    n_rows, width = x.shape
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and (vector.shape != (width,) or not _checked(vector).is_contiguous()):
            raise ConfigError(f"the layer norm's {name} is {_words(vector)}; it must be a contiguous [{width}] tensor")
    y, total = torch.empty(n_rows, width, dtype=x.dtype), None
    if residual is not None:
        residual = _rows(residual)
        if residual.shape != x.shape or residual.dtype != x.dtype:
            raise ConfigError(f"the residual is {_words(residual)}; it must match x, {_words(x)}")
        total = torch.empty(n_rows, width, dtype=x.dtype)
    mean, rstd = (torch.empty(n_rows), torch.empty(n_rows)) if stats else (None, None)
    _call(
        "ew_layer_norm",
        x,
        x.dtype is torch.bfloat16,
        n_rows,
        width,
        x.data_ptr(),
        x.stride(0),
        _address(residual),
        0 if residual is None else residual.stride(0),
        _address(total),
        y.data_ptr(),
        _address(weight),
        _half(weight),
        _address(bias),
        _half(bias),
        eps,
        _address(mean),
        _address(rstd),
    )
    return Normed(y, mean, rstd, total)


def layer_norm_grad(
    x: Tensor, dy: Tensor, weight: Tensor | None, eps: float, borders: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """dx [T, D], and of each leaf of rows the sums [leaves, 2, D] float32 of dy * (x - mean) * rstd and of dy."""
    x, dy = _rows(x), _rows(dy)
    rows, width = x.shape
    cuts = list(borders)
    if dy.shape != x.shape or dy.dtype != x.dtype:
        raise ConfigError(f"dy is {_words(dy)}; it must match x, {_words(x)}")
    if not cuts or cuts != sorted(cuts) or cuts[0] != 0 or cuts[-1] != rows:
        raise ConfigError(f"borders {tuple(cuts)} must ascend from 0 to the {rows} rows")
    if weight is not None and (weight.shape != (width,) or not _checked(weight).is_contiguous()):
        raise ConfigError(f"the layer norm's weight is {_words(weight)}; it must be a contiguous [{width}] tensor")
    dx, sums = torch.empty(rows, width, dtype=x.dtype), torch.empty(len(cuts) - 1, 2, width)
    _call(
        "ew_layer_norm_grad",
        x,
        x.dtype is torch.bfloat16,
        width,
        x.data_ptr(),
        x.stride(0),
        dy.data_ptr(),
        dy.stride(0),
        _address(weight),
        _half(weight),
        eps,
        len(cuts) - 1,
        (ctypes.c_int64 * len(cuts))(*cuts),
        dx.data_ptr(),
        sums.data_ptr(),
    )
    return dx, sums


def softmax_grad(logits: Tensor, top: Tensor, total: Tensor, targets: Tensor, scales: Tensor) -> Tensor:
    """(exp(logits - top) / total - one-hot of the target) * scale, [R, C] float32; a target below 0 has no column here.

    top, total, scales: [R] float32; targets: [R] int64 below C.
    """
    logits = _rows(logits).contiguous()
    rows, columns = logits.shape
    if logits.dtype is not torch.float32 or any(t.shape != (rows,) for t in (top, total, targets, scales)):
        raise ConfigError(
            f"softmax_grad takes float32 logits and one number per row of each kind; got {_words(logits)}"
        )
    if targets.dtype is not torch.int64 or (columns == 0 and bool((targets >= 0).any())):
        raise ConfigError(f"the targets are {_words(targets)}; they must be int64 columns, or below 0")
    given = [t.contiguous() for t in (top, total, targets, scales)]
    out = _like(logits)
    _call("ew_softmax_grad", logits, rows, columns, logits.data_ptr(), *(t.data_ptr() for t in given), out.data_ptr())
    return out


def rotary(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None, inverse: bool = False) -> Tensor:
    """Rotary embedding of x [T, N, H], half-rotation style, on the first R = 2 * cos.shape[1] elements of every head.

    cos, sin: [T, R/2] float32. `out` may be x itself (in place); inverse turns back, which is the backward pass.
    """
    if _checked(x).dim() != 3:
        raise ConfigError(f"x is {_words(x)}; rotary takes [tokens, heads, head_dim]")
    tokens, heads, width = x.shape
    half = cos.shape[-1]
    for table in (cos, sin):
        if table.shape != (tokens, half) or table.dtype is not torch.float32 or table.stride() != (cos.stride(0), 1):
            raise ConfigError(
                f"a table of angles is {_words(table)}; cos and sin are float32 [{tokens}, R/2], rows contiguous, "
                f"strides alike (cos: {list(cos.stride())})"
            )
    if 2 * half > width:
        raise ConfigError(
            f"{2 * half} elements to turn do not fit heads of {width}; give cos and sin at most {width // 2}"
        )
    if x.stride(2) != 1:
        x = x.contiguous()
    if out is None:
        out = torch.empty(tokens, heads, width, dtype=x.dtype)
    elif out.shape != x.shape or out.dtype != x.dtype or out.stride(2) != 1:
        raise ConfigError(f"out is {_words(out)}; it must match x, {_words(x)}, with contiguous heads")
    strides = *x.stride()[:2], *out.stride()[:2], cos.stride(0)
    addresses = x.data_ptr(), out.data_ptr(), cos.data_ptr(), sin.data_ptr()
    given = _ROTARY.pack(x.dtype is torch.bfloat16, inverse, tokens, heads, width, half, *strides, *addresses)
    _call("ew_rotary", x, given)
    return out


@cache
def _function(name: str, small: bool) -> Callable[..., None]:
    return entry(name, _SIGNATURES[name], keep_lock=small)


def _call(name: str, x: Tensor, *arguments: object) -> None:
    _function(name, x.numel() < _SMALL)(*arguments)


def _map(name: str, x: Tensor) -> Tensor:
    if _checked(x).dtype != torch.float32:
        raise ConfigError(f"{name.removeprefix('ew_')} takes float32, got {_words(x)}")
    x = x.contiguous()
    out = _like(x)
    _call(name, x, x.numel(), x.data_ptr(), out.data_ptr())
    return out


def _checked(x: Tensor) -> Tensor:
    if x.dtype not in (torch.float32, torch.bfloat16) or not x.is_cpu:
        raise ConfigError(f"the native kernels take float32 or bfloat16 on the CPU, got {_words(x)}")
    return x


def _checked_out(out: Tensor, x: Tensor) -> Tensor:
    if out.shape != x.shape or out.dtype != x.dtype or not out.is_contiguous():
        raise ConfigError(f"out is {_words(out)}; it must be contiguous and match x, {_words(x)}")
    return out


def _rows(x: Tensor) -> Tensor:
    if _checked(x).dim() != 2:
        raise ConfigError(f"got {_words(x)}; a matrix [rows, columns] is needed")
    return x if x.stride(1) == 1 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype)


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _half(x: Tensor | None) -> bool:
    return x is not None and x.dtype is torch.bfloat16


def _words(tensor: Tensor) -> str:
    return f"a {list(tensor.shape)} {tensor.dtype} tensor on {tensor.device} with strides {list(tensor.stride())}"

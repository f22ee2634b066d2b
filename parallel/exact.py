"""Formulas made of IEEE operations alone, so that their bits are the same on every machine.

A vector library's exp, cos or pow, and the order in which a sum runs through a vector's lanes, differ between makers
and instruction sets; additions, products, quotients, roundings and comparisons do not, and neither do decimal numbers.
What is here is for tables, for scalars and for one number per token; what is computed per element has kernels of its
own. No collectives.
"""

from __future__ import annotations

import math
from decimal import Context, Decimal

import torch
from torch import Tensor

FARTHEST_ANGLE = 2.0**23
"""Quarter turns up to here, times a piece of `_QUARTER`, have no rounding."""
_QUARTER = (
    float.fromhex("0x1.921fb54p+0"),
    float.fromhex("0x1.10b46118p-30"),
    float.fromhex("0x1.313198a2e0370p-61"),
)
"""pi / 2 in pieces: two of at most 30 bits, and the rest."""
_LN2 = (float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33"))
"""ln 2 in two: n times the first has no rounding."""
_SINE = tuple((-1.0) ** (n // 2) / math.factorial(n) for n in range(17, 1, -2))
_COSINE = tuple((-1.0) ** (n // 2) / math.factorial(n) for n in range(18, 0, -2))
_EXP = tuple(1.0 / math.factorial(n) for n in range(14, 1, -1))
_LOG = tuple(2.0 / n for n in range(23, 1, -2))
_ONE = 1023 << 52
_FRACTION = (1 << 52) - 1
_DIGITS = Context(prec=40)


def log(x: float) -> float:
    """The natural logarithm of a positive number, rounded to nearest."""
    return float(Decimal(x).ln(_DIGITS))


def power(x: float, y: float) -> float:
    """x ** y of a positive x, rounded to nearest."""
    return float(_DIGITS.exp(_DIGITS.multiply(Decimal(y), _DIGITS.ln(Decimal(x)))))


def whole_power(x: float, n: int) -> float:
    """x ** n of a whole n >= 0, by squaring; within n ulp."""
    result = 1.0
    while n:
        if n & 1:
            result *= x
        x, n = x * x, n >> 1
    return result


def ordered_sum(x: Tensor, dim: int | None = None) -> Tensor:
    """The sum over an axis, or of all: the second half added to the first until one is left; differentiable."""
    x = x.flatten() if dim is None else x.movedim(dim, 0)
    if not len(x):
        return x.new_zeros(x.shape[1:])
    while (size := len(x)) > 1:
        half, rest = (size + 1) // 2, size // 2
        folded = x[:rest] + x[half:]
        x = torch.cat([folded, x[rest:half]]) if rest < half else folded
    return x[0]


def powers(x: Tensor, y: Tensor) -> Tensor:
    """x ** y, float64, of positive x of normal size; broadcast against each other, within 1e-14 of the true number."""
    return exps(y.double() * logs(x))


def exps(x: Tensor) -> Tensor:
    """exp of every element, float64, within 2 ulp; inf, 0 and NaN as they should be."""
    wide = x.double()
    bounded = torch.where(wide == wide, wide, 0.0).clamp(-750.0, 720.0)
    n = torch.round(bounded * (1.0 / math.log(2.0)))
    r = (bounded - n * _LN2[0]) - n * _LN2[1]
    value = _polynomial(_EXP, r) * (r * r) + r + 1.0
    first = torch.floor(n * 0.5)
    value = value * _power_of_two(first) * _power_of_two(n - first)
    return torch.where(wide == wide, value, wide)


def logs(x: Tensor) -> Tensor:
    """Natural logarithm of every element, float64, within 2 ulp; positive numbers of normal size only."""
    bits = x.double().contiguous().view(torch.int64)
    exponent, mantissa = (bits >> 52) - 1023, ((bits & _FRACTION) | _ONE).view(torch.float64)
    large = mantissa > math.sqrt(2.0)
    mantissa = torch.where(large, mantissa * 0.5, mantissa)
    n = (exponent + large).double()
    s = (mantissa - 1.0) / (mantissa + 1.0)
    z = s * s
    return n * _LN2[0] + (n * _LN2[1] + (_polynomial(_LOG, z) * (z * s) + 2.0 * s))


def cos_sin(x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of angles of at most `FARTHEST_ANGLE`, float64, within 1e-15."""
    wide = x.double()
    n = torch.round(wide * (2.0 / math.pi))
    r = ((wide - n * _QUARTER[0]) - n * _QUARTER[1]) - n * _QUARTER[2]
    z = r * r
    cosine, sine = _polynomial(_COSINE, z) * z + 1.0, _polynomial(_SINE, z) * (z * r) + r
    quarter = n.long() & 3
    odd = (quarter & 1).bool()
    across, up = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    return torch.where((quarter == 1) | (quarter == 2), -across, across), torch.where(quarter >= 2, -up, up)


def exp(x: Tensor) -> Tensor:
    """exp of every element in its own type, rounded once from float64; differentiable."""
    result: Tensor = _Exp.apply(x)
    return result


def log_sigmoid(x: Tensor) -> Tensor:
    """log(1 / (1 + exp(-x))) of every element in its own type, rounded once from float64; differentiable."""
    result: Tensor = _LogSigmoid.apply(x)
    return result


class _Exp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        y = exps(x).to(x.dtype)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        (y,) = ctx.saved_tensors
        return grad * y


class _LogSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(x)
        wide = x.double()
        tail = exps(-wide.abs())
        # log(1 + t) / t is that of the rounded 1 + t; what the rounding took is put back by the quotient
        sum_ = 1.0 + tail
        lost = torch.where(sum_ == 1.0, tail, logs(sum_) * (tail / torch.where(sum_ == 1.0, 1.0, sum_ - 1.0)))
        return (wide.clamp(max=0.0) - lost).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        (x,) = ctx.saved_tensors
        return grad * (1.0 / (1.0 + exps(x))).to(x.dtype)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """By Horner's rule, highest power first."""
    y = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y = y * x + coefficient
    return y


def _power_of_two(n: Tensor) -> Tensor:
    """2 ** n of whole n within -1022..1023."""
    return ((n.long() + 1023) << 52).view(torch.float64)

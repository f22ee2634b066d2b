"""What the kernels beside products and attention make of drawn bits, as digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from parallel.layers.dropout import mix_keys
from parallel.native import adamw, dropout, elementwise

ROWS, COLUMNS = 37, 1003  # of which the last eleven are no whole vector
SPECIAL = (0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan"), 88.73,
           -87.4, -103.9, 104.0, 0.625, 1e-20, 65504.0)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)


def drawn(salt: int, spread: int, special: bool = True) -> Tensor:
    """[ROWS, COLUMNS] float32 of every sign and of `spread` binary orders around 1; rows of special numbers among."""
    keys = mix_keys(torch.arange(ROWS * COLUMNS) + (salt << 32))
    exponents = 127 - spread // 2 + ((keys >> 40) & 0xFFFF) % spread
    bits = (exponents << 23) | (keys & 0x7FFFFF) | ((keys >> 30 & 1) << 31)
    x = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int().view(torch.float32).view(ROWS, COLUMNS).clone()
    if special:
        x[::4, : len(SPECIAL)] = torch.tensor(SPECIAL)
        x[1::8, -len(SPECIAL) :] = torch.tensor(SPECIAL)
    return x


def results() -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """By name of kernel and inputs."""
    for spread in (8, 60, 250):
        wide = drawn(1, spread)
        yield f"exp {spread}", (elementwise.exp(wide),)
        yield f"log {spread}", (elementwise.log(wide), elementwise.log(wide.abs()))
        yield f"square_sum {spread}", (elementwise.square_sum(drawn(1, spread, special=False)),)
        yield f"adamw {spread}", _adamw(spread)
        for dtype in DTYPES:
            for name, outputs in _of_type(spread, dtype):
                yield f"{name} {spread} {dtype}", outputs


def _of_type(spread: int, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    x, up, dy = (drawn(salt, spread).to(dtype) for salt in (1, 2, 3))
    gain, shift, plain = drawn(4, 8)[2].to(dtype), drawn(5, 8)[2].to(dtype), drawn(6, spread, special=False).to(dtype)
    for name in ("gelu", "gelu_new", "quick_gelu", "relu", "silu", "tanh", "sigmoid"):
        yield name, (elementwise.activate(x, name), elementwise.activate_grad(x, dy, name))
        yield f"gate {name}", (elementwise.gate(x, up, name), *elementwise.gate_grad(x, up, dy, name))
    for what, values in (("special", x), ("plain", plain)):
        top = elementwise.row_max(values)
        borders = (0, 5, 5, 500, COLUMNS)
        yield f"row_max {what}", (top,)
        yield f"exp_sum {what}", (elementwise.exp_sum(values, top, borders),)
        yield f"column_sums {what}", (elementwise.column_sums(values),)
        yield f"layer_norm {what}", (elementwise.layer_norm(values, gain, shift, 1e-5),)
        yield f"rms_norm {what}", (elementwise.rms_norm(values, gain, 1e-6),)
        for centred in (True, False):
            grads = elementwise.layer_norm_grad(values, dy, gain, 1e-5, (0, 7, ROWS), centred)
            yield f"norm_grad {centred} {what}", grads
    wide, top = plain.float(), elementwise.row_max(plain)
    total = elementwise.exp_sum(plain, top, (0, COLUMNS))[:, 0].contiguous()
    yield "softmax_grad", (elementwise.softmax_grad(wide, top, total, torch.arange(ROWS) - 1, top),)
    heads, angles = x[:, :1000].reshape(ROWS, 10, 100).clone(), drawn(7, 8)[:, :37].contiguous()
    yield "rotary", (elementwise.rotary_(heads, angles, angles.flip(1).contiguous()),)
    yield "dropout", (dropout.drop_rows(x, mix_keys(torch.arange(ROWS)), 3, 1 << 30, 4 / 3),)


def _adamw(spread: int) -> tuple[Tensor, ...]:
    master, grad, first, second = (drawn(salt, spread, special=False).view(-1) for salt in (8, 9, 10, 11))
    second, copy = second.abs(), torch.empty(master.shape, dtype=torch.bfloat16)
    rates = adamw.Rates(step=3, learning_rate=1e-3, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1, scale=0.7)
    adamw.update(master, grad, first, second, rates, copy)
    return master, first, second, copy


def digest(outputs: tuple[Tensor, ...]) -> str:
    """Every NaN is one: its sign and payload are no result."""
    whole = hashlib.sha256()
    for output in outputs:
        wide = output.float()
        whole.update(torch.where(wide.isnan(), torch.nan, wide).contiguous().numpy().tobytes())
    return whole.hexdigest()[:16]


def digests() -> dict[str, str]:
    return {name: digest(outputs) for name, outputs in results()}

"""Elementwise and row kernels: close to float64, and the same bits wherever an element, a row or a leaf stands."""

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.errors import ConfigError
from parallel.native import elementwise as ew
from parallel.native.compiled import library

pytestmark = pytest.mark.skipif(not library.available(), reason="the native kernels cannot be built here")
DTYPES = (torch.float32, torch.bfloat16)
GELU_TANH: Callable[[Tensor], Tensor] = lambda x: x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))  # noqa: E731
REFERENCE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: x * 0.5 * torch.special.erfc(-x / math.sqrt(2)),
    "gelu_new": GELU_TANH,
    "gelu_pytorch_tanh": GELU_TANH,
    "gelu_fast": GELU_TANH,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.manual_seed(0)
    library.set_threads(1)
    yield
    library.set_threads(1)


def ulps(got: Tensor, want: Tensor) -> float:
    """The largest error in float32 units in the last place of the wanted value."""
    return ((got.double() - want).abs() / want.abs().clamp_min(1e-37) / 2**-23).max().item()


def points() -> Tensor:
    return torch.cat([torch.linspace(-5, 5, 200_003), torch.randn(5000) * 1e-3, torch.randn(500) * 1e-8])


def test_every_covered_activation_has_a_reference_here() -> None:
    assert set(REFERENCE) == ew.NAMES


@pytest.mark.parametrize("name", sorted(REFERENCE))
def test_activations_are_accurate(name: str) -> None:
    x = points()
    want = REFERENCE[name](x.double())
    # the argument of an exponential is rounded: -x^2/2, or the cubic of gelu_new, at |x| = 5
    assert ulps(ew.activate(x, name), want) < {"gelu": 10, "quick_gelu": 8}.get(name, 24 if "gelu" in name else 2)
    far = torch.linspace(-60, 60, 50_001)
    assert (ew.activate(far, name).double() - REFERENCE[name](far.double())).abs().max() < 1e-5
    half = x.bfloat16()
    want = REFERENCE[name](half.double())
    assert ((ew.activate(half, name).double() - want).abs() <= want.abs() * 2**-8 * 1.001 + 1e-38).all()


@pytest.mark.parametrize("name", sorted(REFERENCE))
def test_activation_gradients_are_accurate(name: str) -> None:
    x = torch.cat([points(), torch.linspace(-40, 40, 10_001)])
    x = x[x != 0]
    dy = torch.randn_like(x)
    wide = x.double().requires_grad_()
    REFERENCE[name](wide).backward(dy.double())
    assert wide.grad is not None
    assert (ew.activate_grad(x, dy, name).double() - wide.grad).abs().max() < 1e-5


@pytest.mark.parametrize("name", sorted(ew.NAMES))
def test_activations_keep_the_ends_of_the_range(name: str) -> None:
    inf, nan = math.inf, math.nan
    got = ew.activate(torch.tensor([inf, nan, 0.0, -inf]), name)
    limit = 1.0 if name in ("tanh", "sigmoid") else inf
    low = -1.0 if name == "tanh" else 0.0
    assert got[0] == limit
    assert got[1].isnan() or name == "relu"
    assert got[2] == (0.5 if name == "sigmoid" else 0)
    assert got[3] == low


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(ew.NAMES))
def test_an_element_has_the_same_bits_wherever_it_stands(dtype: torch.dtype, name: str) -> None:
    x, dy = torch.randn(70_001).to(dtype) * 3, torch.randn(70_001).to(dtype)
    full, grad = ew.activate(x, name), ew.activate_grad(x, dy, name)
    for n in (*range(1, 36), 100, 4097):
        for start in (0, 3, 69_000 - n):
            part = slice(start, start + n)
            assert torch.equal(ew.activate(x[part], name), full[part])
            assert torch.equal(ew.activate_grad(x[part], dy[part], name), grad[part])
    library.set_threads(2)
    assert torch.equal(ew.activate(x, name), full)
    assert torch.equal(ew.activate_grad(x, dy, name), grad)
    strided = torch.randn(7, 10, 3).to(dtype).transpose(0, 1)
    assert torch.equal(ew.activate(strided, name), ew.activate(strided.contiguous(), name))


def test_exp_and_log_are_accurate_and_keep_the_ends() -> None:
    x = torch.linspace(-87, 88.7, 300_001)
    assert ulps(ew.exp(x), x.double().exp()) < 1
    tiny = torch.linspace(-103, -87, 1001)  # denormal results: within one of them
    assert (ew.exp(tiny).double() - tiny.double().exp()).abs().max() <= 2**-149
    assert ew.exp(torch.tensor([-math.inf, math.inf, math.nan, 0, -200, 200])).nan_to_num(7, posinf=8).tolist() == [
        0,
        8,
        7,
        1,
        0,
        8,
    ]
    y = torch.cat([torch.logspace(-38, 38, 200_001), torch.linspace(0.5, 2, 100_001)])
    y = y[y != 1]
    assert ulps(ew.log(y), y.double().log()) < 1
    assert ulps(ew.log(torch.tensor([1e-40, 1.4e-45])), torch.tensor([1e-40, 1.4e-45]).double().log()) < 1
    assert ew.log(torch.tensor([0.0, 1.0, math.inf])).tolist() == [-math.inf, 0.0, math.inf]
    assert ew.log(torch.tensor([-1.0, math.nan, -1e-40])).isnan().all()
    for function, values in ((ew.exp, x), (ew.log, y)):
        full = function(values)
        for n in range(1, 40):
            assert torch.equal(function(values[n : 2 * n]), full[n : 2 * n])


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_max_is_exact(dtype: torch.dtype) -> None:
    for columns in (1, 15, 16, 17, 1003, 50_257):
        x = torch.randn(5, columns).to(dtype) - 20
        assert torch.equal(ew.row_max(x), x.float().amax(1))
        assert torch.equal(ew.row_max(x[:, : columns // 2 + 1]), x[:, : columns // 2 + 1].float().amax(1))
    x = torch.zeros(3, 20, dtype=dtype)
    x[0, 3], x[1, 18], x[2] = math.nan, math.inf, -math.inf
    got = ew.row_max(x)
    assert got[0].isnan() and got[1] == math.inf and got[2] == -math.inf
    assert torch.equal(ew.row_max(torch.empty(2, 0, dtype=dtype)), torch.full((2,), -math.inf))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_leafs_sum_of_exponentials_depends_on_the_leaf_alone(dtype: torch.dtype) -> None:
    x = torch.randn(40, 5003).to(dtype) * 4
    borders = (0, 7, 7, 640, 1500, 5003)
    top = ew.row_max(x)
    got = ew.exp_sum(x, top, borders)
    for leaf, (lo, hi) in enumerate(itertools.pairwise(borders)):
        want = (x[:, lo:hi].double() - top.double()[:, None]).exp().sum(1)
        assert ((got[:, leaf].double() - want).abs() <= 2e-6 * want).all()
        assert torch.equal(ew.exp_sum(x[:, lo:hi].contiguous(), top, (0, hi - lo))[:, 0], got[:, leaf])
        assert torch.equal(ew.exp_sum(x[9:12], top[9:12], (lo, hi))[:, 0], got[9:12, leaf])
    library.set_threads(2)
    assert torch.equal(ew.exp_sum(x, top, borders), got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 16, 100, 1600])
def test_rms_norm_is_accurate_row_by_row(dtype: torch.dtype, width: int) -> None:
    x, weight = (torch.randn(50, width) * 3 + 1).to(dtype), torch.randn(width).to(dtype)
    y = ew.rms_norm(x, weight, 1e-5)
    want = F.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    assert ((y.double() - want).abs() <= 4e-6 + want.abs() * (2e-6 if dtype == torch.float32 else 2**-8)).all()
    for rows in (slice(3, 4), slice(10, 21)):
        assert torch.equal(ew.rms_norm(x[rows], weight, 1e-5), y[rows])
    library.set_threads(2)
    assert torch.equal(ew.rms_norm(x, weight, 1e-5), y)
    strided = torch.randn(9, 2, width).to(dtype)[:, 1]
    assert torch.equal(ew.rms_norm(strided, weight, 1e-5), ew.rms_norm(strided.contiguous(), weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 25, 64, 768, 1003])
@pytest.mark.parametrize("biased", [True, False])
def test_layer_norm_is_accurate_row_by_row(dtype: torch.dtype, width: int, biased: bool) -> None:
    x, weight = (torch.randn(50, width) * 3 + 1).to(dtype), torch.randn(width).to(dtype)
    bias = torch.randn(width).to(dtype) if biased else None
    y = ew.layer_norm(x, weight, bias, 1e-5)
    want = F.layer_norm(x.double(), (width,), weight.double(), None if bias is None else bias.double(), 1e-5)
    assert ((y.double() - want).abs() <= 6e-6 + want.abs() * (2e-6 if dtype == torch.float32 else 2**-8)).all()
    for rows in (slice(3, 4), slice(10, 21)):
        assert torch.equal(ew.layer_norm(x[rows], weight, bias, 1e-5), y[rows])
    library.set_threads(2)
    assert torch.equal(ew.layer_norm(x, weight, bias, 1e-5), y)
    strided = torch.randn(9, 2, width).to(dtype)[:, 1]
    whole = ew.layer_norm(strided.contiguous(), weight, bias, 1e-5)
    assert torch.equal(ew.layer_norm(strided, weight, bias, 1e-5), whole)


@pytest.mark.parametrize("size", [0, 1, 63, 65_536, 65_537, 300_001])
def test_a_sum_of_squares_is_accurate_at_any_number_of_threads(size: int) -> None:
    x = torch.randn(size)
    found = ew.square_sum(x)
    assert float(found) == pytest.approx(float(x.double().square().sum()), rel=1e-6)
    library.set_threads(2)
    assert torch.equal(ew.square_sum(x), found)
    assert not math.isfinite(float(ew.square_sum(torch.tensor([1.0, math.inf, 3e38]))))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-rotation by definition, rounded once."""
    half, wide = cos.shape[1], x.float()
    a, b, c, s = wide[..., :half], wide[..., half : 2 * half], cos[:, None], sin[:, None]
    return torch.cat([a * c - b * s, b * c + a * s, wide[..., 2 * half :]], -1).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "half"), [(50, 9), (64, 32), (64, 8), (6, 0), (7, 3), (128, 16)])
def test_rotary_is_the_definition_in_place(dtype: torch.dtype, width: int, half: int) -> None:
    qkv = torch.randn(11, 4, 3, width).to(dtype)
    cos, sin = torch.randn(11, half), torch.randn(11, half)
    view = qkv[:, :, 1]
    want, others = turned(view, cos, sin), qkv[:, :, ::2].clone()
    assert torch.equal(ew.rotary_(view.clone(), cos, sin), want)
    assert torch.equal(ew.rotary_(view[4:5].clone(), cos[4:5], sin[4:5]), want[4:5])
    assert torch.equal(ew.rotary_(view.clone(), cos, sin, inverse=True), turned(view, cos, -sin))
    assert ew.rotary_(view, cos, sin) is view
    assert torch.equal(qkv[:, :, 1], want)
    assert torch.equal(qkv[:, :, ::2], others)


def test_wrong_arguments_are_refused_in_words() -> None:
    x = torch.zeros(4, 6)
    with pytest.raises(ConfigError, match="activation 'nope' has no native kernel"):
        ew.activate(x, "nope")
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        ew.activate(x.double(), "gelu")
    with pytest.raises(ConfigError, match="dy is"):
        ew.activate_grad(x, x[:3], "gelu")
    with pytest.raises(ConfigError, match="exp: x is .* takes strided float32 on the CPU"):
        ew.exp(x.bfloat16())
    with pytest.raises(ConfigError, match="a matrix"):
        ew.row_max(x[0])
    with pytest.raises(ConfigError, match="must ascend"):
        ew.exp_sum(x, torch.zeros(4), (0, 7))
    with pytest.raises(ConfigError, match="row maxima"):
        ew.exp_sum(x, torch.zeros(3), (0, 6))
    with pytest.raises(ConfigError, match="weight"):
        ew.rms_norm(x, torch.ones(5), 1e-5)
    with pytest.raises(ConfigError, match="tokens, heads, head_dim"):
        ew.rotary_(x, x, x)
    with pytest.raises(ConfigError, match="do not fit"):
        ew.rotary_(torch.zeros(4, 2, 6), torch.zeros(4, 4), torch.zeros(4, 4))
    with pytest.raises(ConfigError, match="table of angles"):
        ew.rotary_(torch.zeros(4, 2, 6), torch.zeros(4, 2), torch.zeros(3, 2))

"""The packed product: the bits of an element depend on its row of x, its row of W and the leaves' borders alone."""

import itertools
import os
import signal
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from parallel.errors import ConfigError, OperandError
from parallel.native.compiled import library
from parallel.native.elementwise import activate
from parallel.native.gemm import Source, nodes, product
from parallel.native.packed_weight import PackedMatrix

pytestmark = pytest.mark.skipif(not library.available(), reason="the native kernels cannot be built here")
DTYPES = (torch.float32, torch.bfloat16)
F32 = torch.float32
ODD = (0, 31, 64, 100, 101, 101, 257)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.manual_seed(0)
    library.set_threads(1)
    yield
    library.set_threads(1)


def normal(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def tree(leaves: list[Tensor]) -> Tensor:
    """node(lo, hi) = node(lo, mid) + node(mid, hi) by definition."""
    if len(leaves) == 1:
        return leaves[0]
    mid = (len(leaves) + 1) // 2
    return tree(leaves[:mid]) + tree(leaves[mid:])


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def even(k: int, leaves: int) -> tuple[int, ...]:
    return tuple(k * i // leaves for i in range(leaves + 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 64, 64), (3, 70, 33), (17, 130, 257), (300, 65, 1025), (7, 5, 3), (2, 1, 1)]
)
def test_product_is_accurate_for_any_layout_of_both_operands(dtype: torch.dtype, m: int, n: int, k: int) -> None:
    x, w = normal(m, k, dtype=dtype), normal(n, k, dtype=dtype)
    want = x.double() @ w.double().t()
    wide_x, wide_w = normal(m, 2 * k, dtype=dtype), normal(n, 2 * k, dtype=dtype)
    wide_x[:, ::2], wide_w[:, ::2] = x, w
    results = []
    for left in (x, x.t().contiguous().t(), wide_x[:, ::2]):
        for right in (w, w.t().contiguous().t(), wide_w[:, ::2]):
            results.append(product([Source(left, PackedMatrix.pack(right), (0, k))], out_dtype=F32))
    assert relative_error(results[0], want) < 2e-6
    assert all(torch.equal(results[0], result) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "borders"), [(130, ODD), (200, even(1024, 8)), (70, (0, 2500)), (65, even(2000, 3)), (40, even(96, 8))]
)
def test_a_row_has_the_same_bits_whatever_is_around_it(dtype: torch.dtype, n: int, borders: tuple[int, ...]) -> None:
    k = borders[-1]
    x, w = normal(512, k, dtype=dtype), normal(n, k, dtype=dtype)
    packed = PackedMatrix.pack(w, borders)
    full = product([Source(x, packed, borders)], out_dtype=F32)
    for threads in (1, 2):
        library.set_threads(threads)
        for m in (*range(1, 41), 100, 241, 512):
            for offset in (0, 5):
                rows = x[offset : offset + m]
                got = product([Source(rows, packed, borders)], out_dtype=F32)
                assert torch.equal(got, full[offset : offset + m]), (threads, m, offset)
    scattered = torch.randperm(512)[:33]
    assert torch.equal(product([Source(x[scattered], packed, borders)], out_dtype=F32), full[scattered])
    for columns in (slice(0, 1), slice(17, 33), slice(n - 5, n)):
        some = PackedMatrix.pack(w[columns], borders)
        assert torch.equal(product([Source(x, some, borders)], out_dtype=F32), full[:, columns])


@pytest.mark.parametrize("dtype", DTYPES)
def test_leaves_add_up_in_the_fixed_tree_wherever_they_lie_in_k(dtype: torch.dtype) -> None:
    x, w = normal(19, ODD[-1], dtype=dtype), normal(70, ODD[-1], dtype=dtype)
    packed = PackedMatrix.pack(w, ODD)
    leaves = []
    for lo, hi in itertools.pairwise(ODD):
        alone = PackedMatrix.pack(w[:, lo:hi])
        leaves.append(product([Source(x[:, lo:hi], alone, (0, hi - lo))], out_dtype=F32))
    for count in range(1, len(leaves) + 1):
        got = product([Source(x, packed, ODD[: count + 1])], out_dtype=F32)
        assert torch.equal(got, tree(leaves[:count])), count


def test_a_single_chain_is_a_chain_of_fused_multiply_adds() -> None:
    x, w = normal(5, 40), normal(3, 40)
    chain = torch.zeros(5, 3, dtype=torch.float64)
    for k in range(40):  # float64 holds the product of two float32 exactly: rounding once is what fma does
        chain = (x[:, k, None].double() * w[None, :, k].double() + chain).float().double()
    assert torch.equal(product([Source(x, PackedMatrix.pack(w), (0, 40))]), chain.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_nodes_are_the_subtrees_that_finish_to_the_product(dtype: torch.dtype) -> None:
    borders = even(600, 8)
    x, w = normal(21, 600, dtype=dtype), normal(100, 600, dtype=dtype)
    source = Source(x, PackedMatrix.pack(w, borders), borders)
    whole = product([source], out_dtype=F32)
    left, right = nodes([source], [(0, 4), (4, 8)])
    assert torch.equal(left + right, whole)
    a, b, c, d = nodes([source], [(0, 2), (2, 3), (3, 4), (4, 8)])
    assert torch.equal((a + (b + c)) + d, whole)
    # a rank that holds leaves 4..8 alone: another K, other offsets, the same node
    part = PackedMatrix.pack(w[:, 300:], [b - 300 for b in borders[4:]])
    (alone,) = nodes([Source(x[:, 300:], part, tuple(b - 300 for b in borders[4:]))], [(0, 4)])
    assert torch.equal(alone, right)


def test_nodes_write_into_a_tensor_or_an_address() -> None:
    source = Source(normal(4, 64), PackedMatrix.pack(normal(70, 64)), even(64, 4))
    want = nodes([source], [(0, 2), (2, 4)])
    out = torch.full((3, 4, 70), 7.0)
    assert nodes([source], [(0, 2), (2, 4)], out=out[:2]) is not None
    assert torch.equal(out[:2], want)
    assert (out[2] == 7).all()
    out[:2] = 0
    assert nodes([source], [(0, 2), (2, 4)], out=out.data_ptr()) == out.data_ptr()
    assert torch.equal(out[:2], want)
    assert nodes([source], []).shape == (0, 4, 70)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 9, 64])
def test_several_sources_share_the_leaves_chain_by_chain(dtype: torch.dtype, rows: int) -> None:
    first, second = (0, 5, 12, 21), (0, 8, 8, 17)
    xs = normal(rows, 21, dtype=dtype), normal(rows, 17, dtype=dtype)
    ws = normal(70, 21, dtype=dtype), normal(70, 17, dtype=dtype)
    sources = [Source(x, PackedMatrix.pack(w, cuts), cuts) for x, w, cuts in zip(xs, ws, (first, second), strict=True)]
    got = product(sources, out_dtype=F32)
    pieces = [
        t[:, borders[leaf] : borders[leaf + 1]]
        for t1, t2 in (xs, ws)
        for leaf in range(3)
        for t, borders in ((t1, first), (t2, second))
    ]
    if dtype == torch.bfloat16:  # every piece starts a block of its own
        pieces = [torch.nn.functional.pad(piece, (0, -piece.shape[1] % 32)) for piece in pieces]
    x, w = torch.cat(pieces[:6], 1), torch.cat(pieces[6:], 1)
    lengths = [piece.shape[1] for piece in pieces[:6]]
    borders = tuple(sum(lengths[: 2 * leaf]) for leaf in range(4))
    assert torch.equal(got, product([Source(x, PackedMatrix.pack(w), borders)], out_dtype=F32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [None, "gelu", "gelu_new", "quick_gelu", "relu", "silu", "tanh", "sigmoid"])
def test_the_epilogue_equals_its_parts(dtype: torch.dtype, name: str | None) -> None:
    x, w, bias = normal(7, 50, dtype=dtype), normal(75, 50, dtype=dtype), normal(75, dtype=dtype)
    source = Source(x, PackedMatrix.pack(w, (0, 20, 50)), (0, 20, 50))
    want = (product([source], out_dtype=F32) + bias.float()).to(dtype)
    if name is not None:
        want = activate(want, name)
    assert torch.equal(product([source], bias, name), want)
    assert torch.equal(product([source], bias.float(), name), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_both_operands_are_products_of_transposed_views(dtype: torch.dtype) -> None:
    x, w, dy = normal(33, 70, dtype=dtype), normal(90, 70, dtype=dtype), normal(33, 90, dtype=dtype)
    dx = product([Source(dy, PackedMatrix.pack(w.t()), (0, 90))], out_dtype=F32)
    dw = product([Source(dy.t(), PackedMatrix.pack(x.t()), (0, 33))], out_dtype=F32)
    assert relative_error(dx, dy.double() @ w.double()) < 2e-6
    assert relative_error(dw, dy.double().t() @ x.double()) < 2e-6


def test_a_packed_matrix_follows_its_source_only_by_repack() -> None:
    w, x = normal(70, 30), normal(2, 30)
    packed = PackedMatrix.pack(w)
    before = product([Source(x, packed, (0, 30))])
    address = packed.address
    w.mul_(2)
    assert torch.equal(product([Source(x, packed, (0, 30))]), before)
    packed.repack(w)
    assert torch.equal(product([Source(x, packed, (0, 30))]), 2 * before)
    assert packed.address == address
    assert packed.nbytes == 128 * 30 * 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_shapes_work(dtype: torch.dtype) -> None:
    def run(m: int, n: int, k: int, borders: tuple[int, ...], bias: Tensor | None = None) -> Tensor:
        return product([Source(normal(m, k, dtype=dtype), PackedMatrix.pack(normal(n, k, dtype=dtype)), borders)], bias)

    bias = normal(5, dtype=dtype)
    assert run(0, 5, 7, (0, 7)).shape == (0, 5)
    assert run(3, 0, 7, (0, 7)).shape == (3, 0)
    assert torch.equal(run(3, 5, 0, (0, 0), bias), bias.expand(3, 5))
    assert torch.equal(run(3, 5, 7, (0,), bias), bias.expand(3, 5)), "no leaves: an empty sum"
    assert torch.equal(run(3, 5, 7, (2, 2, 2)), torch.zeros(3, 5, dtype=dtype))


def test_rows_in_a_strided_batch_need_no_copy_to_be_right() -> None:
    qkv = normal(24, 3, 1024)
    w = PackedMatrix.pack(normal(64, 1024))
    for part in range(3):
        got = product([Source(qkv[:, part], w, (0, 1024))])
        assert torch.equal(got, product([Source(qkv[:, part].contiguous(), w, (0, 1024))]))
    row = normal(1, 1024)
    alone = product([Source(row, w, (0, 1024))])
    assert torch.equal(product([Source(row.expand(9, 1024), w, (0, 1024))]), alone.expand(9, 64))


def test_a_forked_child_computes_with_threads_of_its_own() -> None:
    source = Source(normal(64, 256), PackedMatrix.pack(normal(512, 256)), (0, 256))
    library.set_threads(2)
    want = product([source])
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # a child that waits for threads it does not have must fail, not hang
        os._exit(0 if torch.equal(product([source]), want) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_wrong_operands_are_refused_in_words() -> None:
    w = normal(6, 10)
    packed, x = PackedMatrix.pack(w), normal(3, 10)
    with pytest.raises(ConfigError, match=r"must be \[3, 10\]"):
        product([Source(normal(3, 11), packed, (0, 10))])
    with pytest.raises(ConfigError, match="bfloat16"):
        product([Source(x.bfloat16(), packed, (0, 10))])
    with pytest.raises(ConfigError, match="on the CPU"):
        product([Source(torch.empty(3, 10, device="meta"), packed, (0, 10))])
    with pytest.raises(ConfigError, match="must ascend"):
        product([Source(x, packed, (0, 11))])
    with pytest.raises(ConfigError, match="must ascend"):
        product([Source(x, packed, (0, 7, 5))])
    with pytest.raises(ConfigError, match="bias"):
        product([Source(x, packed, (0, 10))], normal(7))
    with pytest.raises(ConfigError, match="activation 'softmax'"):
        product([Source(x, packed, (0, 10))], activation="softmax")
    with pytest.raises(ConfigError, match="out_dtype"):
        product([Source(x, packed, (0, 10))], out_dtype=torch.float64)
    with pytest.raises(ConfigError, match="at least one source"):
        product([])
    with pytest.raises(ConfigError, match="share N"):
        product([Source(x, packed, (0, 10)), Source(x, PackedMatrix.pack(normal(7, 10)), (0, 10))])
    with pytest.raises(ConfigError, match="not a range"):
        nodes([Source(x, packed, (0, 10))], [(0, 2)])
    with pytest.raises(OperandError, match=r"nodes: out is .* its shape must be \[1, 3, 6\]"):
        nodes([Source(x, packed, (0, 10))], [(0, 1)], out=torch.empty(3, 6))


def test_weights_that_cannot_be_packed_are_refused_in_words() -> None:
    with pytest.raises(OperandError, match="pack: the matrix is .*float16 .* takes strided float32 or bfloat16"):
        PackedMatrix.pack(torch.zeros(3, 4, dtype=torch.float16))
    with pytest.raises(ConfigError, match="cannot pack"):
        PackedMatrix.pack(torch.zeros(3))
    with pytest.raises(ConfigError, match="leave the range"):
        PackedMatrix.pack(torch.zeros(3, 4), (0, 5))
    with pytest.raises(ConfigError, match="cannot repack"):
        PackedMatrix.pack(torch.zeros(3, 4)).repack(torch.zeros(4, 3))
    half = PackedMatrix.pack(torch.zeros(3, 8, dtype=torch.bfloat16))
    with pytest.raises(ConfigError, match="splits a block of 32"):
        product([Source(torch.zeros(1, 8, dtype=torch.bfloat16), half, (0, 3, 8))])


def test_plans_of_one_weight_do_not_mix() -> None:
    x, w = normal(2, 64), PackedMatrix.pack(normal(64, 64))
    whole, halves = product([Source(x, w, (0, 64))]), product([Source(x, w, (0, 32, 64))])
    lower = product([Source(x, w, (0, 32))])
    assert not torch.equal(whole, lower)
    assert torch.equal(halves, lower + product([Source(x, w, (32, 64))]))
    for other in (PackedMatrix.pack(normal(64, 64)), PackedMatrix.pack(normal(64, 64))):
        pair = product([Source(x, w, (0, 64)), Source(x, other, (0, 64))])
        assert torch.allclose(pair, whole + product([Source(x, other, (0, 64))]), atol=1e-4)
    assert len(w.plans) == 6

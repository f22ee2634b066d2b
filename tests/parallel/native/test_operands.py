"""What a native kernel cannot read as it lies is refused by name or copied, never misread; none ends the process."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.attention.attend import AttentionMetadata, AttentionSpec, Causal
from parallel.errors import ConfigError, NativeMemoryError, OperandError
from parallel.native import adamw, attention, dropout, elementwise
from parallel.native.compiled import library
from parallel.native.gemm import Source, product
from parallel.native.operands import Status, succeeded
from parallel.native.packed_weight import PackedMatrix

pytestmark = pytest.mark.skipif(not library.available(), reason="the native kernels cannot be built here")
ROOT = Path(__file__).parents[3]


def paged(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None = None) -> Tensor:
    """One sequence through the cached kernel."""
    T, K, H = k.shape if k.dim() == 3 else (3, 2, 8)
    blocks = -(-T // 16)
    meta = AttentionMetadata.build([T], [T], [list(range(blocks))], 16)
    caches = (torch.zeros(blocks, K, 1, 16 * H, dtype=q.dtype) for _ in range(2))
    return attention.forward(meta.paged_step, *caches, q, k, v, scale=0.3, slopes=slopes)  # type: ignore


def half(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float16)


ENTRIES: list[Callable[[Callable[..., Tensor]], object]] = [
    lambda x: elementwise.activate(x(2, 8), "gelu"),
    lambda x: elementwise.activate_grad(x(2, 8), x(2, 8), "gelu"),
    lambda x: elementwise.exp(x(8)),
    lambda x: elementwise.log(x(8)),
    lambda x: elementwise.row_max(x(2, 8)),
    lambda x: elementwise.column_sums(x(2, 8)),
    lambda x: elementwise.exp_sum(x(2, 8), torch.zeros(2), (0, 8)),
    lambda x: elementwise.rms_norm(x(2, 8), torch.ones(8), 1e-5),
    lambda x: elementwise.rms_norm(torch.zeros(2, 8), x(8), 1e-5),
    lambda x: elementwise.layer_norm_grad(x(2, 8), x(2, 8), None, 1e-5, (0, 2)),
    lambda x: elementwise.softmax_grad(x(2, 8), *torch.zeros(2, 2), torch.zeros(2).long(), torch.zeros(2)),  # type: ignore
    lambda x: elementwise.rotary_(x(2, 2, 8), torch.zeros(2, 2), torch.zeros(2, 2)),
    lambda x: elementwise.rotary_(torch.zeros(2, 2, 8), x(2, 2), x(2, 2)),
    lambda x: PackedMatrix.pack(x(8, 8)),
    lambda x: product([Source(x(2, 8), PackedMatrix.pack(torch.zeros(4, 8)), (0, 8))]),
    lambda x: product([Source(torch.zeros(2, 8), PackedMatrix.pack(torch.zeros(4, 8)), (0, 8))], x(4)),
    lambda x: paged(x(3, 2, 8), x(3, 2, 8), x(3, 2, 8)),
    lambda x: paged(torch.zeros(3, 2, 8), x(3, 2, 8), torch.zeros(3, 2, 8)),
    lambda x: paged(*torch.zeros(3, 3, 2, 8), slopes=x(2)),  # type: ignore
    lambda x: dropout.drop_rows(x(2, 8), torch.zeros(2).long(), 0, 1, 1.0),
    lambda x: adamw.update(x(8), *torch.zeros(3, 8), RATES),  # type: ignore
    lambda x: elementwise.gate(x(2, 8), x(2, 8), "silu"),
    lambda x: elementwise.gate(torch.zeros(2, 8), x(2, 8), "silu"),
    lambda x: elementwise.gate_grad(x(2, 8), x(2, 8), x(2, 8), "silu"),
]
PACKING = 13
RATES = adamw.Rates(step=1, learning_rate=1e-3, beta1=0.9, beta2=0.9, epsilon=1e-8, weight_decay=0.0)
FOREIGN: dict[str, Callable[..., Tensor]] = {
    "float16": half,
    "float64": lambda *shape: torch.zeros(*shape, dtype=torch.float64),
    "int8": lambda *shape: torch.zeros(*shape, dtype=torch.int8),
    "meta": lambda *shape: torch.zeros(*shape, device="meta"),
    "sparse": lambda *shape: torch.zeros(*shape).to_sparse(),
    "wants a gradient": lambda *shape: torch.zeros(*shape, requires_grad=True),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("entry", range(len(ENTRIES)))
def test_foreign_memory_is_refused_at_every_entry(entry: int, kind: str) -> None:
    if entry == PACKING and kind == "wants a gradient":  # packing a parameter is a copy, without history
        packed = ENTRIES[entry](FOREIGN[kind])
        assert isinstance(packed, PackedMatrix) and packed.storage.view(torch.float32).count_nonzero() == 0
        return
    with pytest.raises(ConfigError):
        ENTRIES[entry](FOREIGN[kind])


@pytest.mark.parametrize("shape", [(), (8,), (2, 8), (2, 2, 2, 8)])
@pytest.mark.parametrize("entry", range(len(ENTRIES)))
def test_a_tensor_of_other_dimensions_is_taken_as_what_it_is_or_refused(entry: int, shape: tuple[int, ...]) -> None:
    with contextlib.suppress(ConfigError):  # and not an IndexError, nor a signal
        ENTRIES[entry](lambda *_: torch.zeros(shape))


def test_attention_over_what_are_no_heads_is_refused() -> None:
    x = torch.zeros(2, 8)
    for operands in ((x, x, x), (x[None], x, x), (x[0, 0], x[None], x[None])):
        with pytest.raises(ConfigError, match="tokens, heads, head_dim"):
            Causal([1])(AttentionSpec(0, 1.0), *operands)


def test_an_enum_that_is_no_type_and_sizes_that_are_none_come_back_as_statuses() -> None:
    lib = library.library()
    x = torch.zeros(8)
    assert lib.ew_activate.restype is not None
    for dtype in (0, 3, -1):
        assert elementwise._function("ew_activate", True)(1, dtype, 8, x.data_ptr(), x.data_ptr()) == Status.BAD_TYPE
    run = elementwise._function("ew_activate", True)
    assert run(99, 1, 8, x.data_ptr(), x.data_ptr()) == Status.BAD_INDEX
    assert run(1, 1, -8, x.data_ptr(), x.data_ptr()) == Status.BAD_SIZE
    assert run(1, 1, 8, None, x.data_ptr()) == Status.NO_DATA
    assert run(1, 1, 7, x.data_ptr() + 2, x.data_ptr()) == Status.MISALIGNED
    maxima = elementwise._function("ew_row_max", True)
    assert maxima(1, 1 << 40, 1 << 40, x.data_ptr(), 1, x.data_ptr()) == Status.BAD_SIZE
    with pytest.raises(NativeMemoryError, match="memory"):
        succeeded("exp", Status.NO_MEMORY)


def test_memory_that_was_freed_or_starts_between_elements_is_refused() -> None:
    freed = torch.zeros(8)
    freed.untyped_storage().resize_(0)
    with pytest.raises(OperandError, match="without memory"):
        elementwise.exp(freed)
    odd = torch.frombuffer(bytearray(4 * 9), dtype=torch.float32, offset=2, count=8)
    with pytest.raises(OperandError, match="clone"):
        elementwise.exp(odd)


def test_strided_expanded_and_empty_operands_give_what_contiguous_ones_do() -> None:
    torch.manual_seed(0)
    big = torch.randn(6, 40)
    for x in (big[::2, 1::3], big.t(), big[:, :1].expand(6, 9), big[:0], big[:, :0]):
        plain = x.contiguous()
        assert torch.equal(elementwise.activate(x, "gelu"), elementwise.activate(plain, "gelu"))
        assert torch.equal(elementwise.row_max(x), elementwise.row_max(plain))
        assert torch.equal(elementwise.column_sums(x), elementwise.column_sums(plain))
        weight = PackedMatrix.pack(torch.randn(5, x.shape[1]))
        borders = (0, x.shape[1])
        assert torch.equal(product([Source(x, weight, borders)]), product([Source(plain, weight, borders)]))
    bias = torch.randn(10)[::2]
    assert torch.equal(product([Source(x, weight, borders)], bias), product([Source(x, weight, borders)], bias.clone()))


def test_alibi_slopes_with_a_stride_are_read_as_they_are() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 20, 4, 8)
    every = torch.rand(8)
    assert torch.equal(paged(q, k, v, every[::2]), paged(q, k, v, every[::2].contiguous()))
    one = torch.tensor([0.5]).expand(4)
    assert torch.equal(paged(q, k, v, one), paged(q, k, v, one.contiguous()))


def test_block_tables_and_positions_outside_of_the_cache_are_refused() -> None:
    int32 = torch.int32

    def step(starts: list[int], lens: list[int], table: list[list[int]]) -> attention.PagedStep:
        tensors = (torch.tensor(given, dtype=int32) for given in (starts, lens, table))
        return attention.PagedStep(*tensors, 16)  # type: ignore

    for starts, lens, table in (
        ([0, 2], [1], [[0]]),  # more new tokens than there are
        ([0, 0], [1], [[0]]),
        ([1, 2], [1], [[0]]),
        ([0, 1], [17], [[0]]),  # needs two blocks
        ([0, 1], [1], [[-1]]),
        ([0, 1], [-1], [[0]]),
    ):
        with pytest.raises(OperandError, match="attention step"):
            step(starts, lens, table)
    with pytest.raises(OperandError, match="int32"):
        attention.PagedStep(torch.tensor([0, 1]), torch.tensor([1]), torch.tensor([[0]]), 16)
    x = torch.zeros(1, 2, 8)
    cache = torch.zeros(3, 2, 1, 128)
    with pytest.raises(ConfigError, match="block 3 of a cache of 3"):
        attention.forward(step([0, 1], [1], [[3]]), cache, cache.clone(), x, x, x, scale=1.0)
    with pytest.raises(OperandError, match="k_cache"):
        attention.forward(step([0, 1], [1], [[0]]), cache[:, :1], cache, x, x, x, scale=1.0)


def test_outputs_that_share_memory_with_what_is_still_read_are_refused() -> None:
    x = torch.zeros(20)
    with pytest.raises(OperandError, match="shares memory"):
        adamw.update(x[:8], x[4:12], torch.zeros(8), torch.zeros(8), RATES)
    angles = torch.zeros(2, 2)
    for heads in (torch.zeros(2, 1, 8).expand(2, 3, 8), torch.zeros(40).as_strided((2, 3, 8), (20, 4, 1))):
        with pytest.raises(OperandError, match="one place in memory"):
            elementwise.rotary_(heads, angles, angles)
    fused = torch.zeros(2, 5, 8)[:, 1:4]  # heads of a fused row, and heads before tokens
    for heads in (fused, torch.zeros(3, 2, 8).transpose(0, 1)):
        assert elementwise.rotary_(heads, angles, angles) is heads


def test_a_rotation_into_strided_memory_arrives_there() -> None:
    torch.manual_seed(0)
    x, (cos, sin) = torch.randn(3, 2, 16)[..., ::2], torch.randn(2, 3, 4)
    want = elementwise.rotary_(x.contiguous(), cos, sin)
    assert elementwise.rotary_(x, cos, sin) is x
    assert torch.equal(x, want)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf"), 1e-42])
def test_odd_numbers_in_attention_stay_in_the_rows_that_see_them(odd: float) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 40, 2, 8)
    clean = paged(q, k, v)
    k[30, 0, 0] = odd
    found = paged(q, k, v)
    assert torch.equal(found[:30], clean[:30]) and torch.equal(found[:, 1], clean[:, 1])
    if odd != odd:
        assert found[30:, 0].isnan().all()


def test_float16_with_the_cpu_backend_is_refused_by_name() -> None:
    x = half(4, 2, 8)
    for backend in ("cpu", None):
        attend = Causal([4], backend)
        if backend is None:
            attend(AttentionSpec(0, 1.0), x, x, x)  # the best that works
            continue
        with pytest.raises(
            ConfigError, match="attention backend cpu was asked for, but it has no kernel for torch.float16"
        ):
            attend(AttentionSpec(0, 1.0), x, x, x)


SHORT = """
import resource, torch
torch.set_num_threads(1)
from parallel.errors import NativeMemoryError
from parallel.native import attention
from parallel.native.compiled import library
from parallel.attention.attend import AttentionMetadata
library.configure(threads=2)
H = 1 << 19
x = torch.zeros(2, 1, H)
meta = AttentionMetadata.build([1, 1], [1, 1], [[0], [1]], 16)
cache = torch.zeros(2, 1, 1, 16 * H), torch.zeros(2, 1, 1, 16 * H)
library.library()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), resource.RLIM_INFINITY))
for _ in range(2):
    try:
        attention.forward(meta.paged_step, *cache, x, x, x, scale=1.0)
        raise SystemExit("it had memory enough")
    except NativeMemoryError as error:
        print(error)
small = torch.ones(2, 1, 8)
cache = torch.zeros(2, 1, 1, 128), torch.zeros(2, 1, 1, 128)
assert torch.equal(attention.forward(meta.paged_step, *cache, small, small, small, scale=1.0), small)
"""


@pytest.mark.skipif(bool(library.extra_flags()), reason="a sanitiser's own memory is beyond any limit")
def test_a_thread_without_memory_is_the_callers_error_and_the_pool_goes_on() -> None:
    assert in_child(SHORT).count("attention: the memory for its working room could not be had") == 2


def in_child(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-2000:])
    return done.stdout


BESIDE = """
import os, sys, threading, time, torch
torch.set_num_threads(1)
from parallel.native.compiled import library
from parallel.native.gemm import Source, product
from parallel.native.packed_weight import PackedMatrix
library.configure({cache!r}, 3, {flags!r})
x, w = torch.randn(64, 256), PackedMatrix.pack(torch.randn(512, 256))
def once():
    return product([Source(x, w, (0, 256))])
want = once()
"""


@pytest.mark.parametrize("program", [
    """
wrong = []
def many():
    for _ in range(100):
        wrong.extend([1] * (not torch.equal(once(), want)))
threads = [threading.Thread(target=many) for _ in range(3)]
for thread in threads: thread.start()
for i in range(40): library.set_threads(1 + i % 3); time.sleep(0.001)
for thread in threads: thread.join()
assert not wrong
""", """
stop = []
def many():
    while not stop: once()
thread = threading.Thread(target=many); thread.start()
for _ in range(8):
    if (pid := os.fork()) == 0: os._exit(0 if torch.equal(once(), want) and torch.equal(once(), want) else 3)
    assert os.waitpid(pid, 0)[1] == 0
stop.append(1); thread.join()
assert torch.equal(once(), want)
""", """
def many():
    out = torch.empty(64, 512)  # torch's own calls do not stand an exit beside them
    while True: product([Source(x, w, (0, 256))], out=out)
for _ in range(2): threading.Thread(target=many, daemon=True).start()
time.sleep(0.1)
sys.exit(0)
"""], ids=["threads", "a fork while the pool works", "an exit while the pool works"])  # fmt: skip
def test_the_pool_stands_what_a_process_does_beside_it(program: str) -> None:
    cache_dir = library.cache_dir()
    in_child(BESIDE.format(cache=cache_dir and str(cache_dir), flags=library.extra_flags()) + program)

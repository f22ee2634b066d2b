"""bfloat16 products have the bits of one order; what they are compiled for has a name (compared: test_variants.py)."""

import pytest
import torch

from parallel.errors import ConfigError
from parallel.native.compiled import instruction_set, library
from parallel.native.gemm import PackedMatrix, Source, product
from tests.parallel.native import order_model

pytestmark = pytest.mark.skipif(not library.available(), reason="the native kernels cannot be built here")


def test_the_kernels_here_equal_the_order_element_by_element() -> None:
    order_model.check()
    library.set_threads(1)


def test_leaves_and_the_bias_keep_denormals() -> None:
    least = 2.0**-126
    x, w = torch.tensor([[least, 1.0]]).bfloat16(), torch.tensor([[1.5, -least]]).bfloat16()
    borders = (0, 1, 2)
    got = product([Source(x, PackedMatrix.pack(w, borders), borders)], out_dtype=torch.float32)
    assert got.item() == least / 2, "1.5 and -1 times the least normal number, each a leaf"
    assert (torch.tensor(least) / 4).item() == least / 4, "the thread itself flushes nothing"


def test_an_instruction_set_is_forced_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(instruction_set.VARIABLE, "portable")
    assert instruction_set.chosen() == "portable"
    monkeypatch.setenv(instruction_set.VARIABLE, "mmx")
    with pytest.raises(
        ConfigError, match="TPD_NATIVE_ISA is 'mmx'; it takes one of avx512_bf16, avx512, avx2, portable"
    ):
        instruction_set.chosen()
    monkeypatch.setattr(instruction_set, "_features", lambda: frozenset({"avx2", "fma"}))
    monkeypatch.setenv(instruction_set.VARIABLE, "avx512")
    with pytest.raises(ConfigError, match="which this CPU cannot run; it takes one of avx2, portable"):
        instruction_set.chosen()


def test_a_cpu_with_amx_multiplies_and_adds() -> None:
    wide = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(instruction_set, "_features", lambda: frozenset((*wide, "amx_bf16")))
        assert instruction_set.runnable() == ("avx512", "avx512_bf16", "avx2", "portable")

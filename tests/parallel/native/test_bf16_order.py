"""bfloat16 products have the bits of one order; what they are compiled for has a name (compared: test_variants.py)."""

import ctypes
from typing import cast

import pytest
import torch

from parallel.errors import ConfigError
from parallel.native.compiled import instruction_set, library
from parallel.native.gemm import Source, product
from parallel.native.packed_weight import PackedMatrix
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
        ConfigError, match="TPD_NATIVE_ISA is 'mmx'; it takes one of amx, avx512_bf16, avx512, avx2, portable"
    ):
        instruction_set.chosen()
    monkeypatch.setattr(instruction_set, "_features", lambda: frozenset({"avx2", "fma"}))
    monkeypatch.setenv(instruction_set.VARIABLE, "avx512")
    with pytest.raises(ConfigError, match="which this CPU cannot run; it takes one of avx2, portable"):
        instruction_set.chosen()


WIDE = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16")


@pytest.mark.parametrize(
    ("more", "names"),
    [
        (("amx_tile", "amx_bf16"), ("amx", "avx512", "avx512_bf16", "avx2", "portable")),
        (("amx_bf16",), ("avx512", "avx512_bf16", "avx2", "portable")),  # hidden from a guest, say
        ((), ("avx512_bf16", "avx512", "avx2", "portable")),
    ],
)
def test_a_cpu_with_amx_uses_it_and_multiplies_and_adds_beside_it(
    monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], names: tuple[str, ...]
) -> None:
    monkeypatch.setattr(instruction_set, "_features", lambda: frozenset((*WIDE, *more)))
    assert instruction_set.runnable() == names


class Refusing:
    """A library whose trial of the tiles fails."""

    @staticmethod
    def tiles_enable(reason: ctypes.Array[ctypes.c_char], size: ctypes.c_int64) -> int:
        reason.value = b"the trial product had wrong bits"
        return 0


def test_tiles_that_fail_their_trial_are_not_used_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(instruction_set.VARIABLE, raising=False)
    assert library._with_tiles(cast(ctypes.CDLL, Refusing()), "amx") == "avx512"
    assert "it is not used: the trial product had wrong bits; the kernels are those for avx512" in caplog.text


@pytest.mark.parametrize("name", instruction_set.TILED)
def test_tiles_that_were_asked_for_and_fail_are_an_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(instruction_set.VARIABLE, name)
    with pytest.raises(ConfigError, match=f"'{name}', which this machine cannot run: the trial product had wrong bits"):
        library._with_tiles(cast(ctypes.CDLL, Refusing()), name)

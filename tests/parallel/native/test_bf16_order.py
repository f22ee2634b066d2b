"""bfloat16 products have the bits of one order with every instruction set that this CPU can run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parallel.errors import ConfigError
from parallel.native import build, instruction_set, library
from parallel.native.gemm import PackedMatrix, Source, product
from tests.parallel.native import order_model

pytestmark = pytest.mark.skipif(not library.available(), reason="the native kernels cannot be built here")


def test_the_kernels_here_equal_the_order_element_by_element() -> None:
    order_model.check()
    library.set_threads(1)


@pytest.mark.parametrize("name", instruction_set.NAMES)
def test_every_instruction_set_has_the_same_bits(name: str, tmp_path: Path) -> None:
    if name not in instruction_set.runnable():
        pytest.skip(f"this CPU has no {name}")
    sources = [build.SOURCES / source for source in ("gemm.cpp", "gemm_pack.cpp", "pool.cpp")]
    for source in (*sources, *build.SOURCES.glob("*.h")):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.native.order_model", str(tmp_path), str(tmp_path / "cache")],
        cwd=Path(__file__).parents[3], env={**os.environ, instruction_set.VARIABLE: name},
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == name


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

"""All kernels give the same bits, whichever instructions they are compiled for (portable code: `make variants`)."""

from __future__ import annotations

import pytest

from parallel.native.compiled import instruction_set
from tests.native_kernels import kernels_or_skip
from tests.parallel.native import variants


@pytest.fixture(scope="module")
def here() -> variants.Digests:
    """Of the library that this machine runs."""
    kernels_or_skip()
    return variants.digests()


@pytest.mark.parametrize("name", ["amx_emulated", "avx512", "avx2"])
def test_an_instruction_set_gives_the_same_bits(here: variants.Digests, name: str) -> None:
    if name not in (*instruction_set.runnable(), instruction_set.EMULATED):
        pytest.skip(f"this CPU cannot run {name}; it runs {instruction_set.runnable()}")
    assert len(here) > 200 and variants.different(variants.under(name), here) == []

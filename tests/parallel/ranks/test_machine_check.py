"""What ranks that meet agree on before they compute: kernels for all or for none, one kind of CPU."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist

from parallel.errors import ConfigError, NativeUnavailable
from parallel.native.compiled import library
from parallel.ranks.group import Numerics
from parallel.ranks.machine_check import agree, cpu_kind

HERE = ["x86_64", "torch-AVX512", "avx2", "avx512f"]
OLDER = ["x86_64", "torch-AVX2", "avx2"]


@pytest.fixture(autouse=True)
def nothing_withheld() -> Iterator[None]:
    yield
    library.withhold(None)


def none_here() -> None:
    raise NativeUnavailable("no C++ compiler (g++ or c++) is on PATH")


def meet(
    kinds: list[list[str]], loads: list[Callable[[], object]], numerics: Numerics = "invariant"
) -> list[Exception | None]:
    """Every rank in a thread of its own; what it raised."""
    store = dist.HashStore()
    raised: list[Exception | None] = [None] * len(kinds)

    def rank(number: int) -> None:
        try:
            agree(store, number, len(kinds), numerics, loads[number], kinds[number])
        except Exception as error:
            raised[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(kinds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return raised


def test_ranks_of_one_kind_agree_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    assert meet([cpu_kind()] * 3, [lambda: None] * 3) == [None] * 3
    assert not caplog.records and library._loaded.withheld is None


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_unlike_cpus_are_refused_on_every_rank_where_bits_must_be_the_same(odd: int) -> None:
    kinds = [OLDER if rank == odd else HERE for rank in range(3)]
    for error in meet(kinds, [lambda: None] * 3):
        assert isinstance(error, ConfigError)
        assert "unlike CPUs" in str(error) and "avx512f" in str(error) and "parallel.numerics=fast" in str(error)


def test_unlike_cpus_are_warned_of_once_where_bits_may_differ(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert meet([HERE, OLDER, OLDER], [lambda: None] * 3, "fast") == [None] * 3
    (said,) = (record.getMessage() for record in caplog.records)
    assert "ranks 0 and 1 run on unlike CPUs" in said and "differ in the last bits" in said


@pytest.mark.parametrize("numerics", ["invariant", "fast"])
def test_one_rank_without_kernels_has_all_do_without(numerics: Numerics, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert meet([HERE] * 3, [lambda: None, none_here, lambda: None], numerics) == [None] * 3
    assert not library.available()
    with pytest.raises(NativeUnavailable, match=r"rank 1: no C\+\+ compiler"):
        library.library()
    assert len(caplog.records) == 1
    assert meet([HERE] * 2, [lambda: None] * 2) == [None] * 2, "another group, in which all have them"
    assert library._loaded.withheld is None


def test_where_no_rank_has_kernels_none_finds_them_later(caplog: pytest.LogCaptureFixture) -> None:
    assert meet([HERE] * 2, [none_here] * 2) == [None] * 2
    assert not library.available(), "a rank that tried again would compute what the others cannot"

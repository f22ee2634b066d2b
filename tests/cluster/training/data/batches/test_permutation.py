"""The shuffle is a permutation at every size, computed anywhere without the rest, and looks like a random one."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.training.data.batches.permutation import Permutation


def order(size: int, seed: int = 0, epoch: int = 0) -> list[int]:
    return Permutation(size, seed, epoch)(np.arange(size)).tolist()


def test_it_is_a_permutation_at_every_size() -> None:
    for size in [*range(1, 130), 1000, 4095, 4096, 4097, 100_003]:
        assert sorted(order(size, seed=size)) == list(range(size))


def test_one_element_is_computed_without_the_others() -> None:
    whole = order(1000, seed=3, epoch=2)
    assert [Permutation(1000, 3, 2)(np.array([i])).tolist()[0] for i in (0, 17, 999)] == [
        whole[i] for i in (0, 17, 999)
    ]
    huge = Permutation(10**15, 1, 1)(np.array([0, 1, 10**15 - 1]))
    assert len(set(huge.tolist())) == 3 and huge.min() >= 0 and huge.max() < 10**15


def test_seed_and_epoch_choose_the_order() -> None:
    orders = {tuple(order(50, seed, epoch)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_the_order_is_pinned() -> None:
    """A change would give every run that is resumed another order of documents."""
    assert order(10, seed=0, epoch=0) == [8, 1, 6, 4, 9, 0, 5, 7, 2, 3]
    assert order(10, seed=42, epoch=7) == [3, 0, 6, 5, 2, 7, 8, 9, 4, 1]
    assert Permutation(10**12, 5, 6)(np.array([0, 123456789])).tolist() == [794591530832, 936428816390]


@pytest.mark.parametrize("size", [3, 7, 10])
def test_every_element_is_equally_often_at_every_place(size: int) -> None:
    """Chi-squared over 4000 seeds; also of the pairs at the first two places."""
    orders = np.array([order(size, seed) for seed in range(4000)])
    places = np.stack([np.bincount(orders[:, place], minlength=size) for place in range(size)])
    pairs = np.bincount(orders[:, 0] * size + orders[:, 1], minlength=size * size).reshape(size, size)
    pairs = pairs[~np.eye(size, dtype=bool)]
    for counts in (places.ravel(), pairs):
        expected = counts.mean()
        excess = (((counts - expected) ** 2 / expected).sum() - len(counts)) / np.sqrt(2 * len(counts))
        assert excess < 5.0


def test_a_long_order_has_no_trend_and_no_runs() -> None:
    size = 20_000
    first, second = np.array(order(size, 0, 0)), np.array(order(size, 0, 1))
    for a, b in ((first, np.arange(size)), (first[1:], first[:-1]), (first, second)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(size)
    assert (np.diff(first) == 1).sum() < 10

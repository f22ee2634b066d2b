"""The likeliest tokens over a divided vocabulary: those of the whole one, ties to the lower id, the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from parallel.ranks.group import Group
from parallel.sharding.rules import Range
from parallel.vocabulary.top_tokens import row_top, top_log_probs
from parallel.vocabulary.vocab_parallel import log_normaliser

SIZES = (3, 11, 97, 1003)
ROWS = 7


def rows_of(vocab_size: int) -> torch.Tensor:
    """Drawn ones, ones full of equal values, and a damaged one."""
    rows = torch.randn((ROWS, vocab_size), generator=torch.Generator().manual_seed(vocab_size))
    rows[1] = rows[1].round()
    rows[2] = 0.5
    rows[3, ::2] = float("-inf")
    rows[4, -1] = float("nan")
    rows[5, 0] = float("inf")
    return rows


def top_here(group: Group, vocab_size: int, count: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    shards = group.shards(vocab_size)
    mine: Range = shards.range(group.rank)
    top = top_log_probs(rows_of(vocab_size)[:, slice(*mine)].contiguous(), count, shards, group)
    return None if top is None else (top.ids, top.log_probs)


@pytest.mark.parametrize("count", [1, 5, 16])
@pytest.mark.parametrize("vocab_size", SIZES)
def test_the_likeliest_tokens_are_those_of_the_whole_row_at_every_size(
    ranks: Callable[..., list[Any]], vocab_size: int, count: int
) -> None:
    rows, good = rows_of(vocab_size), [0, 1, 2, 3, 6]
    shards, single = Group.single().shards(vocab_size), Group.single()
    log_probs = rows - log_normaliser(rows, shards, single)[:, None]
    most = min(count, vocab_size)
    order = [sorted(range(vocab_size), key=lambda i: (-float(rows[row, i]), i))[:most] for row in good]
    for tp in (1, 2, 3):
        (ids, values), *others = ranks(tp, top_here, vocab_size, count)
        assert others == [None] * (tp - 1)
        assert ids.shape == values.shape == (ROWS, most)
        finite = values[good] > float("-inf")  # which of the impossible ones come last does not matter
        assert torch.equal(ids[good][finite], torch.tensor(order)[finite])
        assert torch.equal(values[good], log_probs[good].gather(1, torch.tensor(order))), "bit for bit"
        assert values[[4, 5]].isnan().all(), "a damaged row says so"


def test_of_equal_values_the_first_places_are_taken() -> None:
    values, ids = row_top(torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0, 1.0]]), 4)
    assert values.tolist() == [[2.0, 2.0, 2.0, 1.0]] and ids.tolist() == [[1, 2, 4, 0]]
    values, ids = row_top(torch.zeros((2, 0)), 3)
    assert values.shape == ids.shape == (2, 0)

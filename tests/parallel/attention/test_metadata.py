"""Block tables that follow changes, and what backends are told of a step, against plain lists."""

from __future__ import annotations

import random
from itertools import chain

import pytest
import torch

from parallel.attention.forward_pass import Pass
from parallel.attention.metadata import AttentionMetadata, BlockTables
from parallel.errors import ConfigError
from parallel.layers.dropout import Dropping, token_keys

SIZE = 16


def test_tables_that_are_kept_give_the_steps_of_tables_that_are_built_anew() -> None:
    rng, kept = random.Random(0), BlockTables(SIZE)
    lists: dict[int, list[int]] = {}
    for _ in range(60):
        for _ in range(rng.randrange(4)):
            slot = rng.randrange(9)
            first = rng.randrange(len(lists.get(slot, [])) + 1)
            blocks = [rng.randrange(500) for _ in range(rng.randrange(1, 7))]
            lists.setdefault(slot, [])[first:] = blocks
            kept.write(slot, first, blocks)
        slots = rng.sample(sorted(lists), rng.randrange(len(lists) + 1))
        contexts = [rng.randrange(1, SIZE * len(lists[slot]) + 1) for slot in slots]
        queries = [rng.randrange(1, context + 1) for context in contexts]
        step = kept.step(slots, queries, contexts)
        anew = AttentionMetadata.build(queries, contexts, [lists[slot] for slot in slots], SIZE)
        slots_of = [
            [lists[slot][place // SIZE] * SIZE + place % SIZE for place in range(context)]
            for slot, context in zip(slots, contexts, strict=True)
        ]
        wanted = [own[len(own) - query :] for own, query in zip(slots_of, queries, strict=True)]
        for each in (step, anew):
            assert each.context_slots_C.tolist() == list(chain(*slots_of))
            assert each.new_slots_T.tolist() == list(chain(*wanted))
        assert torch.equal(step.positions_T, anew.positions_T)
        assert step.num_tokens == sum(queries) and step.max_block >= anew.max_block
        assert (step.paged_step.num_tokens, step.paged_step.num_blocks) == (
            anew.paged_step.num_tokens,
            max((block for slot, c in zip(slots, contexts, strict=True) for block in lists[slot][: -(-c // SIZE)]),
                default=-1) + 1,
        )  # fmt: skip


def test_a_slot_that_was_cut_short_or_never_written_has_no_blocks_there() -> None:
    tables = BlockTables(SIZE)
    tables.write(2, 0, [4, 5, 6])
    assert tables.step([2], [1], [48]).num_tokens == 1
    tables.write(2, 0, [7])
    for slot, context in ((2, 17), (0, 1), (9, 1)):
        with pytest.raises(ConfigError, match="blocks for all of them"):
            tables.step([slot], [1], [context])
    with pytest.raises(ConfigError, match="numbered from 0"):
        tables.write(1, 0, [3, -1])


def test_a_pass_over_whole_sequences_knows_their_positions_and_wants_a_key_for_each_token() -> None:
    now = Pass.packed([3, 1, 2])
    assert now.positions_T.tolist() == [0, 1, 2, 0, 0, 1] and now.lengths == (3, 1, 2)
    assert Pass.packed([]).positions_T.dtype is torch.int64 and not len(Pass.packed([]).positions_T)
    with pytest.raises(ConfigError, match="dropout keys of 5 tokens for 6"):
        Pass.packed([3, 1, 2], dropping=Dropping(0, token_keys([0], [5])))

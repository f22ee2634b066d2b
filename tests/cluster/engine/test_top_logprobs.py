"""Alternatives read as pairs and take the bytes of two numbers each."""

from __future__ import annotations

import pickle
import sys

import pytest
import torch

from cluster.engine.request import TokenLogprobs
from cluster.engine.sample.logprobs import Asked, token_logprobs
from cluster.engine.top_logprobs import Alternatives
from cluster.frontend.ledger import ledger_records
from parallel.ranks.group import Group
from parallel.vocabulary.vocab_parallel import VocabHead

PAIRS = ((7, -0.5), (2**32 - 1, -1.25), (0, -float("inf")))


def test_they_are_a_sequence_of_pairs_by_value() -> None:
    some = Alternatives.of(PAIRS)
    assert tuple(some) == PAIRS and some == PAIRS and len(some) == 3 and some[1] == PAIRS[1] and some[-1] == PAIRS[-1]
    assert some[:2] == PAIRS[:2] and some == Alternatives.of(PAIRS) and hash(some) == hash(Alternatives.of(PAIRS))
    assert some != Alternatives.of(PAIRS[:2]) and some != PAIRS[:2] and not Alternatives.of(())
    assert repr(some) == repr(PAIRS) and list(some.ids) == [7, 2**32 - 1, 0]
    with pytest.raises(IndexError):
        some[3]


def test_they_travel_and_are_remembered_as_they_are() -> None:
    entry = TokenLogprobs(5, -1.0, Alternatives.of(PAIRS))
    assert pickle.loads(pickle.dumps(entry)) == entry
    assert ledger_records.loads(ledger_records.dumps(entry)) == entry
    old = TokenLogprobs(5, -1.0, PAIRS)  # type: ignore[arg-type]  # as an earlier version wrote it
    assert ledger_records.loads(ledger_records.dumps(old)) == old


def test_those_of_an_engine_take_eight_bytes_each() -> None:
    logits = torch.randn(3, 1003, generator=torch.Generator().manual_seed(1))
    for entry in token_logprobs(
        VocabHead(1003, 4, group=Group.single()), logits, [Asked(i, 5, 64, 1.0) for i in (0, 1, 2)]
    ):
        assert isinstance(entry, TokenLogprobs) and isinstance(entry.top, Alternatives) and len(entry.top) == 64
        assert sys.getsizeof(entry.top.data) < 64 * 8 + 64

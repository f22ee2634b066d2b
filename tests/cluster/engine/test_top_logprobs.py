"""Alternatives read as pairs and take the bytes of two numbers each."""

from __future__ import annotations

import pickle
import sys

import pytest
import torch

from cluster.engine.request import TokenEvent, TokenLogprobs
from cluster.engine.sample.logprobs import Asked, token_logprobs
from cluster.engine.top_logprobs import Alternatives
from cluster.frontend.ledger.ledger_records import Content, dumps, unpack, values_of
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
    for each in (entry, TokenLogprobs(5, -1.0)):
        heard = values_of(TokenEvent(request_id="x", logprobs=(each,)))
        (event,) = unpack(dumps(Content((), 1, {(0, 0): heard}))).events(0)
        assert event.logprobs == (each,) and type(event.logprobs[0].top) is type(each.top)


def test_those_of_an_engine_take_eight_bytes_each() -> None:
    logits = torch.randn(3, 1003, generator=torch.Generator().manual_seed(1))
    for entry in token_logprobs(
        VocabHead(1003, 4, group=Group.single()), logits, [Asked(i, 5, 64, 1.0) for i in (0, 1, 2)]
    ):
        assert isinstance(entry, TokenLogprobs) and isinstance(entry.top, Alternatives) and len(entry.top) == 64
        assert sys.getsizeof(entry.top.data) < 64 * 8 + 64

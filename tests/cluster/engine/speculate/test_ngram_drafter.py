"""Where drafts come from: the longest earlier match, and nobody else's text."""

from __future__ import annotations

import random
from typing import Any

import pytest

from cluster.engine.engine_config import SpeculationConfig
from cluster.engine.request import Request, SamplingParams, Share, StoppingCriteria
from cluster.engine.sequences.caller_flows import Caller, Flow
from cluster.engine.sequences.sequence import Answer, Sequence
from cluster.engine.speculate.draft_length import MOST_PAUSE, DraftLength
from cluster.engine.speculate.ngram_drafter import MOST_CALLERS, NGramDrafter
from cluster.engine.speculate.ngram_index import MOST_MATCHED, Match, NGramIndex

CONFIG = SpeculationConfig(method="ngram", prompt_lookup_min=2, recent_tokens=20)


def sequence(tokens: list[int], share: Share = Share("a"), answer: tuple[int, ...] = ()) -> Sequence:
    request = Request(
        request_id="r", token_ids=tuple(tokens), sampling=SamplingParams(), share=share,
        stopping=StoppingCriteria(max_new_tokens=9),
    )  # fmt: skip
    flow: Flow[Any] = Flow(Caller(share.caller), share.part, 9.0)
    made = Sequence(Answer(request, flow, 0.0, None), 0, (0.0, 0, 0), frozenset())
    made.tokens += answer
    return made


def brute(text: list[int], tail: list[int], size: int, stop: int) -> int:
    """The longest match of the tail's end that ends at or before `stop`; 0 for none of that size."""
    best = 0
    for end in range(1, stop + 1):
        length = 0
        while length < min(end, len(tail)) and text[end - 1 - length] == tail[-1 - length]:
            length += 1
        best = max(best, length)
    return min(best, MOST_MATCHED) if best >= size else 0


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_longest_match_is_found_however_the_text_is_read(size: int) -> None:
    rng = random.Random(size)
    for _ in range(300):
        text = rng.choices(range(3), k=rng.randint(size, 3**size))  # few enough places to look at all
        index = NGramIndex(text, size)
        while rng.random() < 0.8:
            index.read(rng.randint(0, len(text) - 1))
            text += rng.choices(range(3), k=rng.randint(0, 1))
        index.read(len(text) - 1)
        found, most = index.longest(text), brute(text, text, size, len(text) - 1)
        if found is None:
            assert most == 0
        else:
            assert text[found.end - found.length : found.end] == text[len(text) - found.length :]
            assert size <= found.length <= most and found.end < len(text)
            if text[:-1].count(text[-1]) <= 8:
                assert found.length == most


def test_of_equal_matches_the_latest_counts_and_a_longer_one_wins() -> None:
    index = NGramIndex([1, 2, 9, 5, 1, 2, 7, 1, 2, 8, 0, 0], 2)
    index.read(12)
    assert index.longest([1, 2]) == Match(9, 2) and index.longest([5, 1, 2]) == Match(6, 3)
    assert index.longest([2, 2]) is None and index.longest([2]) is None


def test_drafts_are_as_long_as_the_match_and_go_on_repeating() -> None:
    drafter = NGramDrafter(CONFIG)
    assert drafter.propose(sequence([1, 2, 3, 4, 5, 1, 2]), 7) == [3, 4]
    assert drafter.propose(sequence([1, 2, 3] * 3), 5) == [1, 2, 3, 1, 2]
    assert drafter.propose(sequence([4, 4, 4, 4]), 7) == [4, 4, 4]
    assert list(drafter.propose(sequence([1, 2, 3, 4]), 7)) == [] == list(drafter.propose(sequence([1]), 7))


def test_answers_of_a_caller_serve_that_caller_alone() -> None:
    drafter, mine, asked = NGramDrafter(CONFIG), Share("a", "1"), [50, 1, 2, 3]
    drafter.ended(sequence([60, 61, 62, 63], mine, answer=(1, 2, 3, 4, 5, 6)))
    assert drafter.propose(sequence(asked, mine), 2) == [4, 5]
    assert list(drafter.propose(sequence([60, 61], mine), 2)) == [], "of answers, not of prompts"
    for other in (Share("a", "2"), Share("b", "1"), Share()):
        assert list(drafter.propose(sequence(asked, other), 2)) == []
    assert drafter.propose(sequence([1, 2, 3, 8, 9, 1, 2, 3], mine), 2) == [8, 9], "its own text goes first"
    assert drafter.propose(sequence([50, 5, 6], mine), 2) == [], "nothing beyond an answer's end"


def test_what_is_kept_of_answers_is_bounded() -> None:
    drafter, share = NGramDrafter(CONFIG), Share("a")
    for first in range(0, 4000, 4):
        drafter.ended(sequence([0], share, answer=tuple(range(first, first + 4))))
        assert len(drafter._recent["a", ""].text) <= 40 and not drafter._own
    assert drafter.propose(sequence([3996, 3997], share), 2) == [3998, 3999]
    drafter.ended(sequence([0], share, answer=tuple(range(100))))
    assert len(drafter._recent["a", ""].text) <= 40
    for number in range(3 * MOST_CALLERS):
        drafter.ended(sequence([0], Share(str(number)), answer=(1, 2, 3, 4)))
    assert len(drafter._recent) == MOST_CALLERS


def test_no_answers_are_kept_where_none_are_wanted() -> None:
    drafter = NGramDrafter(SpeculationConfig(method="ngram", recent_tokens=0))
    drafter.ended(sequence([0], answer=(1, 2, 3, 4, 5)))
    assert not drafter._recent


def test_drafts_grow_while_they_come_true_and_pause_while_they_do_not() -> None:
    length, lengths = DraftLength(7), []
    for accepted in (3, 7, 2):
        lengths.append(length.next())
        length.settle(lengths[-1], accepted)
    assert [*lengths, length.next()] == [3, 7, 7, 3]
    pauses = []
    for _ in range(8):
        length.settle(3, 0)
        pauses.append(next(i for i in range(100) if length.next()))
    assert pauses == [1, 3, 7, 15, 31, 31, 31, 31] and pauses[-1] == MOST_PAUSE
    length.settle(1, 1)
    assert length.next() == 3

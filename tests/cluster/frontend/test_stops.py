"""Stop strings: the streaming matcher against a brute force over the whole text, for every way to cut the text."""

from __future__ import annotations

import random

import pytest

from cluster.engine.request import StoppingCriteria
from cluster.frontend.stops import StopMatcher
from cluster.frontend.text import SampleText
from tests.cluster.frontend.fakes import CODEC, PIECES


def brute_force(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The first end of any stop string ends the text; the longest of those that end there counts."""
    for end in range(len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            stop = max(hits, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def stream(text: str, stops: list[str], include: bool, rng: random.Random) -> tuple[str, str | None, list[str]]:
    matcher, shown = StopMatcher(stops, include), []
    while text:
        size = rng.randint(1, 4)
        released = matcher.push(text[:size])
        text = text[size:]
        shown.append(released.text)
        if released.stop is not None:
            return "".join(shown), released.stop, shown
    shown.append(matcher.flush())
    return "".join(shown), None, shown


def random_case(rng: random.Random) -> tuple[str, list[str], bool]:
    alphabet = rng.choice(["ab", "abc", "a", "abé日"])
    stops = ["".join(rng.choices(alphabet, k=rng.randint(1, 5))) for _ in range(rng.randint(1, 4))]
    return "".join(rng.choices(alphabet, k=rng.randint(0, 30))), stops, rng.random() < 0.5


def test_streamed_text_equals_brute_force_for_random_texts_stops_and_cuts() -> None:
    rng = random.Random(1)
    hits = 0
    for _ in range(20_000):
        text, stops, include = random_case(rng)
        shown, stop, _ = stream(text, stops, include, rng)
        assert (shown, stop) == brute_force(text, stops, include), (text, stops, include)
        hits += stop is not None
    assert 5_000 < hits < 19_500


def test_no_more_is_held_back_than_could_become_a_stop_string() -> None:
    rng = random.Random(2)
    for _ in range(3_000):
        text, stops, _ = random_case(rng)
        matcher, seen, shown = StopMatcher(stops), "", ""
        for character in text:
            released = matcher.push(character)
            seen, shown = seen + character, shown + released.text
            if released.stop is not None:
                break
            held = seen[len(shown) :]
            assert held == "" or any(stop.startswith(held) for stop in stops)
            assert not any(stop.startswith(seen[i:]) for stop in stops for i in range(len(shown)))


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_across_tokens_and_split_characters_cuts_text_and_tokens(include: bool) -> None:
    stopping = StoppingCriteria(stop_sequences=("b日",), include_stop_sequence=include)
    ids = [PIECES.index(b"ab"), PIECES.index("日".encode()[:1]), PIECES.index("日".encode()[1:]), PIECES.index(b"x")]
    for cut in range(1, 4):
        text = SampleText(CODEC, stopping)
        pieces = [text.push(ids[:cut])]
        if pieces[-1].stop is None:
            pieces.append(text.push(ids[cut:]))
        assert pieces[-1].stop == "b日"
        assert "".join(piece.text for piece in pieces) == ("ab日" if include else "a")
        assert sum(piece.num_tokens for piece in pieces) == 3, "the token after the stop does not count"


def test_stop_strings_count_only_after_min_new_tokens() -> None:
    text = SampleText(CODEC, StoppingCriteria(stop_sequences=("a",), min_new_tokens=2))
    first, second = text.push([0, 0]), text.push([0])
    assert (first.text, first.stop) == ("aa", None)
    assert (second.text, second.stop) == ("", "a")


def test_what_was_held_back_is_shown_when_the_sample_ends() -> None:
    text = SampleText(CODEC, StoppingCriteria(stop_sequences=("abcx",)))
    assert text.push([0, 1, 2]).text == ""
    assert text.finish().text == "abc"


def test_half_a_character_is_shown_only_at_the_end_as_a_replacement() -> None:
    text = SampleText(CODEC, StoppingCriteria())
    half = [PIECES.index("日".encode()[:1])]
    assert text.push(half).text == ""
    assert text.finish().text == "\N{REPLACEMENT CHARACTER}"

"""Stop strings: the streaming matcher against a brute force over the whole text, for every way to cut the text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from cluster.engine.request import StoppingCriteria
from cluster.frontend.output.output_text import SampleText
from cluster.frontend.output.stop_strings import StopMatcher, StopStrings
from tests.cluster.frontend.fakes import CODEC, PIECES, PieceDetokenizer


def brute_force(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The first end of any stop string ends the text; the longest of those that end there counts."""
    for end in range(len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            stop = max(hits, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def stream(text: str, stops: list[str], include: bool, rng: random.Random) -> tuple[str, str | None, list[str]]:
    matcher, shown = StopMatcher(StopStrings(stops), include), []
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
        matcher, seen, shown = StopMatcher(StopStrings(stops)), "", ""
        for character in text:
            released = matcher.push(character)
            seen, shown = seen + character, shown + released.text
            if released.stop is not None:
                break
            held = seen[len(shown) :]
            assert held == "" or any(stop.startswith(held) for stop in stops)
            assert not any(stop.startswith(seen[i:]) for stop in stops for i in range(len(shown)))


HIDDEN = ("<x>", "<yy>")


def parts_of(rng: random.Random) -> tuple[list[tuple[str, bool]], list[str], bool]:
    """Text with hidden parts between, and stop strings cut out of it or drawn."""
    parts = [
        (rng.choice(HIDDEN), True)
        if rng.random() < 0.3
        else ("".join(rng.choices("ab<x>", k=rng.randint(0, 3))), False)
        for _ in range(rng.randint(1, 10))
    ]
    whole = "".join(text for text, _ in parts)
    stops = ["".join(rng.choices(["a", "b", *HIDDEN], k=rng.randint(1, 4))) for _ in range(rng.randint(1, 2))]
    start = rng.randrange(len(whole) + 1)
    return parts, [*stops, *filter(None, [whole[start : start + rng.randint(1, 8)]])], rng.random() < 0.5


def brute_force_with_hidden(parts: list[tuple[str, bool]], stops: list[str], include: bool) -> tuple[str, str | None]:
    """Character by character: stop strings that name a hidden part end the whole text, others what is shown."""
    whole, shown, hits = "", "", []
    for character, hidden in ((c, hidden) for text, hidden in parts for c in text):
        whole, shown = whole + character, shown + ("" if hidden else character)
        for stop in stops:
            names = any(text in stop for text in HIDDEN)
            if names and whole.endswith(stop):
                hits.append((len(stop), stop, visible(parts, len(whole) - len(stop))))
            elif not names and not hidden and shown.endswith(stop):
                reach = next(n for n in range(len(whole) + 1) if visible_ends(parts, n, stop, whole))
                hits.append((reach, stop, shown[: -len(stop)]))
        if hits:
            _, stop, before = max(hits)
            return before + (stop if include else ""), stop
    return shown, None


def visible(parts: list[tuple[str, bool]], end: int) -> str:
    flags = [(c, hidden) for text, hidden in parts for c in text][:end]
    return "".join(c for c, hidden in flags if not hidden)


def visible_ends(parts: list[tuple[str, bool]], reach: int, stop: str, whole: str) -> bool:
    """Whether the last `reach` characters of all show just the stop string."""
    return len(visible(parts, len(whole))) - len(visible(parts, len(whole) - reach)) == len(stop)


def test_stop_strings_that_name_hidden_parts_equal_brute_force_for_every_cut() -> None:
    rng, named, plain = random.Random(3), 0, 0
    for _ in range(10_000):
        parts, stops, include = parts_of(rng)
        matcher, shown, stop = StopMatcher(StopStrings(stops, HIDDEN), include), "", None
        for text, hidden in parts:
            pieces = [text] if hidden or rng.random() < 0.5 else list(text)
            for piece in pieces:
                if stop is None:
                    released = matcher.push(piece, hidden)
                    shown, stop = shown + released.text, released.stop
        shown += matcher.flush() if stop is None else ""
        assert (shown, stop) == brute_force_with_hidden(parts, stops, include), (parts, stops, include)
        named += stop is not None and any(text in stop for text in HIDDEN)
        plain += stop is not None and not any(text in stop for text in HIDDEN)
    assert min(named, plain) > 2_000


SPECIAL = replace(CODEC, special_tokens={3: "<end>", 4: "<turn>"}, detokenizer=lambda: Unshown({3, 4}))


class Unshown(PieceDetokenizer):
    """Special tokens are no text."""

    def __init__(self, special: set[int]) -> None:
        super().__init__()
        self._special = special

    def push(self, ids: Sequence[int]) -> str:
        return super().push([token_id for token_id in ids if token_id not in self._special])


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    ("stop", "ids", "before", "count"),
    [
        ("<end>", [0, 1, 3, 0], "ab", 3),
        ("<end><turn>", [3, 0, 3, 4, 0], "a", 4),
        ("b<end>", [0, 1, 3], "a", 3),
        ("<end>a", [1, 3, 3, 0, 0], "b", 4),
        ("c<end>b<turn>", [0, 2, 3, 1, 4], "a", 5),
        ("é<end>", [0, 10, 3], "a", 3),
        ("ab", [0, 3, 1], "", 3),
        ("<end>", [11, 3, 12], "", 2),
    ],
)
def test_a_special_token_in_a_stop_string_stops(
    stop: str, ids: list[int], before: str, count: int, include: bool
) -> None:
    for size in (1, 2, len(ids)):
        text = SampleText(SPECIAL, StoppingCriteria(stop_sequences=(stop, "zzz"), include_stop_sequence=include))
        pieces = []
        for at in range(0, len(ids), size):
            pieces.append(text.push(ids[at : at + size]))
            if pieces[-1].stop is not None:
                break
        assert pieces[-1].stop == stop
        assert "".join(piece.text for piece in pieces) == before + (stop if include else "")
        assert sum(piece.num_tokens for piece in pieces) == count


def test_special_tokens_that_no_stop_string_names_stay_unseen() -> None:
    text = SampleText(SPECIAL, StoppingCriteria(stop_sequences=("end", "<turn>c")))
    pieces = [text.push([token_id]) for token_id in (0, 3, 4, 1, 4)]
    assert all(piece.stop is None for piece in pieces)
    assert "".join(piece.text for piece in pieces) + text.finish().text == "ab"


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

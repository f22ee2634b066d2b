"""What a step costs does not grow with a request's lists: stop tokens, bad words and biases are prepared once."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.engine.engine import generate
from cluster.engine.request import BeamParams, Request, ResponseOptions, SamplingParams, StoppingCriteria
from cluster.engine.sample import beam_candidates
from cluster.engine.sample.beam_candidates import WholeRow
from cluster.engine.sample.logits_processors import BadWords, FixedOfCalls, LogitsProcessors
from cluster.engine.sequences.sequence import Sequence
from parallel.vocabulary.top_tokens import row_top
from tests.cluster.engine.beams.beam_cases import engine_over
from tests.cluster.engine.sample.test_sampler import sequence
from tests.cluster.engine.tiny_models import VOCAB, save_tiny

WIDTH = 4


def beam(stop_ids: list[int], least: int) -> Sequence:
    stops = StoppingCriteria(stop_token_ids=tuple(stop_ids), max_new_tokens=9, min_new_tokens=least)
    return sequence(beam=BeamParams(width=WIDTH), stopping=stops, temperature=1.0)


@pytest.mark.parametrize("least", [0, 5])
def test_a_row_gives_as_many_candidates_however_many_tokens_stop(least: int) -> None:
    log_probs = torch.randn(50_257, generator=torch.Generator().manual_seed(1))
    for stops in ([], list(range(60, 50_257)), list(range(50_000))):
        seq = beam(stops, least)
        found = WholeRow(seq, log_probs).best(WIDTH, {})
        assert len(found) <= 2 * WIDTH
        ordered = log_probs.sort(descending=True, stable=True).indices.tolist()
        others = [token for token in ordered if token not in seq.stop_ids][:WIDTH]
        best = [token for token in ordered[:WIDTH] if not least or token not in seq.stop_ids]
        wanted = sorted({*best, *others}, key=ordered.index)
        assert [c.token for c in found] == wanted[: wanted.index(others[-1]) + 1], "up to the last that goes on"


@pytest.mark.parametrize("stops", [3, 60, 93])
@pytest.mark.parametrize("early", [False, True, "never"])
def test_a_search_finds_the_same_whether_its_rows_are_ranked_or_gathered(
    stops: int, early: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny("gpt2", tmp_path)
    request = Request(
        request_id="a", token_ids=(5, 9, 2), response=ResponseOptions(logprobs=3),
        sampling=SamplingParams(n=3, beam=BeamParams(width=6, early_stopping=early, length_penalty=2.0)),
        stopping=StoppingCriteria(max_new_tokens=12, stop_token_ids=tuple(range(VOCAB - stops, VOCAB))),
    )  # fmt: skip
    grouped = replace(
        request, sampling=replace(request.sampling, beam=BeamParams(width=6, groups=3, diversity_penalty=0.5))
    )
    found = []
    for most in (0, 10**9):
        monkeypatch.setattr(beam_candidates, "MOST_RANKED_STOPS", most)
        found.append([generate(engine_over(folder), [each]) for each in (request, grouped)])
    assert found[0] == found[1]


def test_bad_words_are_found_as_one_by_one() -> None:
    rng = random.Random(5)
    for _ in range(300):
        words = [tuple(rng.choices(range(3), k=rng.randint(2, 6))) for _ in range(rng.randint(0, 30))]
        tokens = rng.choices(range(3), k=rng.randint(0, 12))
        expected = {
            word[-1] for word in words if len(tokens) >= len(word) - 1 and tuple(tokens[1 - len(word) :]) == word[:-1]
        }
        assert set(BadWords(words).banned_after(tokens)) == expected


def test_samples_and_prompts_of_a_call_share_what_their_lists_were_made_into() -> None:
    seq = sequence(logit_bias={3: 1.0}, bad_words=((1, 2), (4,)))
    first, second = (LogitsProcessors(seq, 997, torch.device("cpu")) for _ in range(2))
    assert first.fixed is second.fixed
    other = sequence(logit_bias={3: 2.0}, bad_words=((1, 2), (4,)))
    assert LogitsProcessors(other, 997, torch.device("cpu")).fixed is not first.fixed
    kept = FixedOfCalls(most=2)
    made = [kept.get(SamplingParams(logit_bias={i: 1.0}), frozenset(), 9, torch.device("cpu")) for i in range(5)]
    assert [int(each.bias.argmax()) for each in made if each.bias is not None] == [0, 1, 2, 3, 4]


def test_the_largest_of_many_equal_values_are_the_first() -> None:
    rows = torch.full((3, 1000), float("-inf"))
    rows[0, [7, 900, 3]] = torch.tensor([1.0, 2.0, 2.0])
    rows[2] = torch.randint(0, 3, (1000,), generator=torch.Generator().manual_seed(0)).float()
    values, ids = row_top(rows, 64)
    ordered = rows.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, ordered.values[:, :64]) and torch.equal(ids, ordered.indices[:, :64])

"""Sampling against transformers' logits processors, and draws that depend on nothing but their row."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
import transformers
from torch import Tensor

from cluster.engine.request import ModelLimits, Request, ResponseOptions, SamplingParams, StoppingCriteria
from cluster.engine.request_validation import resolve
from cluster.engine.rng import stream_of, uniform
from cluster.engine.sample.logits_processors import LogitsProcessors
from cluster.engine.sample.sampler import Sampler, look_up
from cluster.engine.sample.top_k_top_p import _floor_by_bins, cut
from cluster.engine.sequences.caller_flows import Caller, Flow
from cluster.engine.sequences.sequence import Answer, Sequence
from parallel.vocabulary.top_tokens import top_values

VOCAB = 997
NEVER = float("-inf")


def sequence(
    output: list[int] | None = None, prompt: tuple[int, ...] = (3, 5, 5, 8), index: int = 0, **fields: object
) -> Sequence:
    """A sequence whose output so far is `output`."""
    limits = ModelLimits(vocab_size=VOCAB, max_context=10_000, kv_capacity_tokens=10_000)
    stopping = fields.pop("stopping", StoppingCriteria())
    sampling = SamplingParams(**{"seed": 1, **fields})  # type: ignore[arg-type]
    request = resolve(Request(request_id="r", token_ids=prompt, sampling=sampling, stopping=stopping), limits)  # type: ignore[arg-type]
    stop_ids = frozenset(request.stopping.stop_token_ids)
    seq = Sequence(Answer(request, Flow(Caller(""), "", 0.0), 0.0, None), index, (0.0, 0, index), stop_ids)
    seq.tokens += output or []
    return seq


def rows(count: int, vocab_size: int = VOCAB, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def adjusted(row: Tensor, seq: Sequence) -> Tensor:
    out = row.clone()
    LogitsProcessors(seq, row.numel(), row.device).apply(out, seq)
    return out


def oracle(row: Tensor, seq: Sequence, *processors: transformers.LogitsProcessor) -> Tensor:
    scores = row[None].clone()
    for processor in processors:
        scores = processor(torch.tensor([seq.tokens]), scores)
    return scores[0]


@pytest.mark.parametrize("penalty", [0.5, 1.3, 7.0])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    seq = sequence([1, 9, 9, 40], repetition_penalty=penalty)
    expected = oracle(rows(1)[0], seq, transformers.RepetitionPenaltyLogitsProcessor(penalty))
    assert torch.equal(adjusted(rows(1)[0], seq), expected)


def test_repetition_penalty_sees_tokens_as_they_come() -> None:
    seq = sequence([1], repetition_penalty=1.7)
    adjustments = LogitsProcessors(seq, VOCAB, torch.device("cpu"))
    for step, token in enumerate([9, 1, 700, 9]):
        row = rows(1, seed=step)[0]
        expected = oracle(row, seq, transformers.RepetitionPenaltyLogitsProcessor(1.7))
        adjustments.apply(row, seq)
        assert torch.equal(row, expected)
        seq.tokens.append(token)


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    seq = sequence([9, 3, 9, 9], presence_penalty=0.7, frequency_penalty=0.25)
    row = rows(1)[0]
    expected = row.clone()
    for token, count in {9: 3, 3: 1}.items():
        expected[token] = row[token] - (0.25 * count + 0.7)
    assert torch.equal(adjusted(row, seq), expected)


def test_counts_go_on_over_the_steps() -> None:
    seq = sequence([9], frequency_penalty=1.0)
    adjustments = LogitsProcessors(seq, VOCAB, torch.device("cpu"))
    for count in range(1, 5):
        row = torch.zeros(VOCAB)
        adjustments.apply(row, seq)
        assert row[9] == -count and row.abs().sum() == count
        seq.tokens.append(9)


@pytest.mark.parametrize("output", [[], [7], [1, 2], [1, 2, 3], [2, 3], [5, 8, 1, 2]])
def test_bad_words_equal_transformers(output: list[int]) -> None:
    words = ((4,), (1, 2, 3), (2, 3, 4), (8, 1), (900,), (5, 8, 6))
    seq = sequence(output, bad_words=words)
    processor = transformers.NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=[])
    assert torch.equal(adjusted(rows(1)[0], seq), oracle(rows(1)[0], seq, processor))


@pytest.mark.parametrize("length", range(5))
def test_minimum_length_equals_transformers(length: int) -> None:
    stopping = StoppingCriteria(min_new_tokens=3, stop_token_ids=(11, 40))
    seq = sequence([1, 2, 3, 4, 5][:length], stopping=stopping)
    processor = transformers.MinNewTokensLengthLogitsProcessor(4, 3, [11, 40])
    assert torch.equal(adjusted(rows(1)[0], seq), oracle(rows(1)[0], seq, processor))


def test_bias_and_allowed_tokens_do_what_they_say() -> None:
    row = rows(1)[0]
    seq = sequence(logit_bias={5: 2.5, 900: -100.0}, allowed_token_ids=(5, 6, 900))
    expected = torch.full_like(row, NEVER)
    expected[5], expected[6], expected[900] = row[5] + 2.5, row[6], row[900] - 100.0
    assert torch.equal(adjusted(row, seq), expected)


@pytest.mark.parametrize("vocab_size", [3, 64, 997, 50257])
@pytest.mark.parametrize("scale", [0.05, 3.0, 20.0])
@pytest.mark.parametrize(
    "given",
    [
        {"top_k": 1}, {"top_k": 2}, {"top_k": 50}, {"top_p": 0.1}, {"top_p": 0.9}, {"top_p": 0.999}, {"min_p": 0.05},
        {"min_p": 1.0}, {"top_k": 40, "top_p": 0.8, "min_p": 0.02}, {"top_k": 5, "top_p": 0.3},
        {"top_p": 1.0, "min_p": 0.0},
    ],
)  # fmt: skip
def test_cuts_equal_transformers(vocab_size: int, scale: float, given: dict[str, float]) -> None:
    logits = rows(3, vocab_size, seed=vocab_size, scale=scale)
    expected = logits
    if "top_k" in given:
        expected = transformers.TopKLogitsWarper(int(given["top_k"]))(None, expected)
    if given.get("top_p", 1.0) < 1.0:  # generate() leaves 1.0 out, too
        expected = transformers.TopPLogitsWarper(given["top_p"])(None, expected)
    if "min_p" in given:
        expected = transformers.MinPLogitsWarper(given["min_p"])(None, expected)
    scaled = logits - logits.amax(1)[:, None]
    cut(scaled, [SamplingParams(**given)] * 3)  # type: ignore[arg-type]
    differing = (scaled.isinf() != expected.isinf()).sum().item()
    assert differing <= (3 if given.get("top_p", 0.0) > 0.99 else 0)  # there float32 sums decide about single tokens


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
def test_a_wide_nucleus_is_that_of_a_sort(share: float, scale: float) -> None:
    logits = rows(2, 20_000, scale=scale)
    logits[1, 5000:] = NEVER
    logits -= logits.amax(1)[:, None]
    mass = logits.double().exp()
    for row, weights in zip(logits, mass, strict=True):
        sums, order = weights.sort(descending=True)
        last = int((sums.cumsum(0) < share * sums.sum()).sum())
        assert _floor_by_bins(row, share) == row[order[last]]


def test_rows_with_different_cuts_do_not_mix() -> None:
    params = [
        SamplingParams(), SamplingParams(top_k=3), SamplingParams(top_p=0.5), SamplingParams(min_p=0.3),
        SamplingParams(top_k=7),
        SamplingParams(top_k=2, top_p=0.99),
    ]  # fmt: skip
    logits = rows(len(params), 4096)
    scaled = logits - logits.amax(1)[:, None]
    together, alone = scaled.clone(), scaled.clone()
    cut(together, params)
    for i, given in enumerate(params):
        cut(alone[i : i + 1], [given])
    assert torch.equal(together, alone)
    assert torch.isfinite(together).sum(1).tolist()[:2] == [4096, 3] and torch.isfinite(together)[4].sum() == 7


@pytest.mark.parametrize("count", [1, 5, 200])
def test_top_values_are_those_of_a_sort(count: int) -> None:
    logits = rows(4, 50257)
    logits[1] = logits[1].round()  # many ties
    logits[2, 100:] = NEVER
    logits[3, :-40] = NEVER
    expected = logits.sort(1, descending=True).values[:, :count]
    assert torch.equal(top_values(logits, count), expected)


def varied(count: int, vocab_size: int, seed: int) -> tuple[Tensor, list[Sequence]]:
    """Rows with every kind of parameter."""
    rng = random.Random(seed)
    sequences = []
    for _ in range(count):
        output = [rng.randrange(VOCAB) for _ in range(rng.randrange(5))]
        fields: dict[str, object] = {
            "temperature": rng.choice([0.0, 0.3, 1.0, 1.7]),
            "top_k": rng.choice([None, 1, 20]),
            "top_p": rng.choice([None, 0.4, 0.95]),
            "min_p": rng.choice([None, 0.1]),
            "seed": rng.randrange(1000),
            "repetition_penalty": rng.choice([1.0, 1.2]),
            "frequency_penalty": rng.choice([0.0, 0.5]),
            "logit_bias": rng.choice([{}, {3: 1.0}]),
        }
        sequences.append(sequence(output, index=rng.randrange(3), **fields))  # type: ignore[arg-type]
    return rows(count, vocab_size, seed), sequences


def fresh(seq: Sequence) -> Sequence:
    seq.adjustments = None
    return seq


@pytest.mark.parametrize("vocab_size", [997, 50257])
def test_a_draw_is_the_same_alone_in_any_batch_and_in_any_order(vocab_size: int) -> None:
    sampler = Sampler(vocab_size)
    logits, sequences = varied(40, vocab_size, seed=5)
    together = sampler.draw(logits, sequences).tokens
    alone = [sampler.draw(logits[i : i + 1], [fresh(seq)]).tokens[0] for i, seq in enumerate(sequences)]
    assert together == alone
    order = random.Random(1).sample(range(40), 17)
    assert sampler.draw(logits[order], [fresh(sequences[i]) for i in order]).tokens == [together[i] for i in order]


def test_draws_differ_by_seed_sample_and_position_only() -> None:
    draws = [uniform(stream_of(seed, index), place) for seed in range(20) for index in range(5) for place in range(20)]
    assert len(set(draws)) == len(draws) and all(0.0 <= draw < 1.0 for draw in draws)
    assert uniform(stream_of(7, 1), 30) == uniform(stream_of(7, 1), 30)
    assert uniform(stream_of(42, 0), 10) == 0.11029021289180696, "changing the draws changes every seeded answer"


def chi_square(counts: Counter[int], probabilities: list[float], total: int) -> tuple[float, int]:
    """The statistic over cells with at least five expected, and its degrees of freedom."""
    cells = [(counts[i], p * total) for i, p in enumerate(probabilities) if p * total >= 5]
    return sum((seen - expected) ** 2 / expected for seen, expected in cells), len(cells) - 1


@pytest.mark.parametrize("by", ["position", "seed", "sample"])
def test_drawn_tokens_follow_the_distribution(by: str) -> None:
    total, vocab_size = 10_000, 1300
    logits = rows(1, vocab_size, seed=3, scale=2.0)
    places = range(total)
    streams = {
        "position": [uniform(stream_of(5, 0), i) for i in places],
        "seed": [uniform(stream_of(i, 0), 12) for i in places],
        "sample": [uniform(stream_of(5, i), 12) for i in places],
    }
    scaled = (logits - logits.amax()).expand(total, -1)
    draws = torch.tensor(streams[by], dtype=torch.float64)
    found = [look_up(scaled[i : i + 500], draws[i : i + 500]) for i in range(0, total, 500)]
    statistic, freedom = chi_square(Counter(torch.cat(found).tolist()), logits.double().softmax(1)[0].tolist(), total)
    assert freedom > 200
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def test_look_up_inverts_the_distribution_function() -> None:
    scaled = torch.log(torch.tensor([[0.25, 0.0, 0.5, 0.25] + [0.0] * 1000 + [1.0]]))
    scaled -= scaled.amax()
    points = {0.0: 0, 0.1249: 0, 0.1251: 2, 0.374: 2, 0.376: 3, 0.499: 3, 0.501: 1004, 1.0 - 2**-53: 1004}
    for point, token in points.items():
        assert look_up(scaled, torch.tensor([point], dtype=torch.float64)).item() == token


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_a_draw_is_where_the_uniform_number_falls_in_the_softmax(temperature: float) -> None:
    logits = rows(200, 700)
    sequences = [sequence(temperature=temperature, seed=seed) for seed in range(200)]
    tokens = Sampler(700).draw(logits, sequences).tokens
    sums = (logits.double() / temperature).softmax(1).cumsum(1)
    for row, seq, token in zip(sums, sequences, tokens, strict=True):
        draw = uniform(seq.stream, seq.position)
        below = float(row[token - 1]) if token else 0.0
        assert below - 1e-6 <= draw <= float(row[token]) + 1e-6


def test_top_k_one_and_a_tiny_temperature_are_greedy() -> None:
    logits = rows(2)
    for fields in ({"top_k": 1}, {"temperature": 1e-38}, {"top_p": 1e-9}, {"min_p": 1.0}):
        sequences = [sequence(**fields), sequence(seed=77, **fields)]
        assert Sampler(VOCAB).draw(logits, sequences).tokens == logits.argmax(1).tolist()


@pytest.mark.parametrize("damage", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_damaged_row_is_named_and_leaves_the_others_alone(damage: float, temperature: float) -> None:
    logits = rows(3)
    sequences = [sequence(temperature=temperature, seed=i, top_k=30, top_p=0.9) for i in range(3)]
    good = Sampler(VOCAB).draw(logits, sequences).tokens
    logits[1, 17] = damage
    drawn = Sampler(VOCAB).draw(logits, sequences)
    assert list(drawn.errors) == [1] and "logits hold" in drawn.errors[1]
    assert (drawn.tokens[0], drawn.tokens[2]) == (good[0], good[2])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_any_allowed_token_is_an_error_of_its_own(temperature: float) -> None:
    sequences = [
        sequence(temperature=temperature),
        sequence(temperature=temperature, allowed_token_ids=(4,), bad_words=((4,),)),
        sequence(temperature=temperature, allowed_token_ids=(4,)),
    ]
    drawn = Sampler(VOCAB).draw(rows(3), sequences)
    assert list(drawn.errors) == [1] and "no token is left" in drawn.errors[1]
    assert drawn.tokens[2] == 4


def test_parameters_that_fail_end_their_own_request_only() -> None:
    broken = sequence(allowed_token_ids=(4,))
    object.__setattr__(broken.sampling, "allowed_token_ids", (VOCAB + 5,))  # as if validation had let it pass
    drawn = Sampler(VOCAB).draw(rows(2), [broken, sequence(allowed_token_ids=(4,))])
    assert list(drawn.errors) == [0] and "could not be applied" in drawn.errors[0]
    assert drawn.tokens[1] == 4


def test_the_model_s_logits_are_left_as_they_were() -> None:
    logits, sequences = varied(10, VOCAB, seed=2)
    before = logits.clone()
    Sampler(VOCAB).draw(logits, sequences)
    assert torch.equal(logits, before)
    assert ResponseOptions().logprobs is None

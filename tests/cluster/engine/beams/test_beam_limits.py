"""What a beam search may ask for and what it needs; n-gram bans and best-of without beams."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.engine.engine import generate
from cluster.engine.request import BeamParams, FinishReason, Request, ResponseOptions, SamplingParams, StoppingCriteria
from parallel.errors import CapacityError, RequestError
from tests.cluster.engine.beams.beam_cases import COMPANY, PROMPTS, SEARCHES, check_all_free, engine_over
from tests.cluster.engine.tiny_models import VOCAB, save_tiny, tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_tiny(family, tmp_path_factory.mktemp(family)) for family in ("gpt2", "mpt")}


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "sampling"),
    [
        ("beam.width is 1", {"beam": BeamParams(width=1)}),
        ("groups is 3; it must divide", {"beam": BeamParams(width=4, groups=3, diversity_penalty=1.0)}),
        ("groups need one above 0", {"beam": BeamParams(width=4, groups=2)}),
        ("without groups it means nothing", {"beam": BeamParams(width=4, diversity_penalty=1.0)}),
        ("length_penalty is nan", {"beam": BeamParams(width=4, length_penalty=float("nan"))}),
        ("early_stopping is 'soon'", {"beam": BeamParams(width=4, early_stopping="soon")}),  # type: ignore[arg-type]
        ("sampling.n is 5", {"n": 5, "beam": BeamParams(width=4)}),
        ("sampling.best_of", {"best_of": 4, "beam": BeamParams(width=4)}),
        ("sampling.temperature is 0.5", {"temperature": 0.5, "beam": BeamParams(width=4)}),
        ("sampling.top_k is 3", {"top_k": 3, "beam": BeamParams(width=4)}),
        ("no_repeat_ngram_size is -1", {"no_repeat_ngram_size": -1}),
        ("best_of is 2", {"n": 3, "best_of": 2}),
    ],
)
def test_what_cannot_be_searched_is_refused_with_its_rule(
    folders: dict[str, Path], words: str, sampling: dict[str, Any]
) -> None:
    engine = engine_over(folders["gpt2"])
    with pytest.raises(RequestError, match=words.replace(".", "\\.")):
        engine.submit(Request(request_id="a", token_ids=(1,), sampling=SamplingParams(**sampling)))
    assert engine.idle


def test_a_search_that_can_never_fit_is_refused_and_one_that_just_fits_ends(folders: dict[str, Path]) -> None:
    engine = engine_over(folders["gpt2"], kv_blocks=13)  # 1 of the prompt, 4 beams of 3
    request = replace(SEARCHES[0], stopping=StoppingCriteria(max_new_tokens=45, ignore_eos=True))
    with pytest.raises(CapacityError, match="in 4 beams"):
        engine.submit(replace(request, stopping=StoppingCriteria(max_new_tokens=46)))
    open_end = replace(request, request_id="b", stopping=StoppingCriteria(ignore_eos=True))
    assert engine.submit(open_end).stopping.max_new_tokens == 45, "what is left of the cache for each beam"
    results = generate(engine, [request])[0]
    assert [len(result.token_ids) for result in results] == [45] * 4
    with pytest.raises(CapacityError, match=r"beam.width is 25"):
        engine.submit(replace(request, sampling=SamplingParams(beam=BeamParams(width=25)), stopping=StoppingCriteria()))
    check_all_free(engine)


def test_a_search_that_finds_too_little_ends_with_an_error_of_its_own(folders: dict[str, Path]) -> None:
    engine = engine_over(folders["gpt2"])
    narrow = SamplingParams(n=3, allowed_token_ids=(7,), beam=BeamParams(width=3))
    short = StoppingCriteria(max_new_tokens=4, ignore_eos=True)
    results, (other,) = generate(
        engine,
        [
            Request(request_id="a", token_ids=(1, 2), sampling=narrow, stopping=short),
            replace(COMPANY[0], sampling=SamplingParams(seed=1)),
        ],
    )
    assert {result.finish_reason for result in results} == {FinishReason.ERROR}
    assert "found 1 sequences and sampling.n is 3" in (results[0].error or "")
    assert other.finish_reason is FinishReason.LENGTH
    check_all_free(engine)


# --------------------------------------------------------------------------------------- beside beams: n-grams, best-of


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_run_of_tokens_comes_twice_as_in_transformers(folders: dict[str, Path], size: int) -> None:
    engine, prompt, count = engine_over(folders["mpt"]), PROMPTS[0], 40
    greedy = SamplingParams(temperature=0.0, no_repeat_ngram_size=size)
    request = Request(
        request_id="a",
        token_ids=prompt,
        sampling=greedy,
        stopping=StoppingCriteria(max_new_tokens=count, ignore_eos=True),
    )
    ((result,),) = generate(engine, [request])
    ids = torch.tensor([prompt])
    out = tiny_model("mpt").generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, eos_token_id=VOCAB,
        pad_token_id=0, no_repeat_ngram_size=size,
    )  # fmt: skip
    assert result.token_ids == out[0, len(prompt) :].tolist()
    ((free,),) = generate(engine, [replace(request, request_id="b", sampling=SamplingParams(temperature=0.0))])
    assert size == 3 or free.token_ids != result.token_ids, "the rule changes something"


def test_best_of_returns_the_samples_with_the_likeliest_tokens(folders: dict[str, Path]) -> None:
    engine = engine_over(folders["gpt2"])
    stopping = StoppingCriteria(max_new_tokens=20, stop_token_ids=tuple(range(1, 12)), ignore_eos=True)
    six = Request(
        request_id="six", token_ids=PROMPTS[0], sampling=SamplingParams(seed=3, n=6), stopping=stopping,
        response=ResponseOptions(logprobs=0),
    )  # fmt: skip
    best = replace(six, request_id="best", sampling=SamplingParams(seed=3, n=2, best_of=6), response=ResponseOptions())
    (all_six, two) = generate(engine, [six, best])
    means = []
    for result in all_six:
        values = [e.logprob for e in result.logprobs] + ([] if result.stop_logprob is None else [result.stop_logprob])
        means.append((sum(values) / len(values), result.token_ids))
    means.sort(key=lambda pair: -pair[0])
    assert any(result.stop_logprob is not None for result in all_six), "some were stopped"
    assert [(result.score, result.token_ids) for result in two] == means[:2]

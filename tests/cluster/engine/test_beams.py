"""Beam search on the paged cache: transformers' answers, the same bits in any company, nothing left over."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.engine.assembly import build_engine, build_runner
from cluster.engine.beam_group import BeamGroup
from cluster.engine.commands import Commands
from cluster.engine.config import EngineConfig
from cluster.engine.engine import Engine, Result, generate
from cluster.engine.executors import follow
from cluster.engine.request import (
    BeamParams,
    FinishReason,
    Request,
    ResponseOptions,
    SamplingParams,
    StoppingCriteria,
)
from parallel.errors import CapacityError, RequestError
from parallel.group import Group
from tests.cluster.engine.beam_cases import comparable, drawn_case, expected
from tests.cluster.engine.tiny_models import CONFIGS, VOCAB, save_tiny, tiny_model
from tp_decoders import load

CASES = [drawn_case(number) for number in (*range(50), 58, 774)]
"""The first fifty, one whose end is decided by a finished continuation, one where an ended group's token counts."""


def engine_over(folder: Path | str, **sizes: Any) -> Engine:
    config = EngineConfig(**{"kv_blocks": 128, "max_sequences": 24, "max_step_tokens": 96, **sizes})
    return build_engine(build_runner(load(str(folder)), config, 0), config)


def check_all_free(engine: Engine) -> None:
    residents = engine.scheduler.residents
    residents.check()
    assert residents.pool.num_free == residents.pool.num_blocks and not residents.running
    assert len(residents._slots) == engine.config.max_sequences and not engine.scheduler.beams


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_tiny(family, tmp_path_factory.mktemp(family)) for family in CONFIGS}


@pytest.fixture(scope="module")
def found(folders: dict[str, Path]) -> dict[str, list[Result]]:
    """All cases of a family at once in one engine."""
    answers = {}
    for family in CONFIGS:
        engine = engine_over(folders[family])
        mine = [case.request for case in CASES if case.family == family]
        answers |= dict(zip([request.request_id for request in mine], generate(engine, mine), strict=True))
        check_all_free(engine)
    return answers


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{c.family}-{c.request.request_id}" for c in CASES])
def test_a_random_search_equals_transformers_token_for_token_and_in_score(
    found: dict[str, list[Result]], number: int
) -> None:
    case = CASES[number]
    results = found[case.request.request_id]
    wanted = expected(tiny_model(case.family), case)
    assert [result.error for result in results] == [None] * case.request.sampling.n
    assert [comparable(case, result.token_ids) for result in results] == [tokens for tokens, _ in wanted], case
    assert [result.score for result in results] == pytest.approx([score for _, score in wanted], rel=2e-5, abs=2e-5)


def test_the_random_searches_meet_every_option_and_every_end(found: dict[str, list[Result]]) -> None:
    seen: Counter[object] = Counter()
    for case in CASES:
        given, beam = case.request.sampling, case.beam
        seen.update([case.family, f"early {beam.early_stopping}", beam.length_penalty, f"groups {beam.groups}"])
        seen.update([f"n {given.n > 1}", f"penalty {given.repetition_penalty != 1}"])
        seen.update(
            [f"ngram {given.no_repeat_ngram_size}", f"words {bool(given.bad_words)}", f"bias {bool(given.logit_bias)}"]
        )
        seen.update(f"{result.finish_reason} {beam.groups > 1}" for result in found[case.request.request_id])
        whole = max(len(result.token_ids) for result in found[case.request.request_id])
        seen["stopped early"] += whole < (case.request.stopping.max_new_tokens or 0) - 1
    assert min(seen.values()) >= 2, seen
    assert seen["stopped early"] >= 10 and len(seen) == 5 + 3 + 5 + 3 + 2 + 2 + 4 + 2 + 2 + 4 + 1, seen


def serve_cases(group: Group, folder: str, family: str) -> list[list[Any]] | None:
    """The family's cases on this group of ranks."""
    config = EngineConfig(kv_blocks=128, max_sequences=24, max_step_tokens=96)
    runner, commands = build_runner(load(folder, group=group), config, 0), Commands(group.talk)
    if group.rank != 0:
        follow(runner, commands)
        return None
    engine = build_engine(runner, config, commands=commands)
    results = generate(engine, [case.request for case in CASES if case.family == family])
    check_all_free(engine)
    engine.close()
    return list(map(told, results))


@pytest.mark.parametrize("family", list(CONFIGS))
def test_the_random_searches_have_the_same_bits_on_two_ranks(
    folders: dict[str, Path], found: dict[str, list[Result]], ranks: Callable[..., list[Any]], family: str
) -> None:
    wanted = [told(found[case.request.request_id]) for case in CASES if case.family == family]
    assert ranks(2, serve_cases, str(folders[family]), family, limit=120.0)[0] == wanted


# ---------------------------------------------------------------------------------------------------- the same bits

RNG = random.Random(8)
PROMPTS = [tuple(RNG.randrange(1, VOCAB) for _ in range(length)) for length in (20, 33, 16, 40)]
SEARCHES = tuple(
    Request(
        request_id=f"search {i}",
        token_ids=PROMPTS[i],
        sampling=sampling,
        stopping=StoppingCriteria(max_new_tokens=40, stop_token_ids=(5, 6), min_new_tokens=30, ignore_eos=True),
        response=ResponseOptions(logprobs=3, prompt_logprobs=1),
    )
    for i, sampling in enumerate(
        (
            SamplingParams(n=4, beam=BeamParams(width=4)),
            SamplingParams(n=3, repetition_penalty=1.2, beam=BeamParams(width=4, length_penalty=0.0)),
            SamplingParams(n=4, beam=BeamParams(width=4, groups=2, diversity_penalty=0.5)),
            SamplingParams(n=2, no_repeat_ngram_size=2, beam=BeamParams(width=3, groups=3, diversity_penalty=1.0)),
        )
    )
)
COMPANY = tuple(
    Request(
        request_id=f"drawn {i}",
        token_ids=PROMPTS[i][: 5 + i],
        sampling=SamplingParams(seed=i, n=2),
        stopping=StoppingCriteria(max_new_tokens=25 + i, ignore_eos=True),
    )
    for i in range(4)
)
SCENES: dict[str, dict[str, Any]] = {
    "alone": {},
    "together": {},
    "chunks": {"max_step_tokens": 24, "max_sequences": 24, "max_scored_tokens": 7},
    "preempted": {"kv_blocks": 24, "prefix_caching": False},
    "preempted, cached": {"kv_blocks": 24},
}

Told = dict[str, list[list[Any]]]


def told(results: list[Result]) -> list[list[Any]]:
    """Everything the results say, for exact comparison."""
    return [[r.token_ids, r.logprobs, r.prompt_logprobs, r.score, r.finish_reason, r.stop_token_id] for r in results]


def set_aside_in(engine: Engine) -> list[tuple[int, int]]:
    """Will hold (tokens found, tokens of its prompt computed) of each search at the moment it is set aside."""
    noted: list[tuple[int, int]] = []
    tables, set_aside = engine.scheduler.tables, engine.scheduler.tables.set_aside

    def watched(group: BeamGroup) -> None:
        noted.append((group.search.length, group.leader.computed))
        set_aside(group)

    tables.set_aside = watched  # type: ignore[method-assign]
    return noted


def scene(engine: Engine, name: str) -> Told:
    if name == "alone":
        return {request.request_id: told(generate(engine, [request])[0]) for request in SEARCHES}
    requests = [*COMPANY, *SEARCHES]
    noted = set_aside_in(engine)
    results = generate(engine, requests)
    if "preempted" in name:
        assert any(length > 8 for length, _ in noted), f"no search was set aside in the middle: {noted}"
    return {request.request_id: told(found) for request, found in zip(requests, results, strict=True)}


def all_scenes(group: Group, folder: str) -> dict[str, Told] | None:
    """Every scene on this group of ranks; the answers on rank 0."""
    model, answers = load(folder, group=group), {}
    for name, sizes in SCENES.items():
        config = EngineConfig(**{"kv_blocks": 128, "max_sequences": 24, "max_step_tokens": 96, **sizes})
        commands = None if group.size == 1 else Commands(group.talk)
        runner = build_runner(model, config, 0)
        if group.rank == 0:
            engine = build_engine(runner, config, commands=commands)
            answers[name] = scene(engine, name)
            check_all_free(engine)
            engine.close()
        elif commands is not None:
            follow(runner, commands)
    return answers if group.rank == 0 else None


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gpt_bigcode"])
def test_a_search_has_the_same_bits_in_any_company_and_at_any_size(
    folders: dict[str, Path], ranks: Callable[..., list[Any]], family: str
) -> None:
    answers = {tp: ranks(tp, all_scenes, str(folders[family]), limit=120.0)[0] for tp in (1, 3)}
    wanted = answers[1]["alone"]
    assert all(len(told_one[0]) >= 30 for results in wanted.values() for told_one in results)
    for tp, scenes in answers.items():
        for name, answer in scenes.items():
            for search in SEARCHES:
                assert answer[search.request_id] == wanted[search.request_id], f"tp = {tp}, {name}, {search.sampling}"


def test_scores_are_made_of_the_log_probabilities_that_scoring_gives(folders: dict[str, Path]) -> None:
    engine = engine_over(folders["mpt"])
    for search in SEARCHES[:1]:
        for result in generate(engine, [search])[0]:
            stop = () if result.stop_token_id is None else (result.stop_token_id,)
            whole = (*search.token_ids, *result.token_ids, *stop)
            ((scored,),) = generate(engine, [Request(request_id="s", token_ids=whole, score_only=True)])
            served = [entry.logprob for entry in result.logprobs] + ([result.stop_logprob] if stop else [])
            assert scored.prompt_logprobs is not None
            new = [entry.logprob for entry in scored.prompt_logprobs][len(search.token_ids) - 1 :]
            assert served == new
            assert result.score == pytest.approx(sum(new) / len(new), rel=1e-12)
            assert all(entry.top[0][1] >= entry.logprob and len(entry.top) == 3 for entry in result.logprobs)


# ---------------------------------------------------------------------------------------------------------- memory


def test_beams_share_the_blocks_of_what_they_have_in_common(folders: dict[str, Path]) -> None:
    engine = engine_over(folders["gpt2"], kv_blocks=128)
    prompt = tuple(random.Random(1).randrange(1, VOCAB) for _ in range(70))
    sampling = SamplingParams(beam=BeamParams(width=8))
    stopping = StoppingCriteria(max_new_tokens=40, ignore_eos=True)
    engine.submit(Request(request_id="a", token_ids=prompt, sampling=sampling, stopping=stopping))
    most, pool = 0, engine.scheduler.residents.pool
    while not engine.idle:
        engine.step()
        engine.scheduler.residents.check()
        most = max(most, pool.num_blocks - pool.num_free)
    assert 4 + 8 <= most <= 4 + 8 * 3, "four full blocks of the prompt once, at most three more for each beam"
    check_all_free(engine)


def test_searches_among_others_that_are_aborted_leave_nothing_behind(folders: dict[str, Path]) -> None:
    """A walk: requests of all kinds come, some are aborted in the middle; the rest answer as they would alone."""
    rng, engine = random.Random(3), engine_over(folders["gpt_neox"], kv_blocks=30, max_sequences=10, max_step_tokens=20)
    asked: dict[str, Request] = {}
    done: dict[str, list[Result]] = {}
    aborted: set[str] = set()
    for turn in range(400):
        if len(asked) < 40 and rng.random() < 0.25:
            made = replace(rng.choice((*SEARCHES[:3], *COMPANY)), request_id=f"{turn}")
            made = replace(made, stopping=replace(made.stopping, max_new_tokens=rng.randint(1, 40), min_new_tokens=0))
            asked[made.request_id] = engine.submit(made)
            done[made.request_id] = [Result() for _ in range(made.sampling.n)]
        if asked and rng.random() < 0.08:
            aborted.add(name := rng.choice(list(asked)))
            engine.abort([name])
        if rng.random() < 0.01:
            engine.weights_changed()  # they have not
        for event in engine.step():
            done[event.request_id][event.sample_index].add(event)
        engine.scheduler.residents.check()
    while not engine.idle:
        for event in engine.step():
            done[event.request_id][event.sample_index].add(event)
    check_all_free(engine)
    assert engine.load().preemptions > 5 and len(aborted) > 5
    for name, results in done.items():
        assert all(result.finish_reason is not None for result in results)
        if all(result.finish_reason is not FinishReason.ABORTED for result in results):
            assert told(results) == told(generate(engine, [asked[name]])[0]), asked[name]


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

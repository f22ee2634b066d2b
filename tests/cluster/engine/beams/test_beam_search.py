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

from cluster.engine.engine import Engine, Result, generate
from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.request import (
    BeamParams,
    FinishReason,
    Request,
    SamplingParams,
    StoppingCriteria,
)
from cluster.engine.run.command_stream import Commands
from cluster.engine.run.executors import follow
from cluster.engine.sequences.sequence import BeamGroup
from parallel.ranks.group import Group
from tests.cluster.engine.beams.beam_cases import (
    COMPANY,
    SEARCHES,
    check_all_free,
    comparable,
    drawn_case,
    engine_over,
    expected,
)
from tests.cluster.engine.tiny_models import CONFIGS, VOCAB, save_tiny, tiny_model
from tp_decoders import load

CASES = [drawn_case(number) for number in (*range(50), 58, 774)]
"""The first fifty, one whose end is decided by a finished continuation, one where an ended group's token counts."""


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
    answers: dict[str, list[Result]] = {}
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
    assert seen["stopped early"] >= 10 and len(seen) == len(CONFIGS) + 3 + 5 + 3 + 2 + 2 + 4 + 2 + 2 + 4 + 1, seen


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

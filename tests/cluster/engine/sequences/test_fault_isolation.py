"""An exception out of one request's part of a step ends that request alone: the others' answers keep every bit, blocks
are given back, and the engine goes on. What the group raises is raised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.engine.beams.beam_search import Search
from cluster.engine.engine import Engine, Result, generate
from cluster.engine.kv_cache.beam_tables import BeamTables
from cluster.engine.request import (
    BeamParams,
    FinishReason,
    Pooling,
    Request,
    ResponseOptions,
    SamplingParams,
    StoppingCriteria,
)
from cluster.engine.sample import pooling, sampler
from cluster.engine.sample.logits_processors import LogitsProcessors
from cluster.engine.schedule import output_processor
from cluster.engine.schedule.step_plan import PlanBuilder
from parallel.errors import CollectiveError
from tests.cluster.engine.beams.beam_cases import check_all_free, engine_over
from tests.cluster.engine.tiny_models import save_tiny

NEW = StoppingCriteria(max_new_tokens=6, ignore_eos=True)
POISON = "poison"
VICTIMS = (
    Request(request_id="drawn", token_ids=(5, 9, 2), sampling=SamplingParams(seed=3, n=2), stopping=NEW),
    Request(request_id="greedy", token_ids=(7,), sampling=SamplingParams(temperature=0.0), stopping=NEW),
    Request(request_id="beams", token_ids=(4, 4, 8), sampling=SamplingParams(beam=BeamParams(width=3)), stopping=NEW),
    Request(request_id="scored", token_ids=(1, 2, 3), response=ResponseOptions(prompt_logprobs=2), score_only=True),
    Request(request_id="read", token_ids=(1, 2, 3), pooling=Pooling(rows="mean", head=False)),
)  # fmt: skip
DRAWN = Request(
    request_id=POISON, token_ids=(11, 12), stopping=NEW, response=ResponseOptions(logprobs=2),
    sampling=SamplingParams(seed=1, n=3, repetition_penalty=1.5),
)  # fmt: skip
SEARCH = replace(DRAWN, sampling=SamplingParams(beam=BeamParams(width=4), repetition_penalty=1.5))
SCORED = replace(DRAWN, sampling=SamplingParams(), score_only=True, response=ResponseOptions(prompt_logprobs=3))
READ = Request(request_id=POISON, token_ids=(11, 12), pooling=Pooling(rows="all", head=False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("gpt2", tmp_path_factory.mktemp("gpt2"))


def poisoned(original: Callable[..., Any], of: Callable[..., object], error: Exception, calls: int) -> Any:
    """The function, raising from its `calls`-th call for the poison request on."""
    count = 0

    def replaced(*arguments: Any, **more: Any) -> Any:
        nonlocal count
        if of(*arguments) == POISON:
            count += 1
            if count >= calls:
                raise error
        return original(*arguments, **more)

    return replaced


def any_row(_: object, sequences: Any) -> str:
    return POISON if any(seq.request_id == POISON for seq in sequences) else ""


PLACES: dict[str, tuple[object, str, Callable[..., object], Request, int]] = {
    "adjusting a row": (LogitsProcessors, "apply", lambda _, row, seq, *rest: seq.request_id, DRAWN, 2),
    "drawing rows": (sampler, "draw_rows", any_row, DRAWN, 2),
    "drawing the first rows": (sampler, "draw_rows", any_row, DRAWN, 1),
    "appending a token": (output_processor.OutputProcessor, "_append", lambda _, seq, *rest: seq.request_id, DRAWN, 4),
    "taking scores": (
        output_processor.OutputProcessor, "_scored", lambda _, score, *rest: score.sequence.request_id, SCORED, 1),
    "reading rows": (pooling.Pooler, "_answer", lambda _, run, *rest: run.sequence.request_id, READ, 1),
    "ranking beams": (LogitsProcessors, "apply", lambda _, row, seq, *rest: seq.request_id, SEARCH, 3),
    "settling beams": (BeamTables, "_rearrange", lambda _, group, *rest: group.leader.request_id, SEARCH, 2),
    "planning": (PlanBuilder, "add", lambda _, seq, *rest: seq.request_id, DRAWN, 5),
    "planning beams": (PlanBuilder, "add", lambda _, seq, *rest: seq.request_id, SEARCH, 6),
}  # fmt: skip


def answers(engine: Engine, *more: Request) -> tuple[list[list[Result]], list[Result]]:
    found = generate(engine, [*more, *VICTIMS])
    return found[len(more) :], found[0] if more else []


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("error", [IndexError("index 97 is out of bounds"), AssertionError("odd")], ids=type)
def test_what_one_request_raises_ends_it_alone(
    folder: Path, place: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet, _ = answers(engine_over(folder))
    engine = engine_over(folder)
    owner, name, of, request, calls = PLACES[place]
    monkeypatch.setattr(owner, name, poisoned(getattr(owner, name), of, error, calls))
    others, failed = answers(engine, request)
    assert others == quiet, "bit for bit"
    assert {result.finish_reason for result in failed} == {FinishReason.ERROR}
    assert all(str(error) in str(result.error) for result in failed)
    check_all_free(engine)
    monkeypatch.undo()
    assert answers(engine)[0] == quiet, "and it goes on"


@pytest.mark.parametrize(
    "place", [place for place in PLACES if not place.startswith("planning")]
)  # no collective there
def test_what_the_group_raises_is_raised(folder: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, of, request, calls = PLACES[place]
    engine = engine_over(folder)
    monkeypatch.setattr(owner, name, poisoned(getattr(owner, name), of, CollectiveError("rank 1 is gone"), calls))
    with pytest.raises(CollectiveError, match="rank 1 is gone"):
        answers(engine, request)


def test_a_search_that_raises_half_way_leaves_no_block_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, advance = engine_over(folder), Search.advance

    def raising(self: Search, rows: Any) -> list[int]:
        parents = advance(self, rows)
        if self.length == 3:
            raise ValueError("half-way")
        return parents

    monkeypatch.setattr(Search, "advance", raising)
    (failed,) = generate(engine, [SEARCH])
    assert failed[0].finish_reason is FinishReason.ERROR and "ValueError: half-way" in str(failed[0].error)
    check_all_free(engine)

"""Answers follow their grammars, and have the same bits whatever rides along, on however many ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cluster.engine.engine import generate
from cluster.engine.engine_config import SpeculationConfig
from cluster.engine.guided.guides import Guides
from cluster.engine.request import (
    BeamParams,
    FinishReason,
    Guide,
    Request,
    ResponseOptions,
    SamplingParams,
    StoppingCriteria,
)
from cluster.engine.run.command_stream import Commands
from cluster.engine.run.executors import follow
from cluster.request_errors import InvalidRequest, NoGuides
from parallel.errors import RequestError
from parallel.ranks.group import Group
from tests.cluster.engine.guided.guided_cases import (
    CHOICES,
    DATE,
    END,
    GUIDES,
    OUTPUTS,
    Characters,
    check,
    guided,
    guided_engine,
    many_guided,
    text_of,
    without,
)
from tests.cluster.engine.test_generation import preempted_by, told
from tests.cluster.engine.tiny_models import save_tiny, tiny_model
from tp_decoders import load

SCENES: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks of 7": {"max_sequences": 3, "max_step_tokens": 7},
    "preempted": {"kv_blocks": 9, "prefix_caching": False},
    "drafts": {"speculation": SpeculationConfig(method="ngram", prompt_lookup_min=1)},
    "computed call by call": {"replay": False},
}
FREE = 6
Told = dict[str, list[Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("gpt2", tmp_path_factory.mktemp("gpt2"))


def serve(group: Group, folder: str, count: int, scenes: Many[str]) -> dict[str, Told] | None:
    """Each scene's answers on rank 0: `count` with a grammar, and some without between them."""
    model, found = load(folder, group=group), {}
    for scene in scenes:
        commands = None if group.size == 1 else Commands(group.talk)
        engine = guided_engine(model, commands, **SCENES[scene])
        if group.rank:
            assert commands is not None
            follow(engine.executor.runner, commands)  # type: ignore[attr-defined]
            continue
        requests = many_guided(count)
        requests[2:2] = without(many_guided(FREE))
        preempted = preempted_by(engine)
        results = generate(engine, requests)
        load_ = engine.load()
        engine.close()
        assert (scene == "preempted") == bool(preempted), scene
        assert scene != "drafts" or load_.accepted_draft_tokens > 0
        assert load_.guided_requests == count and load_.guide_masks > 10 * count and load_.guide_compiles == len(GUIDES)
        found[scene] = {r.request_id: [told(s) for s in some] for r, some in zip(requests, results, strict=True)}
        for request, some in zip(requests, results, strict=True):
            if request.sampling.guide is not None:
                check(request, some)
    return found if group.rank == 0 else None


def test_answers_follow_their_grammars_with_the_same_bits_everywhere(folder: Path, ranks: Callable[..., Any]) -> None:
    count = min(OUTPUTS, 48)
    on_ranks = {1: list(SCENES), 2: ["plain", "preempted", "drafts"], 3: ["plain"]}
    answers = {tp: ranks(tp, serve, str(folder), count, some, limit=200.0)[0] for tp, some in on_ranks.items()}
    expected = answers[1]["plain"]
    for tp, scenes in answers.items():
        for scene, found in scenes.items():
            assert found == expected, f"tp = {tp}, {scene}"


@pytest.mark.skipif(OUTPUTS <= 48, reason="GUIDED_OUTPUTS asks for more")
def test_a_thousand_answers_are_valid_and_the_same_on_one_two_and_three_ranks(
    folder: Path, ranks: Callable[..., Any]
) -> None:
    answers = [ranks(tp, serve, str(folder), OUTPUTS, ["plain"], limit=600.0)[0] for tp in (1, 2, 3)]
    assert answers[0] == answers[1] == answers[2]


def test_rows_without_a_grammar_do_not_know_of_those_with_one(folder: Path) -> None:
    model, free = load(str(folder)), without(many_guided(FREE))
    alone = [[told(s) for s in some] for some in generate(guided_engine(model), free)]
    beside = generate(guided_engine(model), [*many_guided(12), *free])[12:]
    assert [[told(s) for s in some] for some in beside] == alone


def test_a_sample_that_is_taken_up_needs_only_its_tokens(folder: Path) -> None:
    model = load(str(folder))
    request = guided(1, GUIDES[0], n=2)
    whole = generate(guided_engine(model), [request])[0]
    for cut in (1, 7, min(len(sample.token_ids) for sample in whole) - 1):
        begun = tuple(tuple(sample.token_ids[:cut]) for sample in whole)
        rest = generate(guided_engine(model), [replace(request, resumed_ids=begun)])[0]
        assert [list(ids) + r.token_ids for ids, r in zip(begun, rest, strict=True)] == [s.token_ids for s in whole]


def test_log_probabilities_are_those_of_the_allowed_tokens(folder: Path) -> None:
    """As vLLM gives them: of the model's logits with the others left out, before temperature and cuts."""
    model = load(str(folder))
    request = replace(
        guided(3, Guide(kind="regex", text="[abc]d"), temperature=0.5), response=ResponseOptions(logprobs=9)
    )
    (result,) = generate(guided_engine(model), [request])[0]
    with torch.no_grad():
        logits = tiny_model("gpt2")(torch.tensor([request.token_ids])).logits[0, -1]
    allowed = [Characters().spelled(c)[0] for c in "abc"]
    expected = logits[allowed].log_softmax(0).tolist()
    first, last = result.logprobs
    assert dict(first.top) == pytest.approx(dict(zip(allowed, expected, strict=True)), abs=1e-5)
    assert (last.logprob, len(last.top)) == (0.0, 1), "one token was allowed"


def test_without_a_token_that_ends_a_text_the_grammar_does(folder: Path) -> None:
    engine = guided_engine(load(str(folder)), ends=())
    requests = [guided(i, guide) for i, guide in enumerate(GUIDES)]
    for request, results in zip(requests, generate(engine, requests), strict=True):
        check(request, results)
    with pytest.raises(RequestError, match="no token that ends a beam"):
        engine.submit(guided(9, GUIDES[0], beam=BeamParams(width=2)))


def test_an_answer_that_is_cut_short_says_so(folder: Path) -> None:
    (result,) = generate(guided_engine(load(str(folder))), [guided(1, GUIDES[0], most=5)])[0]
    assert result.finish_reason is FinishReason.LENGTH and text_of(result.token_ids).startswith('{"nam')


def test_beams_find_what_transformers_finds(folder: Path) -> None:
    """Its generate with prefix_allowed_tokens_fn; scores are of the whole vocabulary, as there."""
    guide, prompt = Guide(kind="regex", text="(a|bc|[d-h]{2})x*y"), (5, 17, 40)
    beam = BeamParams(width=3)
    request = Request(
        request_id="beams", token_ids=prompt, sampling=SamplingParams(guide=guide, beam=beam, n=3),
        stopping=StoppingCriteria(max_new_tokens=6),
    )  # fmt: skip
    found = generate(guided_engine(load(str(folder))), [request])[0]
    guides = Guides(Characters)

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        mask = guides.matcher(guide, len(prompt)).mask(ids.tolist())
        return [i for i in range(97) if mask[i // 8] >> (i % 8) & 1]

    out = tiny_model("gpt2").generate(
        torch.tensor([prompt]), num_beams=3, num_return_sequences=3, max_new_tokens=6, do_sample=False, pad_token_id=96,
        prefix_allowed_tokens_fn=allowed, eos_token_id=END, output_scores=True, return_dict_in_generate=True,
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long), generation_config=transformers.GenerationConfig(),
    )  # fmt: skip
    expected = [[i for i in row[len(prompt) :].tolist() if i not in (END, 96)] for row in out.sequences]
    assert [sample.token_ids for sample in found] == expected
    assert [sample.score for sample in found] == pytest.approx(out.sequences_scores.tolist(), abs=1e-5)


# ------------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("guide", "words"),
    [
        (Guide(kind="regex", text="(a"), "unclosed group"),
        (Guide(kind="regex", text="a(?=b)"), "look-around"),
        (Guide(kind="json", text="{"), "json"),
        (Guide(kind="json", text='{"type": "objct"}'), "objct"),
        (Guide(kind="json", text='{"not": {"type": "null"}}'), "not"),
        (Guide(kind="grammar", text="start: unknown"), "unknown"),
        (Guide(kind="grammar", text="start: " + '("a"|' * 3000 + '"b"' + ")" * 3000), "nested"),
        (Guide(kind="regex", text="日本"), "no token of this model goes on"),
    ],
    ids=lambda value: value.kind if isinstance(value, Guide) else value,
)
def test_a_grammar_that_cannot_be_followed_is_refused_in_words(guide: Guide, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as refused:
        Guides(Characters).compiled(guide)
    assert (
        len(str(refused.value)) < 800
        and refused.value.violations[0].field == f"sampling.structured_outputs.{guide.kind}"
    )


def test_a_refused_request_leaves_nothing_behind(folder: Path) -> None:
    engine = guided_engine(load(str(folder)))
    engine.prepare([guided(0, Guide(kind="regex", text="("))])
    for guide in (Guide(kind="regex", text="("), Guide(kind="choice", text='[""]')):
        with pytest.raises(RequestError):
            engine.submit(guided(0, guide))
    for stopping in (StoppingCriteria(ignore_eos=True), StoppingCriteria(min_new_tokens=3)):
        with pytest.raises(RequestError, match="structured_outputs"):
            engine.submit(replace(guided(0, GUIDES[0]), stopping=stopping))
    assert engine.idle and engine.load().guided_requests == 0


def test_without_the_package_or_a_tokenizer_the_refusal_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoGuides, match="no tokenizer"):
        Guides(lambda: None).compiled(GUIDES[0])
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(NoGuides, match=r"pip install 'tp-decoders\[guided\]'"):
        Guides(Characters).compiled(GUIDES[0])


def test_compiled_grammars_are_kept_while_they_are_asked_for() -> None:
    guides = Guides(Characters, most=2)
    for guide in (GUIDES[0], GUIDES[1], GUIDES[0], GUIDES[2], GUIDES[0], GUIDES[1]):
        guides.compiled(guide)
    assert guides.compiles == 4 and guides.known(GUIDES[0]) and not guides.known(GUIDES[2])


def test_one_sample_whose_grammar_fails_midway_ends_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.engine.guided.matcher.PATIENCE_S", -1.0)
    monkeypatch.setattr("cluster.engine.guided.matcher.SLOW_S", -1.0)
    engine = guided_engine(load(str(folder)))
    guides = engine.scheduler.guides
    monkeypatch.undo()
    guides.compiled(Guide(kind="regex", text=DATE))
    monkeypatch.setattr("cluster.engine.guided.matcher.PATIENCE_S", -1.0)
    monkeypatch.setattr("cluster.engine.guided.matcher.SLOW_S", -1.0)
    (slow,), (free,) = generate(engine, [guided(0, Guide(kind="regex", text=DATE)), *without(many_guided(1))])
    assert slow.finish_reason is FinishReason.ERROR and "give a simpler one" in (slow.error or "")
    assert free.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) and free.error is None


def drafts() -> Iterator[list[int]]:
    spelled = Characters().spelled
    yield [*spelled("no"), 9]
    yield [*spelled("yes"), END, 3]
    yield spelled("zzz")


def test_a_draft_is_cut_where_the_grammar_ends_or_forbids() -> None:
    spelled, matcher = Characters().spelled, Guides(Characters).matcher(GUIDES[3], 0)
    assert CHOICES[0] == "yes"
    assert [matcher.allowed([], draft) for draft in drafts()] == [spelled("no"), spelled("ye"), []]
    masks = matcher.masks_along([], spelled("ye"))
    fresh = Guides(Characters).matcher(GUIDES[3], 0)
    assert masks == [fresh.mask(spelled("ye"[:i])) for i in range(3)]

"""Prompts that are read and answered: the engine's answers equal the model's own, whatever else runs beside them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cluster.engine.engine import Engine, generate
from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.request import FinishReason, Pooling, Request, SamplingParams, StoppingCriteria
from cluster.engine.run.command_stream import Commands
from cluster.engine.run.executors import follow
from parallel.errors import RequestError
from parallel.ranks.group import Group
from tests.cluster.engine.tiny_models import CONFIGS, save_tiny, tiny_model
from tp_decoders import load

PROMPTS = [tuple(1 + (7 * i + 3 * j) % 90 for j in range(length)) for i, length in enumerate((1, 5, 40, 17, 64, 33))]
CONFIG = EngineConfig(kv_blocks=48, max_sequences=4, max_step_tokens=24)


def engine_of(folder: Path, task: str, config: EngineConfig = CONFIG, **given: Any) -> Engine:
    return build_engine(build_runner(load(folder, task=task, **given), config, 1 << 28), config)


def pooled(number: int, rows: Any, **options: Any) -> Request:
    pooling = Pooling(rows=rows, **options)
    return Request(request_id=f"{rows} {number} {options}", token_ids=PROMPTS[number], pooling=pooling)


def states(family: str) -> list[torch.Tensor]:
    """transformers' last hidden states of each prompt, normalised."""
    model = tiny_model(family).base_model
    with torch.no_grad():
        return [model(torch.tensor([prompt])).last_hidden_state[0] for prompt in PROMPTS]


@pytest.mark.parametrize("family", CONFIGS)
def test_embeddings_equal_transformers_beside_running_generation(family: str, tmp_path: Path) -> None:
    engine = engine_of(save_tiny(family, tmp_path), "causal-lm")
    writing = [
        Request(
            request_id=f"text {i}",
            token_ids=prompt,
            sampling=SamplingParams(temperature=0.0),
            stopping=StoppingCriteria(max_new_tokens=9, ignore_eos=True),
        )
        for i, prompt in enumerate(PROMPTS)
    ]
    alone = [[result.token_ids for result in found] for found in generate(engine, writing)]
    reading = [pooled(i, rows, head=False) for i in range(len(PROMPTS)) for rows in ("last", "mean", "all")]
    mixed = [request for pair in zip(writing, reading[::3], strict=True) for request in pair] + reading[1::3]
    answers = generate(engine, [*mixed, *reading[2::3]])
    assert [[r.token_ids for r in answers[2 * i]] for i in range(len(PROMPTS))] == alone
    found = {request.request_id: answer for request, answer in zip([*mixed, *reading[2::3]], answers, strict=True)}
    for i, expected in enumerate(states(family)):
        for rows, wanted in (("last", expected[-1:]), ("mean", expected.mean(0)[None]), ("all", expected)):
            (answer,) = found[pooled(i, rows, head=False).request_id]
            assert answer.finish_reason is FinishReason.STOP and answer.token_ids == []
            torch.testing.assert_close(torch.tensor(answer.pooled), wanted, rtol=1e-4, atol=1e-4)
    assert engine.load().kv_blocks_free == engine.load().kv_blocks_total and engine.idle


def test_answers_are_the_same_bits_however_prompts_are_cut_and_set_aside(tmp_path: Path) -> None:
    folder = save_tiny("gpt2", tmp_path)
    requests = [
        pooled(i, rows, head=head, normalize=rows != "all")
        for i in range(len(PROMPTS))
        for rows in ("last", "mean", "all")
        for head in (False, True)
    ]
    found = []
    for tokens, blocks, caching in ((512, 200, False), (24, 48, True), (4, 9, True)):
        config = replace(CONFIG, max_step_tokens=tokens, kv_blocks=blocks, prefix_caching=caching)
        engine = engine_of(folder, "token-classification", config, labels=3)
        twice = [*requests, *(replace(r, request_id=f"{r.request_id} again") for r in requests)]
        found.append([answer.pooled for (answer,) in generate(engine, twice)])
        assert found[-1][: len(requests)] == found[-1][len(requests) :]
    assert found[0] == found[1] == found[2]
    assert [len(rows or ()) for rows in found[0][:6]] == [1, 1, 1, 1, len(PROMPTS[0]), len(PROMPTS[0])]
    assert [len(rows[0]) for rows in found[0][:2] if rows] == [48, 3]


def test_a_prompt_half_read_when_the_weights_change_is_read_again_whole(tmp_path: Path) -> None:
    engine = engine_of(save_tiny("gpt2", tmp_path), "causal-lm")
    requests = [pooled(4, "all", head=False), pooled(2, "mean", head=False)]
    expected = [answer.pooled for (answer,) in generate(engine, requests)]
    for request in requests:
        engine.submit(replace(request, request_id=f"{request.request_id} again"))
    assert engine.step() == []
    engine.weights_changed()
    events = []
    while not engine.idle:
        events += engine.step()
    found = {event.request_id: event.pooled for event in events}
    assert [found[f"{request.request_id} again"] for request in requests] == expected


def served(group: Group, folder: str) -> list[Any] | None:
    """The answers of a group's rank 0."""
    runner = build_runner(load(folder, task="sequence-classification", group=group), CONFIG, 1 << 28)
    commands = Commands(group.comm)
    if group.rank:
        follow(runner, commands)
        return None
    engine = build_engine(runner, CONFIG, (), commands if group.size > 1 else None)
    requests = [pooled(i, rows, head=head) for i in range(6) for rows in ("last", "mean") for head in (True, False)]
    answers = [answer.pooled for (answer,) in generate(engine, requests)]
    engine.close()
    return answers


def test_classes_are_the_same_bits_on_one_two_and_three_ranks(ranks: Any, tmp_path: Path) -> None:
    config = transformers.GPT2Config(**_gpt2(), num_labels=3, pad_token_id=0)
    model = transformers.GPT2ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    (one,) = ranks(1, served, str(tmp_path))
    assert ranks(2, served, str(tmp_path)) == [one, None]
    assert ranks(3, served, str(tmp_path)) == [one, None, None]
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([prompt])).logits for prompt in PROMPTS])
    torch.testing.assert_close(torch.tensor([answer[0] for answer in one[::4]]), expected, rtol=1e-4, atol=1e-4)


def _gpt2() -> dict[str, Any]:
    return {"vocab_size": 97, "n_positions": 128, "n_embd": 48, "n_layer": 2, "n_head": 6}


def test_what_the_model_has_no_head_for_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("gpt2", tmp_path)
    with pytest.raises(RequestError, match="language model without another head"):
        engine_of(folder, "causal-lm").submit(pooled(1, "last"))
    classifier = engine_of(folder, "question-answering")
    with pytest.raises(RequestError, match="has no vocabulary"):
        classifier.submit(Request(request_id="text", token_ids=PROMPTS[1]))


def test_a_model_with_broken_weights_ends_only_the_request_it_concerns(tmp_path: Path) -> None:
    model = load(save_tiny("gpt2", tmp_path))
    with torch.no_grad():
        model.embed.weight[5] = float("nan")
    engine = build_engine(build_runner(model, CONFIG, 1 << 28), CONFIG)
    good = Request(request_id="good", token_ids=(1, 2), pooling=Pooling(head=False))
    bad = Request(request_id="bad", token_ids=(1, 5), pooling=Pooling(head=False))
    (first,), (second,) = generate(engine, [good, bad])
    assert first.pooled is not None and second.finish_reason is FinishReason.ERROR
    assert "no finite numbers" in str(second.error) and engine.idle

"""Log-probabilities that go back with tokens, against torch's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from cluster.engine.engine import generate
from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.request import Request, ResponseOptions, SamplingParams, StoppingCriteria, TokenLogprobs
from cluster.engine.sample.logprobs import Asked, token_logprobs
from parallel.ranks.group import Group
from parallel.vocabulary.vocab_parallel import VocabHead
from tests.cluster.engine.tiny_models import save_tiny, tiny_model
from tp_decoders import load

VOCAB = 1003


def head() -> VocabHead:
    return VocabHead(VOCAB, 4, group=Group.single())


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(1)) * 4


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_chosen_and_most_likely_tokens_equal_a_log_softmax(temperature: float) -> None:
    logits = rows(3)
    asked = [Asked(2, 17, 3, temperature), Asked(0, 4, 0, temperature), Asked(2, 18, 1, temperature)]
    expected = (logits.double() / temperature).log_softmax(1)
    for question, answer in zip(asked, token_logprobs(head(), logits, asked), strict=True):
        assert isinstance(answer, TokenLogprobs) and answer.token_id == question.token
        assert answer.logprob == pytest.approx(float(expected[question.row, question.token]), abs=2e-6)
        values, ids = expected[question.row].topk(question.top)
        assert [token for token, _ in answer.top] == ids.tolist()
        assert [value for _, value in answer.top] == pytest.approx(values.tolist(), abs=2e-6)


def test_each_row_keeps_its_own_temperature_and_bits() -> None:
    logits = rows(40)
    asked = [Asked(i, i, i % 3, 1.0 + i % 2) for i in range(40)]
    together = token_logprobs(head(), logits, asked)
    alone = [token_logprobs(head(), logits, [question])[0] for question in asked]
    assert together == alone


def test_equal_alternatives_come_in_the_order_of_their_ids() -> None:
    logits = torch.zeros(1, VOCAB)
    (answer,) = token_logprobs(head(), logits, [Asked(0, 5, VOCAB, 1.0)])
    assert isinstance(answer, TokenLogprobs)
    assert [token for token, _ in answer.top] == list(range(VOCAB))


def test_a_damaged_row_is_a_reason_and_the_others_are_not() -> None:
    logits = rows(2)
    good = token_logprobs(head(), logits, [Asked(1, 3, 2, 1.0)])
    logits[0, 7] = math.nan
    damaged, fine = token_logprobs(head(), logits, [Asked(0, 3, 2, 1.0), Asked(1, 3, 2, 1.0)])
    assert isinstance(damaged, str) and "damaged" in damaged and [fine] == good


@pytest.mark.parametrize("top", [0, 4])
def test_served_logprobs_are_the_model_s_whatever_the_sampling(tmp_path: Path, top: int) -> None:
    model = load(str(save_tiny("gpt_neox", tmp_path)))
    config = EngineConfig(kv_blocks=32, max_sequences=4, max_step_tokens=64)
    request = Request(
        request_id="r",
        token_ids=(5, 9, 11, 3, 70, 2),
        sampling=SamplingParams(temperature=0.7, top_k=5, repetition_penalty=1.3, seed=4, logit_bias={4: 3.0}),
        stopping=StoppingCriteria(max_new_tokens=12, ignore_eos=True),
        response=ResponseOptions(logprobs=top, prompt_logprobs=top, logprobs_temperature=2.0),
    )
    (result,) = generate(build_engine(build_runner(model, config, 0), config), [request])[0]
    ids = [*request.token_ids, *result.token_ids]
    logits = tiny_model("gpt_neox")(torch.tensor([ids])).logits[0].detach().double() / 2.0
    expected = logits.log_softmax(1)
    told = [*(result.prompt_logprobs or ()), *result.logprobs]
    assert len(told) == len(ids) - 1
    for place, entry in enumerate(told):
        assert entry.token_id == ids[place + 1] and len(entry.top) == top
        assert entry.logprob == pytest.approx(float(expected[place, entry.token_id]), abs=1e-4)
        assert [token for token, _ in entry.top] == expected[place].topk(top).indices.tolist()

"""Beams, best-of and holes in the middle over a real port: what the engine finds is what a client reads."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cluster.engine.engine import Result, generate
from cluster.engine.request import (
    BeamParams,
    Request,
    ResponseOptions,
    SamplingParams,
    StoppingCriteria,
)
from cluster.frontend.frontend import State
from cluster.frontend.output.output_text import codec_of
from cluster.link.local_link import LocalLink
from tests.cluster.frontend.harness import run, until
from tests.cluster.rpc.services.test_real_model import TEXT, engine_of, serving_model, tokenizer_of
from tests.cluster.rpc.services.test_real_model import gpt2 as gpt2
from tp_decoders.protocol import inference_pb2 as pb

STOPS = list(range(100, 9000))
DIVERSE: dict[str, Any] = {
    "width": 4,
    "length_penalty": 0.6,
    "early_stopping": "EARLY_STOPPING_NEVER",
    "groups": 2,
    "diversity_penalty": 0.5,
}
FIELDS: dict[str, Any] = {
    "sampling": {"n": 3, "no_repeat_ngram_size": 2, "beam": DIVERSE},
    "stopping": {"max_new_tokens": 12, "stop_token_ids": STOPS, "ignore_eos": True},
    "response": {"logprobs": 2},
}
IDS = (5, 6, 7, 8)


@pytest.fixture(scope="module")
def found(gpt2: Path) -> list[Result]:
    """The same search in this process."""
    beam = BeamParams(width=4, length_penalty=0.6, early_stopping="never", groups=2, diversity_penalty=0.5)
    request = Request(
        request_id="a",
        token_ids=IDS,
        sampling=SamplingParams(n=3, no_repeat_ngram_size=2, beam=beam),
        stopping=StoppingCriteria(max_new_tokens=12, stop_token_ids=tuple(STOPS), ignore_eos=True),
        response=ResponseOptions(logprobs=2),
    )
    return generate(engine_of(gpt2), [request])[0]


def same(samples: Sequence[pb.Sample], found: list[Result]) -> bool:
    told = [(list(s.token_ids), s.score, [v.logprob for v in map(_first, s.top_logprobs)]) for s in samples]
    wanted: list[Any] = [(r.token_ids, r.score, [pytest.approx(e.top[0][1]) for e in r.logprobs]) for r in found]
    return told == wanted


def _first(top: pb.TopLogprobs) -> pb.TopLogprob:
    return top.tokens[0]


def test_a_search_over_a_port_answers_what_the_engine_finds_whole_and_as_last_chunks(
    gpt2: Path, found: list[Result]
) -> None:
    async def main() -> None:
        engine = engine_of(gpt2)
        async with serving_model(engine, codec_of(tokenizer_of(gpt2))) as (client, _):
            (result,) = (await client.generate([IDS], **FIELDS)).results
            assert same(result.samples, found)
            assert result.samples[0].text == tokenizer_of(gpt2).decode(found[0].token_ids)
            assert result.used.sampling.beam == pb.Beam(**DIVERSE) and result.used.sampling.no_repeat_ngram_size == 2
            chunks = [chunk async for chunk in client.stream([IDS], **FIELDS)]
            assert [chunk.sample_index for chunk in chunks] == [0, 1, 2], "one for each sequence, at the end"
            assert all(chunk.finish_reason for chunk in chunks)
            assert [(list(c.token_ids), c.score) for c in chunks] == [(r.token_ids, r.score) for r in found]
            load = await client.load()
            assert load.kv_blocks_free == load.kv_blocks_total

    run(main())


def test_a_search_goes_on_over_an_engine_that_dies_and_leaves_nothing_when_its_client_does(
    gpt2: Path, found: list[Result]
) -> None:
    async def main() -> None:
        first = engine_of(gpt2)
        first.steps_left = 5  # type: ignore[attr-defined]
        async with serving_model(first) as (client, frontend):
            asked = asyncio.create_task(client.generate([IDS, IDS], **FIELDS))
            await until(lambda: frontend.state is State.RECOVERING)
            second = engine_of(gpt2)
            await frontend.reattach(LocalLink(second))
            assert all(same(result.samples, found) for result in (await asked).results)
            long = {**FIELDS, "stopping": {"max_new_tokens": 200, "ignore_eos": True}}
            left = asyncio.create_task(client.generate([IDS], **long))
            await until(lambda: second.load().running == 4)
            left.cancel()
            await until(lambda: second.idle and frontend.num_open == 0)
            load = second.load()
            assert load.kv_blocks_free == load.kv_blocks_total

    run(main())


def test_best_of_shows_the_likeliest_samples_cut_where_stop_strings_cut_them(gpt2: Path) -> None:
    async def main() -> None:
        async with serving_model(engine_of(gpt2), codec_of(tokenizer_of(gpt2))) as (client, frontend):
            stopping = {"max_new_tokens": 40, "stop_sequences": ["en", "ma"], "ignore_eos": True}
            six: dict[str, Any] = {"sampling": {"seed": 9, "n": 6}, "stopping": stopping, "response": {"logprobs": 0}}
            two: dict[str, Any] = {"sampling": {"seed": 9, "n": 2, "best_of": 6}, "stopping": stopping}
            (everything,) = (await client.generate([TEXT], **six)).results
            assert any(sample.stop_sequence for sample in everything.samples), "some were cut"
            means = sorted(((sum(s.logprobs) / len(s.logprobs), s.text) for s in everything.samples), reverse=True)
            (best,) = (await client.generate([TEXT], **two)).results
            assert [sample.text for sample in best.samples] == [text for _, text in means[:2]]
            assert [s.score for s in best.samples] == pytest.approx([mean for mean, _ in means[:2]], rel=1e-6)
            assert [s.index for s in best.samples] == [0, 1] and not best.samples[0].logprobs
            assert best.prompt_tokens == everything.prompt_tokens
            chunks = [chunk async for chunk in client.stream([TEXT], **two)]
            assert [(c.sample_index, c.text) for c in chunks] == [(s.index, s.text) for s in best.samples]
            assert frontend.num_open == 0
        mortal = engine_of(gpt2)
        mortal.steps_left = 2  # type: ignore[attr-defined]
        async with serving_model(mortal, codec_of(tokenizer_of(gpt2))) as (client, frontend):
            asked = asyncio.create_task(client.generate([TEXT], **two))
            await until(lambda: frontend.state is State.RECOVERING)
            await frontend.reattach(LocalLink(engine_of(gpt2)))
            again = (await asked).results[0].samples
            assert [(s.text, s.score) for s in again] == [(s.text, s.score) for s in best.samples]

    run(main())


def test_a_hole_is_filled_as_transformers_continues_the_same_tokens_in_both_orders(gpt2: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(gpt2)
    config = transformers.GPTBigCodeConfig(
        vocab_size=50260, n_embd=32, n_layer=2, n_head=4, n_positions=128, tie_word_embeddings=False
    )
    torch.manual_seed(1)
    model = transformers.GPTBigCodeForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    marks = {"<fim_prefix>": 50257, "<fim_middle>": 50258, "<fim_suffix>": 50259}
    add_tokens(gpt2 / "tokenizer.json", tmp_path / "tokenizer.json", marks)
    before, after = tokenizer.encode("def f(x):\n"), tokenizer.encode("\n    return y")
    orders = {
        "FIM_PREFIX_FIRST": [50257, *before, 50259, *after, 50258],
        "FIM_SUFFIX_FIRST": [50257, 50259, *after, 50258, *before],
    }

    async def main() -> None:
        async with serving_model(engine_of(tmp_path), codec_of(tokenizer_of(tmp_path))) as (client, _):
            for order, ids in orders.items():
                hole = pb.Prompt(fim={"prefix": "def f(x):\n", "suffix": "\n    return y", "order": order})
                (result,) = (
                    await client.generate(
                        [hole], sampling={"temperature": 0.0}, stopping={"max_new_tokens": 8, "ignore_eos": True}
                    )
                ).results
                given = torch.tensor([ids])
                wanted = model.generate(
                    given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=8,
                    eos_token_id=50261, pad_token_id=0,
                )  # fmt: skip
                assert list(result.samples[0].token_ids) == wanted[0, len(ids) :].tolist()

    run(main())


def add_tokens(source: Path, target: Path, marks: dict[str, int]) -> None:
    """The tokenizer with special tokens more."""
    from tokenizers import AddedToken, Tokenizer

    made = Tokenizer.from_file(str(source))
    made.add_special_tokens([AddedToken(text, special=True) for text in marks])
    assert {text: made.token_to_id(text) for text in marks} == marks
    made.save(str(target))

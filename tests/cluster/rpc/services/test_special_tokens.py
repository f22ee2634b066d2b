"""Special tokens and ids at the edges of a vocabulary, the whole way: gRPC, front-end, engine, real tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cluster.engine.request import FinishReason
from cluster.frontend.output.output_text import codec_of
from tests.cluster.frontend.harness import run
from tests.cluster.rpc.services.test_real_model import engine_of, serving_model
from tests.outside.files import tokenizer_cases
from tp_decoders.client.errors import ServiceError
from tp_decoders.protocol import inference_pb2 as pb
from tp_decoders.text.tokenizer import Tokenizer, load_tokenizer

NEUTRAL: dict[str, Any] = {key: values[0] for key, values in tokenizer_cases.CHOICES.items()}
FIM = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
ADDED = ("<|end|>", "<|turn|>", *FIM)
PADDED = 8
"""Rows of the model's vocabulary beyond the tokenizer's."""
BEYOND = ("<|a|>", "<|b|>")
"""Tokens of the tokenizer that the model has no row for, in the folder `larger`."""


def write(folder: Path, rows: int, texts: tuple[str, ...]) -> Path:
    """A tiny GPT-2 whose tokenizer puts a first token before every text."""
    tokenizer_cases.write_folder(folder, "gpt2", {**NEUTRAL, "template": True, "named": "text"})
    path = folder / "tokenizer.json"
    pipeline = json.loads(path.read_text())
    size = len(pipeline["model"]["vocab"])
    pipeline["added_tokens"] += [
        {"id": size + i, "content": text, **tokenizer_cases.PLAIN} for i, text in enumerate(texts)
    ]
    path.write_text(json.dumps(pipeline))
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=4, n_positions=128, vocab_size=size + rows, eos_token_id=50256
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("padded") / "model", len(ADDED) + PADDED, ADDED)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("larger") / "model", 0, BEYOND)


def opened(folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stop", ["<|end|>", "<|end|><|end|>", "<|turn|>", "no such"])
def test_a_special_token_as_stop_string_stops_streamed_and_whole(stop: str, include: bool, padded: Path) -> None:
    async def main() -> None:
        tokenizer = opened(padded)
        end = tokenizer.encode("<|end|>", add_special_tokens=False)
        fields: dict[str, Any] = {
            "sampling": {"temperature": 0.0, "logit_bias": {end[0]: 1000.0}},
            "stopping": {"max_new_tokens": 6, "stop_sequences": [stop], "include_stop_sequence": include},
        }
        async with serving_model(engine_of(padded, kv_blocks=64), codec_of(tokenizer)) as (client, _):
            answer = await client.generate(["hello"], **fields)
            (sample,) = answer.results[0].samples
            stops = stop.startswith("<|end|>")
            assert len(sample.token_ids) == (stop.count("<|end|>") if stops else 6)
            assert sample.text == (stop if stops and include else "")
            assert sample.stop_sequence == (stop if stops else "")
            wanted = pb.FINISH_REASON_STOP if stops else pb.FINISH_REASON_LENGTH
            assert sample.finish_reason == wanted
            chunks = [chunk async for chunk in client.stream(["hello"], **fields)]
            assert "".join(chunk.text for chunk in chunks) == sample.text
            assert [i for chunk in chunks for i in chunk.token_ids] == list(sample.token_ids)
            assert (chunks[-1].finish_reason, chunks[-1].stop_sequence) == (wanted, sample.stop_sequence)

    run(main())


def test_the_first_token_is_put_before_texts_and_never_into_parts(padded: Path) -> None:
    async def main() -> None:
        tokenizer = opened(padded)
        (first,) = tokenizer.first_ids
        hello = tokenizer.encode("hello", add_special_tokens=False)
        prefix, suffix, middle = (tokenizer.vocabulary.find(text) for text in FIM)
        async with serving_model(engine_of(padded, kv_blocks=64), codec_of(tokenizer)) as (client, _):
            hole = pb.Prompt(fim=pb.FillInMiddle(prefix="hello", suffix="hello"))
            answer = await client.generate(
                ["hello", f"{tokenizer_cases.END}hello", hole],
                sampling={"temperature": 0.0}, stopping={"max_new_tokens": 1}, response={"echo": True},
            )  # fmt: skip
            text, spelled, filled = (list(result.prompt_token_ids) for result in answer.results)
            assert text == spelled == [first, *hello]
            assert filled == [first, prefix, *hello, suffix, *hello, middle]
            word = tokenizer.encode(" London", add_special_tokens=False)
            answer = await client.generate(
                ["I live in"],
                sampling={"temperature": 0.0, "logit_bias": dict.fromkeys(word, 1000.0), "bad_words": ["London"]},
                stopping={"max_new_tokens": 3 * len(word)},
            )
            ids = list(answer.results[0].samples[0].token_ids)
            assert all(ids[at : at + len(word)] != word for at in range(len(ids)))

    run(main())


def test_rows_beyond_the_tokenizer_are_written_as_nothing(padded: Path) -> None:
    async def main() -> None:
        tokenizer = opened(padded)
        beyond = tokenizer.vocab_size + PADDED - 1
        fields: dict[str, Any] = {
            "sampling": {"temperature": 0.0, "logit_bias": {beyond: 1000.0}},
            "stopping": {"max_new_tokens": 3},
            "response": {"token_bytes": True, "echo": True},
        }
        async with serving_model(engine_of(padded, kv_blocks=64), codec_of(tokenizer)) as (client, _):
            answer = await client.generate([[beyond, *tokenizer.encode("a", False)]], **fields)
            (sample,) = answer.results[0].samples
            assert (list(sample.token_ids), list(sample.token_bytes), sample.text) == ([beyond] * 3, [b""] * 3, "a")
            found = await client.detokenize([[beyond, beyond]])
            assert [result.text for result in found.results] == [""]

    run(main())


def test_ids_that_the_model_does_not_have_are_refused_at_every_method(padded: Path) -> None:
    async def main() -> None:
        tokenizer = opened(padded)
        size = tokenizer.vocab_size + PADDED
        async with serving_model(engine_of(padded, kv_blocks=64), codec_of(tokenizer)) as (client, _):
            stopping = {"max_new_tokens": 1}
            for field, sampling, more in (
                ("sampling.logit_bias", {"logit_bias": {size: 1.0}}, {}),
                ("sampling.allowed_token_ids", {"allowed_token_ids": [size]}, {}),
                ("sampling.bad_words", {"bad_word_ids": [{"ids": [size]}]}, {}),
                ("stopping.stop_token_ids", {}, {"stop_token_ids": [size]}),
            ):
                with pytest.raises(ServiceError, match=field):
                    await client.generate([[1]], sampling=sampling, stopping=stopping | more)
            for ids in ([1, size], [1, 2**32 - 1]):
                answers: list[Any] = [
                    await client.generate([[1, 2], ids], stopping=stopping),
                    await client.score([[1, 2], ids]),
                    await client.embed([[1, 2], ids]),
                    await client.detokenize([[1, 2], ids]),
                ]
                for answer in answers:
                    good, bad = answer.results
                    assert good.status.code == 0
                    assert f"[1]: {ids[1]} is not a token id" in bad.status.message

    run(main())


def test_a_text_with_tokens_that_the_model_does_not_have_is_refused_with_the_token(larger: Path) -> None:
    async def main() -> None:
        async with serving_model(engine_of(larger, kv_blocks=64), codec_of(opened(larger))) as (client, _):
            stopping = {"max_new_tokens": 1}
            answer = await client.generate(["a", "x<|b|>y"], stopping=stopping)
            assert [result.status.code for result in answer.results] == [0, 3]
            assert "prompts[1]: holds '<|b|>'" in answer.results[1].status.message
            with pytest.raises(ServiceError, match=r"sampling.bad_words: holds '<\|a\|>'"):
                await client.generate(["a"], sampling={"bad_words": ["<|a|>"]}, stopping=stopping)

    run(main())


@pytest.mark.parametrize("beam", [None, {"width": 3}])
def test_an_end_of_text_that_the_vocabulary_does_not_have_is_ignored(
    beam: dict[str, Any] | None, padded: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from cluster.engine.engine import generate
    from cluster.engine.engine_builder import build_engine, build_runner
    from cluster.engine.engine_config import EngineConfig
    from cluster.engine.request import BeamParams, Request, SamplingParams, StoppingCriteria
    from tp_decoders import load
    from tp_decoders.text.tokenizer import eos_token_ids

    request = Request(
        request_id="r", token_ids=(5, 9, 3), stopping=StoppingCriteria(max_new_tokens=8, min_new_tokens=4),
        sampling=SamplingParams(temperature=0.0, beam=BeamParams(**beam) if beam else None),
    )  # fmt: skip
    found = []
    for ends in (eos_token_ids(padded), (-1, 50256, 2**40), ()):
        config = EngineConfig(kv_blocks=64)
        engine = build_engine(build_runner(load(padded), config, 1 << 28), config, ends)
        assert engine.limits.eos_token_ids == ()
        found.append(generate(engine, [request])[0][0])
    assert found[0].token_ids == found[1].token_ids == found[2].token_ids
    assert found[0].finish_reason is FinishReason.LENGTH
    assert sum("is not in its vocabulary" in record.message for record in caplog.records) == 2

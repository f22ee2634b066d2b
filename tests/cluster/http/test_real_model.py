"""A tiny model over both protocols: the same prompt has the same tokens and, to the last bit, log-probabilities; a
score as lm-eval asks for it is the score that gRPC gives.
"""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cluster.engine.engine import Engine
from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.frontend.frontend import Frontend
from cluster.frontend.output.output_text import codec_of
from cluster.link.local_link import LocalLink
from tests.cluster.frontend.harness import run
from tests.cluster.http.harness import Http, http_over
from tp_decoders import load
from tp_decoders.text.tokenizer import load_tokenizer

TOKENIZER = Path(__file__).resolve().parents[2] / "data" / "tokenizers" / "gpt2" / "tokenizer.json"
TEXT = "Einen schönen Tag, 日本 and the rest."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random GPT-2 with the real GPT-2 tokenizer."""
    folder = tmp_path_factory.mktemp("gpt2")
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, tie_word_embeddings=False)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    shutil.copy(TOKENIZER, folder)
    return folder


@pytest.fixture(scope="module")
def over_model(folder: Path) -> Callable[[Callable[[Http], Awaitable[None]]], None]:
    config = EngineConfig(kv_blocks=64)

    def over(test: Callable[[Http], Awaitable[None]]) -> None:
        async def main() -> None:
            engine: Engine = build_engine(build_runner(load(folder), config, 1 << 28), config)
            frontend = Frontend(LocalLink(engine), codec=codec_of(load_tokenizer(folder)))
            frontend.start()
            try:
                async with http_over(frontend) as http:
                    await test(http)
            finally:
                await frontend.close()

        run(main())

    return over


def test_the_same_prompt_is_the_same_over_grpc_and_http(over_model: Any) -> None:
    async def test(http: Http) -> None:
        (told,) = (
            await http.grpc.generate(
                [TEXT],
                sampling={"seed": 7, "n": 2, "top_p": 0.9, "temperature": 0.8},
                stopping={"max_new_tokens": 24},
                response={"logprobs": 2},
            )
        ).results
        body: dict[str, Any] = {"seed": 7, "n": 2, "top_p": 0.9, "temperature": 0.8, "max_tokens": 24, "logprobs": 2}
        found = (await http.complete(TEXT, return_token_ids=True, **body)).json
        for sample, choice in zip(told.samples, found["choices"], strict=True):
            assert choice["text"] == sample.text
            assert choice["token_ids"] == list(sample.token_ids)
            assert choice["logprobs"]["token_logprobs"] == list(sample.logprobs)
            assert choice["finish_reason"] == "length"
            for top, named in zip(sample.top_logprobs, choice["logprobs"]["top_logprobs"], strict=True):
                assert {entry.logprob for entry in top.tokens} <= set(named.values())
        stream = (await http.complete(TEXT, stream=True, return_token_ids=True, **body)).events
        for choice in found["choices"]:
            parts = [e["choices"][0] for e in stream if e["choices"][0]["index"] == choice["index"]]
            assert "".join(part["text"] for part in parts) == choice["text"]
            for name in ("token_logprobs", "tokens", "top_logprobs"):
                streamed = [v for part in parts for v in (part["logprobs"] or {name: []})[name]]
                assert streamed == choice["logprobs"][name]

    over_model(test)


def test_a_score_as_lm_eval_asks_for_it_is_that_of_grpc(over_model: Any) -> None:
    async def test(http: Http) -> None:
        rows = [[464, 3797, 318, 257], [50256, 11, 13, 15, 17, 19], [162, 245, 98, 43266, 105]]
        told = (await http.grpc.score(rows)).results
        body = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
        found = (await http.complete(rows, **body)).json["choices"]
        for row, score, choice in zip(rows, told, found, strict=True):
            logprobs = choice["logprobs"]
            assert len(logprobs["tokens"]) == len(row) + 1, "the prompt and one more"
            assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
            assert logprobs["token_logprobs"][1:-1] == list(score.logprobs)
            told_of = (logprobs[name][1:] for name in ("tokens", "token_logprobs", "top_logprobs"))
            for name, value, top in zip(*told_of, strict=True):
                assert name in top and max(top.values()) >= value
        only = (await http.complete(rows, **{**body, "max_tokens": 0})).json["choices"]
        for choice, whole in zip(only, found, strict=True):
            for name in ("tokens", "token_logprobs", "top_logprobs"):
                assert choice["logprobs"][name] == whole["logprobs"][name][:-1]
            assert whole["text"].startswith(choice["text"])

    over_model(test)


def test_the_token_that_ends_an_answer_is_counted_and_has_its_log_probability(over_model: Any) -> None:
    async def test(http: Http) -> None:
        body: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "logprobs": 0, "return_token_ids": True}
        (free,) = (await http.complete(TEXT, **body)).json["choices"]
        last = free["token_ids"][3]
        (ended,) = (await http.complete(TEXT, **body, stop_token_ids=[last])).json["choices"]
        length = free["token_ids"].index(last) + 1
        assert ended["token_ids"] == free["token_ids"][:length]
        assert ended["logprobs"]["token_logprobs"] == free["logprobs"]["token_logprobs"][:length]
        assert (ended["finish_reason"], ended["stop_reason"]) == ("stop", last)

    over_model(test)


def test_embeddings_are_those_of_grpc_as_numbers_and_as_base64(over_model: Any) -> None:
    async def test(http: Http) -> None:
        import base64
        import struct

        (plain, other) = (await http.post("/v1/embeddings", {"input": [TEXT, "x"]})).json["data"]
        packed = (await http.post("/v1/embeddings", {"input": TEXT, "encoding_format": "base64"})).json["data"][0]
        assert list(struct.unpack("<32f", base64.b64decode(packed["embedding"]))) == plain["embedding"]
        assert abs(sum(v * v for v in plain["embedding"]) - 1) < 1e-5 and other["index"] == 1

    over_model(test)


def test_special_tokens_before_a_text_are_the_callers_choice(over_model: Any) -> None:
    async def test(http: Http) -> None:
        body = {"max_tokens": 1, "return_token_ids": True, "add_special_tokens": False}
        (choice,) = (await http.complete("The cat", **body)).json["choices"]
        assert choice["prompt_token_ids"] == [464, 3797]
        (one,) = (await http.complete([464, 3797], prompt_logprobs=1, max_tokens=1)).json["choices"]
        assert one["prompt_logprobs"][0] is None and "3797" in one["prompt_logprobs"][1]

    over_model(test)

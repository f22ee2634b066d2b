"""Grammars over HTTP and gRPC, a tiny model with a real tokenizer: the same valid answers, and refusals in words."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import pytest

from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.frontend.frontend import Frontend
from cluster.frontend.output.output_text import codec_of
from cluster.link.local_link import LocalLink
from tests.cluster.engine.guided.guided_cases import DATE, PERSON
from tests.cluster.engine.tiny_models import save_tiny
from tests.cluster.frontend.harness import run
from tests.cluster.http.harness import Http, http_over
from tests.cluster.http.test_real_model import TOKENIZER
from tp_decoders import load
from tp_decoders.client.errors import ServiceError
from tp_decoders.text.token_table import token_table
from tp_decoders.text.tokenizer import load_tokenizer

END = 50256


@pytest.fixture(scope="module")
def over_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[Http], Awaitable[None]]], None]:
    folder = save_tiny("gpt2", tmp_path_factory.mktemp("gpt2"), vocab_size=END + 1, eos_token_id=END, n_positions=256)
    (folder / "tokenizer.json").write_bytes(Path(TOKENIZER).read_bytes())
    config, tokenizer = EngineConfig(kv_blocks=64), load_tokenizer(folder)
    assert tokenizer is not None

    def over(test: Callable[[Http], Awaitable[None]]) -> None:
        async def main() -> None:
            runner = build_runner(load(folder), config, 0)
            engine = build_engine(runner, config, (END,), tables=lambda size, ends: token_table(tokenizer, size, ends))
            frontend = Frontend(LocalLink(engine), codec=codec_of(tokenizer))
            frontend.start()
            try:
                async with http_over(frontend) as http:
                    await test(http)
            finally:
                await frontend.close()

        run(main())

    return over


def test_every_kind_of_grammar_is_followed_over_both_protocols(over_model: Any) -> None:
    async def test(http: Http) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
        told: list[tuple[dict[str, Any], dict[str, Any]]] = [
            ({"response_format": form}, {"json": json.dumps(PERSON)}),
            ({"structured_outputs": {"json": PERSON}}, {"json": json.dumps(PERSON)}),
            ({"structured_outputs": {"regex": DATE}}, {"regex": DATE}),
            ({"structured_outputs": {"choice": ["ja", "nein", "vielleicht 日本"]}},
             {"choice": {"texts": ["ja", "nein", "vielleicht 日本"]}}),
            ({"structured_outputs": {"grammar": 'start: "(" start ")" | /[a-c]{2}/'}},
             {"grammar": 'start: "(" start ")" | /[a-c]{2}/'}),
            ({"structured_outputs": {"json": PERSON, "disable_any_whitespace": True}},
             {"json": json.dumps(PERSON), "disable_any_whitespace": True}),
        ]  # fmt: skip
        texts = []
        for seed, (body, guide) in enumerate(told):
            found = (await http.complete("The cat", seed=seed, max_tokens=200, **body)).json["choices"][0]
            answer = await http.grpc.generate(
                ["The cat"],
                sampling={"seed": seed, "structured_outputs": guide},
                stopping={"max_new_tokens": 200},
            )
            assert found["text"] == answer.results[0].samples[0].text
            assert found["finish_reason"] == "stop", found
            texts.append(found["text"])
        for text in (*texts[:2], texts[5]):
            jsonschema.validate(json.loads(text), PERSON)
        assert re.fullmatch(DATE, texts[2]) and texts[3] in ("ja", "nein", "vielleicht 日本")
        assert re.fullmatch(r"\(*[a-c]{2}\)*", texts[4])

    over_model(test)


def test_a_chat_and_its_stream_follow_a_schema_too(over_model: Any) -> None:
    async def test(http: Http) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
        body: dict[str, Any] = {"seed": 3, "max_tokens": 200, "response_format": form}
        whole = (await http.chat("Hello", **body)).json["choices"][0]
        jsonschema.validate(json.loads(whole["message"]["content"]), PERSON)
        events = (await http.chat("Hello", stream=True, **body)).events
        streamed = "".join(e["choices"][0]["delta"].get("content") or "" for e in events)
        assert streamed == whole["message"]["content"]
        loose = (await http.chat("Hello", seed=1, max_tokens=200, response_format={"type": "json_object"})).json
        assert loose["choices"][0]["message"]["content"].startswith("{")
        tops = (await http.complete("a", max_tokens=1, logprobs=5, structured_outputs={"choice": ["yes"]})).text
        assert "Infinity" not in tops and json.loads(tops)["choices"][0]["text"] in ("y", "ye", "yes")

    over_model(test)


def test_a_grammar_that_cannot_be_followed_is_told_in_both(over_model: Any) -> None:
    async def test(http: Http) -> None:
        wrong = await http.complete("a", structured_outputs={"regex": "(a"})
        assert wrong.status == 400 and "unclosed group" in wrong.error["message"]
        assert wrong.error["param"] == "regex"
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objct"}}}
        wrong = await http.chat("a", response_format=form)
        assert wrong.status == 400 and "objct" in wrong.error["message"]
        for given, words in (({"regex": "(a"}, "unclosed"), ({}, "give one of"), ({"regex": "a" * 200_000}, "131072")):
            with pytest.raises(ServiceError) as refused:
                await http.grpc.generate(["a"], sampling={"structured_outputs": given})
            assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT and words in str(refused.value)
        assert (await http.frontend.load()).guided_requests == 0

    over_model(test)

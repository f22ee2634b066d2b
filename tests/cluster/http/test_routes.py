"""Every route over a fake engine: what comes back, what is refused and how, what an open stream does."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import pytest

from cluster.frontend.frontend import State
from cluster.rpc.services.connection_limits import ServerLimits
from tests.cluster.frontend.fakes import CODEC, ENDLESS, LASTING, LIMITS, FakeEngine
from tests.cluster.frontend.harness import run, serving, until
from tests.cluster.http.harness import NAME, Http, http_over

LONG = 1 << 20
"""Tokens that take longer than any test, and still fit one message."""


def over_fake(test: Any, engine: FakeEngine | None = None, **more: Any) -> None:
    async def main() -> None:
        async with serving(engine or FakeEngine()) as frontend, http_over(frontend, **more) as http:
            await test(http)

    run(main())


def test_small_routes_say_what_is_served() -> None:
    async def test(http: Http) -> None:
        (card,) = (await http.get("/v1/models")).json["data"]
        assert card["id"] == NAME and card["max_model_len"] == LIMITS.max_context
        assert (await http.get(f"/v1/models/{NAME}")).json == card
        health = await http.get("/health")
        assert (health.status, health.text) == (200, "")
        assert (await http.get("/health", "HEAD")).status == 200
        assert set((await http.get("/version")).json) == {"version"}
        assert (await http.get("/tokenizer_info")).json["eos_token"] == "x"
        assert (await http.get("/metrics")).text == "accept */*"
        tokens = (await http.post("/tokenize", {"prompt": "abcé", "return_token_strs": True})).json
        assert tokens == {"count": 2, "max_model_len": 256, "tokens": [6, 10], "token_strs": ["abc", "é"]}
        assert (await http.post("/detokenize", {"tokens": [6, 10]})).json == {"prompt": "abcé"}
        assert (await http.post("/tokenize", {"messages": [{"role": "user", "content": "x"}]})).json["count"] == 3

    over_fake(test, metrics=lambda accept: (f"accept {accept}".encode(), "text/plain"))


def test_the_four_forms_of_prompts_and_indexes_over_the_whole_call() -> None:
    async def test(http: Http) -> None:
        one = await http.complete("abc", n=2, seed=3, max_tokens=5)
        assert (await http.complete([6], n=2, seed=3, max_tokens=5)).json["choices"] == one.json["choices"]
        many = (await http.complete([[6], [0]], n=2, seed=3, max_tokens=5)).json
        assert [choice["index"] for choice in many["choices"]] == [0, 1, 2, 3]
        assert many["choices"][:2] == one.json["choices"]
        assert (await http.complete(["abc", "a"], n=2, seed=3, max_tokens=5)).json["choices"] == many["choices"]
        assert many["usage"] == {"prompt_tokens": 2, "completion_tokens": 20, "total_tokens": 22}
        assert (
            len((await http.complete("abc", max_tokens=None, return_token_ids=True)).json["choices"][0]["token_ids"])
            == 16
        )

    over_fake(test)


def test_a_stream_is_the_whole_answer_in_pieces_with_usage_at_its_end() -> None:
    async def test(http: Http) -> None:
        body: dict[str, Any] = {"n": 3, "seed": 5, "max_tokens": 40, "return_token_ids": True}
        whole = (await http.complete(["abc", "日"], **body)).json
        stream = await http.complete(["abc", "日"], stream=True, stream_options={"include_usage": True}, **body)
        assert stream.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert stream.headers["X-Accel-Buffering"] == "no"
        *events, usage = stream.events
        assert usage["choices"] == [] and usage["usage"] == whole["usage"]
        for choice in whole["choices"]:
            parts = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
            assert "".join(part["text"] for part in parts) == choice["text"]
            assert [i for part in parts for i in part["token_ids"]] == choice["token_ids"]
            assert parts[0]["prompt_token_ids"] == choice["prompt_token_ids"]
            assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
        assert {event["system_fingerprint"] for event in events} == {whole["system_fingerprint"]}

    over_fake(test)


def test_chat_goes_through_the_template_whole_and_streamed() -> None:
    async def test(http: Http) -> None:
        body: dict[str, Any] = {"seed": 5, "max_completion_tokens": 12, "logprobs": True, "top_logprobs": 2}
        whole = (await http.chat("abc", "x", **body)).json
        text = "abc\nx\nab"
        plain = (await http.complete(text, seed=5, max_tokens=12)).json
        (choice,) = whole["choices"]
        assert choice["message"]["content"] == plain["choices"][0]["text"]
        assert len(choice["logprobs"]["content"]) == 12
        first, *events = (await http.chat("abc", "x", stream=True, **body)).events
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(e["choices"][0]["delta"]["content"] for e in events) == choice["message"]["content"]
        told = [entry for e in events for entry in (e["choices"][0]["logprobs"] or {"content": []})["content"]]
        assert told == choice["logprobs"]["content"]
        parts = {"role": "user", "content": [{"type": "text", "text": "abc"}]}
        assert (await http.post("/v1/chat/completions", {"messages": [parts]})).status == 200
        refused = await http.post("/v1/chat/completions", {"messages": [{"role": "tool", "content": ""}]})
        assert refused.status == 400 and "no tools" in refused.error["message"]

    over_fake(test)


def test_a_base_model_has_no_template_and_says_so() -> None:
    async def test(http: Http) -> None:
        refused = await http.chat("abc")
        assert refused.status == 400 and "--chat-template" in refused.error["message"]

    over_fake(test, template=None)


WRONG: list[tuple[dict[str, Any], str | None, str]] = [
    ({"prompt": []}, "prompt", "none given"),
    ({"prompt": ""}, "prompt", "0 tokens"),
    ({"prompt": [99]}, "prompt", "99 is not a token id"),
    ({"prompt": [[1, "a"]]}, "prompt", "neither text"),
    ({"prompt": [1] * 300}, "prompt", "too long"),
    ({"max_tokens": "5"}, "max_tokens", "give a whole number"),
    ({"max_tokens": 0}, "max_tokens", "0 is not allowed"),
    ({"temperature": -1}, "temperature", "is not allowed"),
    ({"temperature": True}, "temperature", "give a number"),
    ({"logprobs": True}, "logprobs", "which is for chat"),
    ({"logprobs": "5"}, "logprobs", "give a whole number"),
    ({"n": 0}, "n", "give a whole number"),
    ({"stop": [1]}, "stop", "a list of texts"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "no token id"),
    ({"logit_bias": {"99": 1}}, "logit_bias", "99"),
    ({"stream_options": {}, "stream": None, "stop": None}, None, ""),
    ({"stream_options": {"include_usage": True}}, "stream_options", "add stream"),
    ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "json_schema",
        "schema",
    ),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "give one of"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag", "not served"),
    ({"structured_outputs": {"choice": []}}, "choice", "no list of at least one text"),
    ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos", "structured_outputs"),
    ({"guided_json": {"type": "object"}}, "guided_json", "structured_outputs: {json}"),
    ({"tools": [{"type": "function"}]}, "tools", "not served"),
    ({"suffix": "b"}, "prompt", "fill-in-the-middle"),
    ({"echo": True, "logprobs": 1, "stream": True}, "stream", "not streamed"),
    ({"seed": 1e99}, "seed", "give a whole number"),
]


def test_what_is_wrong_is_400_in_openais_shape_and_what_means_nothing_is_ignored() -> None:
    async def test(http: Http) -> None:
        for body, param, words in WRONG:
            found = await http.post("/v1/completions", {"prompt": "abc", "max_tokens": 2, **body})
            if param is None:
                assert found.status == 200, found.text
                continue
            assert found.status == 400, (body, found.text)
            assert found.error["param"] == param and words in found.error["message"], (body, found.text)
            assert found.error["type"] == "invalid_request_error"
        long = await http.complete([1] * 300)
        assert long.error["code"] == "context_length_exceeded"
        tolerated = {"user": "u", "store": False, "logit_bias": {}, "tools": [], "what": 1, "stop": ["", "zz"]}
        assert (await http.complete("abc", **tolerated)).status == 200
        for raw, words in (
            (b"{", "is not JSON"), (b"[]", "give an object"), (b'{"prompt": "a", "temperature": NaN}', "NaN"),
            (b'{"prompt": "a", "prompt": "b"}', "given twice"), (b"[" * 100_000, "nested too deeply"),
            (b'{"n": ' + b"9" * 5000 + b"}", "is not JSON"), (b'{"prompt": "\\ud800"}', "lone surrogate"),
            (b"\xff", "is not JSON"),
        ):  # fmt: skip
            found = await http.post("/v1/completions", raw)
            assert found.status == 400 and words in found.error["message"], (raw[:40], found.text)

    over_fake(test)


def test_other_refusals_have_their_codes() -> None:
    async def test(http: Http) -> None:
        assert (await http.post("/v1/completions", {"prompt": "a", "model": "gpt-4"})).error[
            "code"
        ] == "model_not_found"
        assert (await http.post("/v1/responses", {})).status == 404
        wrong = await http.get("/v1/completions")
        assert wrong.status == 405 and wrong.headers["Allow"] == "POST, OPTIONS"
        options = await http.get("/v1/completions", "OPTIONS", headers={"Origin": "http://evil.example"})
        assert options.status == 204 and not [name for name in options.headers if "access-control" in name.lower()]
        plain = await http.post("/v1/completions", {"prompt": "a"}, Content_Type="text/plain")
        assert plain.status == 415
        assert (await http.post("/v1/completions", b"x" * 5000)).status == 413
        assert (await http.post("/v1/completions", {"prompt": "a"}, X_Request_Id="é")).status == 400

    over_fake(test, limits=ServerLimits(max_message_bytes=4096))


def test_a_full_server_is_429_and_a_draining_one_503_with_when_to_come_back() -> None:
    async def main() -> None:
        async with serving(FakeEngine(limits=ENDLESS), max_open_requests=1) as frontend, http_over(frontend) as http:
            body = {"prompt": "abc", "max_tokens": LASTING, "stream": True, "model": NAME}
            asked = asyncio.create_task(http.complete("abc", max_tokens=LASTING, stream=True))
            await until(lambda: frontend.num_open == 1)
            full = await http.post("/v1/completions", {**body, "stream": False})
            assert (
                full.status == 429 and full.headers["Retry-After"] == "1" and full.error["type"] == "rate_limit_error"
            )
            draining = asyncio.create_task(frontend.drain(0.5))
            await until(lambda: frontend.state is State.DRAINING)
            refused = await http.complete("abc")
            assert refused.status == 503 and refused.headers["Retry-After"] == "1"
            assert (await http.get("/health")).status == 503
            assert (await asked).events[-1]["choices"][0]["finish_reason"] == "abort"
            await draining

    run(main())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(stream: bool) -> None:
    async def test(http: Http) -> None:
        asked = asyncio.create_task(http.complete("abc", max_tokens=LONG, stream=stream))
        await until(lambda: http.frontend.num_open == 1)
        asked.cancel()
        await until(lambda: http.frontend.num_open == 0)

    over_fake(test, FakeEngine(limits=ENDLESS))


def test_an_open_request_id_is_409_and_ids_come_back() -> None:
    async def test(http: Http) -> None:
        asked = asyncio.create_task(
            http.post("/v1/completions", {"prompt": "abc", "max_tokens": LONG}, X_Request_Id="me")
        )
        await until(lambda: http.frontend.num_open == 1)
        assert (await http.post("/v1/completions", {"prompt": "abc"}, X_Request_Id="me")).status == 409
        http.frontend.abort(["me"])
        answer = await asked
        assert answer.headers["X-Request-Id"] == "me" and answer.json["id"] == "cmpl-me"

    over_fake(test, FakeEngine(limits=ENDLESS))


def test_a_fault_in_a_stream_is_its_last_event() -> None:
    async def test(http: Http) -> None:
        asked = asyncio.create_task(http.complete("abc", max_tokens=LASTING, stream=True))
        await until(lambda: http.frontend.num_open == 1)
        await asyncio.sleep(0.05)
        http.frontend.fail("rank 0 on here: killed")
        *_, last = (await asked).events
        assert last["error"]["code"] == "engine_fault" and "killed" in last["error"]["message"]

    over_fake(test, FakeEngine(limits=ENDLESS))


def test_hostile_bytes_end_their_connection_and_nothing_else() -> None:
    async def test(http: Http) -> None:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        slow, body, lines, garbage = await asyncio.gather(
            http.raw(b"POST /v1/comp"), http.raw(head + b"Content-Length: 99\r\n\r\n{"),
            http.raw(b"GET /health HTTP/1.1\r\n" + b"x: " + b"y" * 20_000 + b"\r\n\r\n"), http.raw(b"\0\1\2\r\n\r\n"),
        )  # fmt: skip
        assert slow == b"" and b" 408 " in body.split(b"\r\n")[0]
        assert b" 400 " in lines.split(b"\r\n")[0] and b" 400 " in garbage.split(b"\r\n")[0]
        twice = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" + b"GET /health HTTP/1.0\r\nHost: x\r\n\r\n"
        assert (await http.raw(twice)).count(b" 200 OK") == 2, "pipelined, on one connection"
        assert (await http.complete("abc")).status == 200

    over_fake(test, limits=ServerLimits(receive_seconds=0.5))


def test_a_packed_body_is_unpacked_within_its_limit_and_a_broken_one_is_400(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test(http: Http) -> None:
        body = json.dumps({"prompt": "abc", "max_tokens": 2}).encode()
        packed = {"Content_Encoding": "gzip"}
        assert (await http.post("/v1/completions", gzip.compress(body), **packed)).status == 200
        for broken in (body, gzip.compress(body)[4:]):
            answer = await http.post("/v1/completions", broken, **packed)
            assert (answer.status, answer.error["code"]) == (400, "invalid_body")
            assert "Content-Encoding" in answer.error["message"]
        bomb = gzip.compress(b" " * 3_000_000)
        assert len(bomb) < 10_000
        assert (await http.post("/v1/completions", bomb, **packed)).status == 413

    async def main() -> None:
        limits = ServerLimits(max_message_bytes=1_000_000)
        async with serving(FakeEngine()) as frontend, http_over(frontend, limits) as http:
            await test(http)

    run(main())
    assert not caplog.records, "a client's mistake is told to the client"


def test_pieces_of_characters_are_escaped_bytes_in_log_probabilities() -> None:
    async def test(http: Http) -> None:
        ids = [11, 12, 0]
        (choice,) = (await http.complete(ids, echo=True, logprobs=1, max_tokens=1)).json["choices"]
        told = choice["logprobs"]
        assert told["tokens"][:3] == ["bytes:\\xe6", "bytes:\\x97\\xa5", "a"]
        assert json.dumps(choice) and CODEC is not None

    over_fake(test)

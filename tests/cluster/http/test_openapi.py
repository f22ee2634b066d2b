"""/openapi.json says what there is: every path with its method, every field that is read, and answers as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from cluster.frontend.requests.call import FrontendConfig
from cluster.http.openapi import document
from cluster.http.requests.asked import IGNORED, REFUSED
from cluster.http.requests.chat_template import ChatTemplate
from cluster.http.requests.completion_fields import chat, chat_text, completion, embedding
from cluster.http.requests.json_body import Fields
from tests.cluster.frontend.fakes import FakeEngine
from tests.cluster.frontend.harness import run, serving
from tests.cluster.http.harness import NAME, TEMPLATE, Http, http_over

MESSAGES = [{"role": "user", "content": "abc"}]
BODIES: list[tuple[str, str, dict[str, Any]]] = [
    ("/v1/completions", "Completion", {"prompt": ["abc", "a"], "n": 2, "max_tokens": 3, "logprobs": 1, "echo": True}),
    ("/v1/completions", "Completion", {"prompt": [6], "prompt_logprobs": 1, "return_token_ids": True, "model": None}),
    ("/v1/chat/completions", "Chat", {"messages": MESSAGES, "max_tokens": 3, "logprobs": True, "top_logprobs": 1}),
    ("/tokenize", "Tokens", {"prompt": "abc", "return_token_strs": True}),
    ("/tokenize", "Tokens", {"messages": MESSAGES}),
    ("/v1/completions", "Error", {"prompt": []}),
    ("/v1/completions", "Error", {}),
    ("/v1/responses", "Error", {}),
]


def valid(whole: dict[str, Any], name: str, value: object) -> None:
    schema = {"$ref": f"#/components/schemas/{name}", "components": whole["components"]}
    jsonschema.Draft202012Validator(schema).validate(value)


def test_paths_and_methods_are_the_routes_and_answers_are_what_it_says() -> None:
    async def test(http: Http) -> None:
        whole = (await http.get("/openapi.json")).json
        assert f"/v1/models/{NAME}" in whole["paths"] and "/v1/models/MODEL" not in whole["paths"]
        for path, item in whole["paths"].items():
            (verb,) = item
            wrong = await http.get(path, "PUT")
            assert wrong.status == 405 and verb.upper() in wrong.headers["Allow"].split(", ")
        for path, name, body in BODIES:
            valid(whole, name, (await http.post(path, body)).json)
        for path, name in (("/v1/models", "Models"), (f"/v1/models/{NAME}", "Model"), ("/nowhere", "Error")):
            valid(whole, name, (await http.get(path)).json)
        assert len(whole["paths"]) == len(http.api.routes())

    async def main() -> None:
        async with serving(FakeEngine()) as frontend, http_over(frontend, metrics=lambda _: (b"", "")) as http:
            await test(http)

    run(main())


def _chat(fields: Fields) -> None:
    chat(fields, "")
    chat_text(fields, ChatTemplate(TEMPLATE, {}, "a test"))


class Watched(Fields):
    """Knows what was asked for."""

    @property
    def asked(self) -> set[str]:
        return self._asked


@pytest.mark.parametrize(
    ("name", "read", "body"),
    [
        (
            "CompletionRequest",
            lambda f: completion(f, "", FrontendConfig()),
            {"prompt": "a", "use_beam_search": True, "n": 2},
        ),
        ("ChatRequest", _chat, {"messages": MESSAGES, "use_beam_search": True, "n": 2}),
        ("EmbeddingRequest", lambda f: embedding(f, "", FrontendConfig()), {"input": "a"}),
    ],
)
def test_fields_are_those_that_are_read(name: str, read: Callable[[Fields], object], body: dict[str, Any]) -> None:
    fields = Watched(body)
    read(fields)
    named = set(document((), NAME, "")["components"]["schemas"][name]["properties"])
    of_route = {"model", "encoding_format", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"}
    unnamed = fields.asked - named - set(REFUSED) - IGNORED
    assert unnamed <= ({"suffix"} if name == "EmbeddingRequest" else set())
    assert named - fields.asked <= of_route

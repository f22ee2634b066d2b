"""The routes: a body becomes a call, one call of the front-end, its answer becomes JSON or events. No rule lives here.

Which role a route needs is that of the gRPC method of the same meaning.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.access.roles import METRICS, OPEN
from cluster.frontend.frontend import Frontend, State
from cluster.frontend.output.streams import Result, collect
from cluster.frontend.readiness import Readiness
from cluster.frontend.requests.call import Prompt
from cluster.frontend.requests.of_caller import of_caller, turn_of_caller
from cluster.http.exchange import Exchange
from cluster.http.http_errors import HttpError
from cluster.http.openapi import document
from cluster.http.replies.answers import Answers, Heading, embeddings, failed
from cluster.http.replies.events import Events
from cluster.http.requests.asked import Asked
from cluster.http.requests.completion_fields import chat, chat_text, completion, embedding
from cluster.http.requests.json_body import Fields, invalid
from cluster.http.served_model import ServedModel
from cluster.rpc.services.connection_limits import ServerLimits
from cluster.rpc.services.control_service import software_version
from parallel.errors import RequestError

Handler = Callable[[Exchange], Awaitable[None]]
Metrics = Callable[[str], tuple[bytes, str]]
"""The metrics for an Accept header, and their content type. Called beside the event loop."""
LARGE_ANSWER = 1024
"""Tokens, and alternatives of them, from which on an answer is rendered beside the event loop."""
INFERENCE, CONTROL = "/tp_decoders.v1.Inference/", "/tp_decoders.v1.Control/"


@dataclass(frozen=True)
class Route:
    """One path: its HTTP method, the gRPC method whose roles it needs, what answers it."""

    verb: str
    method: str
    handler: Handler

    @property
    def verbs(self) -> tuple[str, ...]:
        return ("GET", "HEAD", "OPTIONS") if self.verb == "GET" else (self.verb, "OPTIONS")


class Api:
    """What is answered where."""

    def __init__(
        self,
        frontend: Frontend,
        model: ServedModel,
        limits: ServerLimits,
        readiness: Readiness | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._frontend, self._model, self._limits = frontend, model, limits
        self._readiness, self._metrics = readiness, metrics

    def routes(self) -> Mapping[str, Route]:
        """By path."""
        found = {
            "/v1/completions": Route("POST", f"{INFERENCE}Generate", self.completions),
            "/v1/chat/completions": Route("POST", f"{INFERENCE}Generate", self.chat),
            "/v1/embeddings": Route("POST", f"{INFERENCE}Embed", self.embeddings),
            "/v1/models": Route("GET", f"{CONTROL}GetModelInfo", self.models),
            f"/v1/models/{self._model.name}": Route("GET", f"{CONTROL}GetModelInfo", self.model),
            "/tokenize": Route("POST", f"{INFERENCE}Tokenize", self.tokenize),
            "/detokenize": Route("POST", f"{INFERENCE}Detokenize", self.detokenize),
            "/tokenizer_info": Route("GET", f"{CONTROL}GetModelInfo", self.tokenizer_info),
            "/version": Route("GET", f"{CONTROL}GetServerInfo", self.version),
            "/openapi.json": Route("GET", f"{CONTROL}GetServerInfo", self.openapi),
            "/health": Route("GET", OPEN, self.health),
        }
        return found if self._metrics is None else {**found, METRICS: Route("GET", METRICS, self.metrics)}

    # ------------------------------------------------------------ text

    async def completions(self, exchange: Exchange) -> None:
        asked = completion(await self._fields(exchange), exchange.request_id, self._frontend.config)
        self._check_model(asked.model)
        await self._generate(exchange, await self._tokenized(asked), "cmpl")

    async def chat(self, exchange: Exchange) -> None:
        fields = await self._fields(exchange)
        asked = chat(fields, exchange.request_id)
        self._check_model(asked.model)
        text = await self._conversation(fields)
        (ids,) = await self._frontend.tokenize([text], turn_of_caller(), whole=asked.whole_texts)
        call = replace(asked.call, prompts=(Prompt(token_ids=ids),))
        await self._generate(exchange, replace(asked, call=call), "chatcmpl")

    async def embeddings(self, exchange: Exchange) -> None:
        fields = await self._fields(exchange)
        self._check_model(name := fields.text("model", None))
        packed, call = _packed(fields), embedding(fields, exchange.request_id, self._frontend.config)
        if fields.given("dimensions"):
            raise invalid("dimensions", "vectors are not cut; leave it out")
        stream = await self._frontend.open(of_caller(call, self._limits.max_message_bytes))
        results = await collect(stream, len(call.prompts))
        await self._send(exchange, lambda: embeddings(results, name or self._model.name, packed), len(results) * 1024)

    # ------------------------------------------------------------ tokens

    async def tokenize(self, exchange: Exchange) -> None:
        fields = await self._fields(exchange)
        self._check_model(fields.text("model", None))
        chats = fields.given("messages")
        text = await self._conversation(fields) if chats else fields.text("prompt", None)
        if text is None:
            raise invalid("prompt", "none given; give a text, or messages")
        whole, named = fields.flag("add_special_tokens", not chats), fields.flag("return_token_strs")
        (ids,) = await self._frontend.tokenize([text], turn_of_caller(), self._limits.max_message_bytes, whole)
        codec, most = self._frontend.codec, self._frontend.limits.max_context
        names = [codec.tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids] if named and codec else None
        answer = {"count": len(ids), "max_model_len": most, "tokens": list(ids), "token_strs": names}
        await self._send(exchange, lambda: answer, len(ids))

    async def detokenize(self, exchange: Exchange) -> None:
        fields = await self._fields(exchange)
        self._check_model(fields.text("model", None))
        ids = fields.ids("tokens")
        (text,) = await self._frontend.detokenize([ids], turn_of_caller(), self._limits.max_message_bytes)
        if isinstance(text, RequestError):
            raise text
        await self._send(exchange, lambda: {"prompt": text}, 1)

    # ------------------------------------------------------------ what is served, and how it is

    async def models(self, exchange: Exchange) -> None:
        await self._send(exchange, lambda: {"object": "list", "data": [self._card(exchange)]}, 1)

    async def model(self, exchange: Exchange) -> None:
        await self._send(exchange, lambda: self._card(exchange), 1)

    async def tokenizer_info(self, exchange: Exchange) -> None:
        if not self._model.tokenizer:
            raise HttpError.of(404, "no_tokenizer", "this checkpoint has no tokenizer; send token ids")
        await self._send(exchange, lambda: dict(self._model.tokenizer), 1)

    async def version(self, exchange: Exchange) -> None:
        await self._send(exchange, lambda: {"version": software_version()}, 1)

    async def openapi(self, exchange: Exchange) -> None:
        await self._send(
            exchange, lambda: document(self.routes(), self._model.name, software_version()), LARGE_ANSWER + 1
        )

    async def health(self, exchange: Exchange) -> None:
        """As gRPC's health: whether requests are admitted and the last canary came back."""
        serving = self._frontend.state is State.SERVING
        ready = serving if self._readiness is None else self._readiness.ready
        await exchange.answer(200 if ready else 503, b"", headers={} if ready else {"Retry-After": "1"})

    async def metrics(self, exchange: Exchange) -> None:
        assert self._metrics is not None, "there is no route without them"
        data, kind = await asyncio.to_thread(self._metrics, exchange.request.headers.get("Accept", ""))
        await exchange.answer(200, data, kind)

    # ------------------------------------------------------------ parts

    async def _fields(self, exchange: Exchange) -> Fields:
        return Fields(await exchange.body(self._frontend.pool))

    async def _conversation(self, fields: Fields) -> str:
        return await self._frontend.pool.run(turn_of_caller(), chat_text, fields, self._model.template)

    async def _tokenized(self, asked: Asked) -> Asked:
        """With token ids in place of the texts that are to be tokenized first."""
        texts = [text for text in asked.texts if text is not None]
        if not texts:
            return asked
        found = iter(await self._frontend.tokenize(texts, turn_of_caller(), whole=asked.whole_texts))
        prompts = tuple(
            prompt if text is None else Prompt(token_ids=next(found))
            for prompt, text in zip(asked.call.prompts, asked.texts, strict=True)
        )
        return replace(asked, call=replace(asked.call, prompts=prompts))

    async def _generate(self, exchange: Exchange, asked: Asked, kind: str) -> None:
        whole = None if asked.streaming else self._limits.max_message_bytes
        stream = await self._frontend.open(of_caller(asked.call, whole))
        exchange.request_id = stream.request_id
        heading = Heading.now(kind, stream.request_id, asked.model or self._model.name, self._model.fingerprint)
        codec = self._frontend.codec
        if asked.streaming is None:
            results = await collect(stream, len(asked.call.prompts))
            answers = Answers(asked, heading, codec)
            make = answers.chat if kind == "chatcmpl" else answers.completion
            await self._send(exchange, lambda: make(results), sum(map(_size, results)))
            return
        events = Events(asked, heading, codec, kind == "chatcmpl")
        async with stream:
            async for chunk in stream:
                if (error := failed(chunk)) is not None:
                    raise error
                await exchange.write(events.of(chunk))
        await exchange.write(events.end())
        await exchange.end()

    async def _send(self, exchange: Exchange, make: Callable[[], dict[str, Any]], size: int) -> None:
        def render() -> bytes:
            return json.dumps(make(), ensure_ascii=False).encode("utf-8", "replace")

        large = size > LARGE_ANSWER
        data = await self._frontend.pool.run(turn_of_caller(), render) if large else render()
        await exchange.answer(200, data)

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self._model.name):
            words = f"the model {name[:200]!r} is not served here; this server has {self._model.name!r}"
            raise HttpError.of(404, "model_not_found", words)

    def _card(self, exchange: Exchange) -> dict[str, Any]:
        return {
            "id": self._model.name,
            "object": "model",
            "created": exchange.started,
            "owned_by": "tp-decoders",
            "root": self._model.name,
            "parent": None,
            "max_model_len": self._frontend.limits.max_context,
        }


def _packed(fields: Fields) -> bool:
    form = fields.text("encoding_format", "float")
    if form not in ("float", "base64"):
        raise invalid("encoding_format", f"is {form[:40]!r}; give float or base64")
    return form == "base64"


def _size(result: Result) -> int:
    """Numbers in it: tokens, and what is said of each."""
    entries = [result.prompt_logprobs or (), *(chunk.logprobs for chunk in result.samples.values())]
    said = sum(len(some) * (len(some[0].top) + 1) for some in entries if some)
    return said + sum(len(chunk.token_ids) for chunk in result.samples.values())

"""A real HTTP server on a real local port beside a gRPC one, over a front-end: with a fake engine, or a tiny model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from cluster.access.access_config import Security
from cluster.frontend.frontend import Frontend
from cluster.http.requests.chat_template import ChatTemplate
from cluster.http.routes import Api, Metrics
from cluster.http.served_model import ServedModel
from cluster.http.server import HttpServer
from cluster.rpc.client.client import AsyncClient
from cluster.rpc.server import build_server
from cluster.rpc.services.connection_limits import ServerLimits
from cluster.rpc.services.control_service import ServiceInfo
from cluster.rpc.services.door import door_of

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}ab{% endif %}"
)
NAME = "tiny"


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> Any:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """Of a stream, which ended as it must."""
        *events, done, empty = self.text.split("\n\n")
        assert (done, empty) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


@dataclass(frozen=True)
class Http:
    """A running server and a client of it."""

    frontend: Frontend
    port: int
    session: aiohttp.ClientSession
    grpc: AsyncClient
    api: Api

    async def get(self, path: str, method: str = "GET", **more: Any) -> Answer:
        async with self.session.request(method, f"http://127.0.0.1:{self.port}{path}", **more) as found:
            return Answer(found.status, found.headers, await found.text())

    async def post(self, path: str, body: Any, **headers: str) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        told = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        return await self.get(path, "POST", data=data, headers=told)

    async def complete(self, prompt: Any, **body: Any) -> Answer:
        return await self.post("/v1/completions", {"prompt": prompt, "model": NAME, **body})

    async def chat(self, *contents: str, **body: Any) -> Answer:
        messages = [{"role": "user", "content": content} for content in contents]
        return await self.post("/v1/chat/completions", {"messages": messages, "model": NAME, **body})

    async def raw(self, data: bytes) -> bytes:
        """Any bytes on a connection, and all that comes back until it is closed."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        await writer.drain()
        found = await asyncio.wait_for(reader.read(), 20)
        writer.close()
        return found


@asynccontextmanager
async def http_over(
    frontend: Frontend,
    limits: ServerLimits | None = None,
    security: Security | None = None,
    template: str | None = TEMPLATE,
    metrics: Metrics | None = None,
) -> AsyncIterator[Http]:
    limits = limits or ServerLimits()
    door = door_of(limits, security or Security())
    made = None if template is None else ChatTemplate(template, {}, "a test")
    model = ServedModel(info=ServiceInfo(model_id=NAME), tokenizer={"eos_token": "x"}, template=made)
    grpc = build_server(frontend, "127.0.0.1:0", limits, security=security, door=door)
    api = Api(frontend, model, limits, None, metrics)
    http = HttpServer(api, "127.0.0.1", 0, limits=limits, door=door)
    await grpc.start()
    await http.start()
    try:
        async with aiohttp.ClientSession() as session, AsyncClient(f"127.0.0.1:{grpc.port}") as client:
            yield Http(frontend, http.port, session, client, api)
    finally:
        await http.stop(1.0)
        await grpc.stop(1.0)

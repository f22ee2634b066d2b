"""HTTP asks at the door of gRPC: the same tokens, roles and places, and certificates for TLS."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import aiohttp

from cluster.access.access_config import Security, TlsConfig
from cluster.access.token_file import Role
from cluster.http.routes import Api
from cluster.http.served_model import ServedModel
from cluster.http.server import HttpServer
from cluster.rpc.services.connection_limits import ServerLimits
from tests.cluster.access.token_files import TOKENS, entry, secret_file
from tests.cluster.frontend.fakes import ENDLESS, LASTING, FakeEngine
from tests.cluster.frontend.harness import run, serving, until
from tests.cluster.http.harness import http_over
from tests.cluster.rpc.certificates import Authority


def test_tokens_and_roles_are_those_of_grpc(tmp_path: Path) -> None:
    generate, observe = (f"Bearer {TOKENS[role]}" for role in (Role.GENERATE, Role.OBSERVE))
    entries = entry("a", TOKENS[Role.GENERATE], ["generate"]) + entry("b", TOKENS[Role.OBSERVE], ["observe"])
    tokens = secret_file(tmp_path / "tokens.toml", entries)

    async def main() -> None:
        async with serving(FakeEngine()) as frontend:
            closed = Security(token_file=tokens)
            async with http_over(frontend, security=closed, metrics=lambda _: (b"1", "text/plain")) as http:
                body = {"prompt": "abc", "max_tokens": 2}
                unknown = await http.post("/v1/completions", body, Authorization="Bearer nobody-knows-this-one")
                nobody = await http.post("/v1/completions", body)
                for refused in (unknown, nobody):
                    assert refused.status == 401 and refused.error["type"] == "authentication_error"
                    assert refused.headers["WWW-Authenticate"] == "Bearer"
                assert (await http.post("/v1/completions", body, Authorization=observe)).status == 403
                assert (await http.post("/v1/completions", body, Authorization=generate)).status == 200
                assert (await http.get("/metrics", headers={"Authorization": generate})).status == 403
                assert (await http.get("/metrics", headers={"Authorization": observe})).status == 200
                assert (await http.get("/v1/models", headers={"Authorization": observe})).status == 200
                assert (await http.get("/v1/models")).status == 401
                assert (await http.get("/health")).status == 200

    run(main())


def test_calls_of_both_protocols_take_the_same_places() -> None:
    async def main() -> None:
        async with serving(FakeEngine(limits=ENDLESS)) as frontend:
            async with http_over(frontend, limits=ServerLimits(max_calls_per_client=1)) as http:
                open_call = http.grpc.stream(["abc"], stopping={"max_new_tokens": LASTING})
                await anext(open_call)
                full = await http.complete("abc", max_tokens=2)
                assert full.status == 429 and full.error["code"] == "too_many_calls"
                await open_call.aclose()
                await until(lambda: frontend.num_open == 0)

    run(main())


def test_a_certificate_that_was_renewed_is_shown_to_the_next_connection(tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    first, second = ours.sign("first"), theirs.sign("second")
    cert, key = tmp_path / "now.pem", tmp_path / "now.key"

    def put(pair: object) -> None:
        for to, name in ((cert, "cert"), (key, "key")):
            to.write_bytes(Path(getattr(pair, name)).read_bytes())
            to.chmod(0o600)

    async def get(port: int, ca: str) -> int:
        context = ssl.create_default_context(cafile=ca)
        context.check_hostname = False
        async with aiohttp.ClientSession() as session:
            async with session.get(f"https://127.0.0.1:{port}/health", ssl=context) as answer:
                return answer.status

    async def main() -> None:
        put(first)
        async with serving(FakeEngine()) as frontend:
            api = Api(frontend, ServedModel(), ServerLimits())
            server = HttpServer(api, "127.0.0.1", 0, security=Security(tls=TlsConfig(cert=str(cert), key=str(key))))
            await server.start()
            try:
                assert await get(server.port, ours.path) == 200
                await asyncio.to_thread(put, second)
                assert await get(server.port, theirs.path) == 200
            finally:
                await server.stop(1.0)

    run(main())

"""Everybody who is not let in, at every method there is: refused with the right status, and nothing came of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.access.access_config import Access, Security, TlsConfig
from cluster.access.roles import ROLES
from cluster.access.token_file import Role
from cluster.frontend.frontend import Frontend
from tests.cluster.access.token_files import TOKENS, entry, secret_file
from tests.cluster.frontend.fakes import FakeEngine
from tests.cluster.frontend.harness import run
from tests.cluster.rpc.certificates import DAY, Authority
from tests.cluster.rpc.harness import Service, service
from tp_decoders.client.transport.channels import async_channel

CODE = grpc.StatusCode
EXPIRED = "a-token-that-was-good-once-0123"
DOORS = ("open", "train", "abort", "drain", "load", "loads", "tokenize", "detokenize")
"""Everything of the front-end that a call can reach."""


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What of the front-end was called."""
    calls: list[str] = []

    def watched(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return inner(*args, **kwargs)

        return call

    for name in DOORS:
        monkeypatch.setattr(Frontend, name, watched(name, getattr(Frontend, name)))
    return calls


async def codes(s: Service, access: Access, token: str | None, methods: list[str]) -> set[grpc.StatusCode]:
    """What one who comes like this is told."""
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    way: Any
    async with async_channel(s.address, access) as way:

        async def code(method: str) -> grpc.StatusCode:
            try:
                await way.unary_unary(method)(b"", timeout=60, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                return error.code()
            return CODE.OK

        return set(await asyncio.gather(*map(code, methods)))


def test_nobody_who_is_to_be_refused_reaches_anything_by_any_method(tmp_path: Path, reached: list[str]) -> None:
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    server, good = ours.sign("server"), ours.sign("alice")
    tokens = "".join(entry(role, token, [str(role)]) for role, token in TOKENS.items())
    tokens += entry("old", EXPIRED, [str(role) for role in Role], "expires = 2020-01-01T00:00:00Z")
    closed = Security(
        tls=TlsConfig(cert=server.cert, key=server.key, client_ca=ours.path),
        token_file=secret_file(tmp_path / "tokens.toml", tokens),
    )
    shown = {"expired": ours.sign("old", valid_for=-DAY), "strange": theirs.sign("mallory")}
    inside = Access(tls_ca=ours.path, tls_cert=good.cert, tls_key=good.key)
    outside = [Access(tls_ca=ours.path, tls_cert=pair.cert, tls_key=pair.key) for pair in shown.values()]
    outside += [Access(tls_ca=ours.path), Access(tls_ca=theirs.path, tls_cert=good.cert, tls_key=good.key)]
    methods, engine = sorted(ROLES), FakeEngine()

    async def main() -> None:
        async with service(engine, security=closed, access=inside, ready=False) as s:
            for token in (None, "a-token-that-nobody-knows-0123", EXPIRED, TOKENS[Role.TRAIN] + "x"):
                assert await codes(s, inside, token, methods) == {CODE.UNAUTHENTICATED}, token
            for role, token in TOKENS.items():
                others = [method for method in methods if role not in ROLES[method]]
                assert others and await codes(s, inside, token, others) == {CODE.PERMISSION_DENIED}, role
            for access in (*outside, Access()):  # with the best of tokens; the last: plain text
                assert await codes(s, access, TOKENS[Role.CONTROL], methods) == {CODE.UNAVAILABLE}, access
            assert reached == [] and engine.submitted == 0
            assert s.frontend.state.value == "serving" and s.frontend.num_open == 0
            assert CODE.OK in await codes(s, inside, TOKENS[Role.CONTROL], ["/tp_decoders.v1.Control/GetLoad"])
            assert reached, "the way in is watched"

    run(main())

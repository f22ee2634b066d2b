"""What stands between client and server is named: a proxy of the environment, TLS on one side only."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.rpc.auth_config import Access, Security, TlsConfig
from cluster.rpc.client import AsyncClient, ServiceError
from cluster.rpc.reach import PROXIES, advice, proxy_of
from tests.cluster.frontend.harness import run
from tests.cluster.rpc.certificates import Authority
from tests.cluster.rpc.harness import service

DEAD = "http://127.0.0.1:9"
ELSEWHERE = "192.0.2.1"  # an address for documentation (RFC 5737), which nobody has


@pytest.fixture(autouse=True)
def no_proxy_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PROXIES, "no_proxy", "NO_PROXY", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", PROXIES)
def test_a_server_of_this_machine_is_reached_past_any_proxy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, DEAD)

    async def main() -> None:
        async with service() as s, AsyncClient(s.address) as client:
            answer = await client.generate([[1]], stopping={"max_new_tokens": 2}, timeout=60)
            assert len(answer.results[0].samples[0].token_ids) == 2

    run(main())


def test_a_proxy_on_the_way_to_another_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", DEAD)

    async def main() -> None:
        async with AsyncClient(f"{ELSEWHERE}:50051") as client:
            with pytest.raises(ServiceError, match=f"http_proxy={DEAD}: add {ELSEWHERE} to no_proxy"):
                await client.server_info(timeout=60)

    run(main())
    monkeypatch.setenv("no_proxy", ELSEWHERE)
    assert proxy_of(ELSEWHERE) is None and advice(ELSEWHERE, encrypted=False) == ""


def test_tls_on_one_side_only_is_said_on_either_side(tmp_path: Path) -> None:
    ca = Authority(tmp_path, "ours")
    pair = ca.sign("server")

    async def told(address: str, access: Access | None) -> str:
        async with AsyncClient(address, access) as client:
            with pytest.raises(ServiceError) as refused:
                await client.server_info(timeout=60)
            return str(refused.value)

    async def main() -> None:
        ours = Access(tls_ca=ca.path)
        async with service(security=Security(tls=TlsConfig(cert=pair.cert, key=pair.key)), access=ours) as s:
            assert "may speak TLS: give its CA (--tls-ca) or --tls" in await told(s.address, None)
        async with service() as s:
            assert "may not speak TLS: leave --tls and --tls-ca out" in await told(s.address, ours)

    run(main())

"""What stands between client and server is named: a proxy of the environment, TLS on one side only."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cluster.access.access_config import Access, Security, TlsConfig
from cluster.rpc.client.client import AsyncClient, ServiceError
from tests.cluster.frontend.harness import run
from tests.cluster.rpc.certificates import Authority
from tests.cluster.rpc.harness import service
from tp_decoders.access.proxies import PROXIES, is_own, proxy_of
from tp_decoders.client.transport.connection_hints import advice

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
            with pytest.raises(ServiceError, match=f"proxy of http_proxy={DEAD}: add {ELSEWHERE} to no_proxy"):
                await client.server_info(timeout=60)

    run(main())
    monkeypatch.setenv("no_proxy", ELSEWHERE)
    assert proxy_of(ELSEWHERE) is None and advice(ELSEWHERE, encrypted=False) == ""


@pytest.mark.parametrize(
    ("host", "exceptions", "excepted"),
    [
        ("10.1.2.3", "10.0.0.0/8", True),
        ("10.1.2.3", "a.example, 10.1.2.3", True),
        ("11.1.2.3", "10.0.0.0/8", False),
        ("fd00::7", "[fd00::7]", True),
        ("fd00::7", "fd00::/16", True),
        ("gpu.example.com", ".example.com", True),
        ("gpu.example.com", "example.com", True),
        ("gpu.example.com", "*.example.com", True),
        ("GPU.example.com", "Example.Com", True),
        ("badexample.com", "example.com", False),
        ("gpu.example.com", "*", True),
        ("gpu.example.com", "", False),
    ],
)
@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
def test_exceptions_are_read_as_others_read_them(
    name: str, host: str, exceptions: str, excepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tp_decoders.access.proxies.is_own", lambda host: False)
    monkeypatch.setenv("http_proxy", DEAD)
    monkeypatch.setenv(name, exceptions)
    assert (proxy_of(host) is None) is excepted


def test_a_name_in_upper_case_is_no_proxy_of_grpcs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", DEAD)
    assert proxy_of(ELSEWHERE) is None


def test_every_address_of_this_machine_is_its_own() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((ELSEWHERE, 9))  # sends nothing: asks which of our addresses would be used
            ours = probe.getsockname()[0]
        except OSError:
            ours = "127.0.0.1"
    assert is_own(ours) and is_own("localhost") and not is_own(ELSEWHERE) and not is_own("no-such-host.invalid")


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

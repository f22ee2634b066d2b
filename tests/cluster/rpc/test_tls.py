"""TLS and client certificates on a real port: who gets through, who does not and has no effect, new files without a
restart."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import grpc
import pytest

from cluster.access.access_config import Access, Security, TlsConfig
from cluster.rpc.client.client import AsyncClient, ServiceError
from cluster.rpc.tls import ServerCertificates
from parallel.errors import ConfigError
from tests.cluster.frontend.fakes import FakeEngine
from tests.cluster.frontend.harness import run
from tests.cluster.rpc.certificates import DAY, Authority, Pair
from tests.cluster.rpc.harness import Service, service
from tp_decoders.access.errors import SettingsError


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ours")


@pytest.fixture
def other_ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "theirs")


async def enters(s: Service, access: Access | None) -> bool:
    """Whether a new client is answered; one that is not has no effect."""
    before = s.engine.submitted
    async with AsyncClient(s.address, access) as client:
        try:
            await client.generate([[1]], stopping={"max_new_tokens": 2}, timeout=60)
        except ServiceError as error:
            assert error.code is grpc.StatusCode.UNAVAILABLE, error
            assert s.engine.submitted == before
            return False
    assert s.engine.submitted == before + 1
    return True


def tls(server: Pair, client_ca: str | None = None) -> Security:
    return Security(tls=TlsConfig(cert=server.cert, key=server.key, client_ca=client_ca))


def test_only_a_client_that_trusts_the_servers_authority_gets_through(ca: Authority, other_ca: Authority) -> None:
    async def main() -> None:
        ours = Access(tls_ca=ca.path)
        async with service(security=tls(ca.sign("server")), access=ours) as s:
            assert await enters(s, ours)
            assert not await enters(s, None), "plain text to a TLS port"
            assert not await enters(s, Access(tls_ca=other_ca.path)), "another authority"
            assert not await enters(s, Access(tls=True)), "an authority the public ones do not know"
            assert await enters(s, ours)

    run(main())


def test_a_certificate_for_another_host_is_refused_unless_that_name_is_asked_for(ca: Authority) -> None:
    async def main() -> None:
        named = Access(tls_ca=ca.path, tls_server_name="head.cluster")
        async with service(security=tls(ca.sign("server", host="head.cluster")), access=named) as s:
            assert await enters(s, named)
            assert not await enters(s, Access(tls_ca=ca.path))

    run(main())


def test_with_mutual_tls_every_client_shows_a_valid_certificate_of_that_authority(
    ca: Authority, other_ca: Authority
) -> None:
    async def main() -> None:
        def shows(pair: Pair) -> Access:
            return Access(tls_ca=ca.path, tls_cert=pair.cert, tls_key=pair.key)

        good = shows(ca.sign("alice"))
        async with service(security=tls(ca.sign("server"), ca.path), access=good) as s:
            assert await enters(s, good)
            assert not await enters(s, Access(tls_ca=ca.path)), "no certificate"
            assert not await enters(s, shows(other_ca.sign("mallory"))), "signed by another"
            assert not await enters(s, shows(ca.sign("old", valid_for=-DAY))), "expired"
            assert not await enters(s, None), "plain text"

    run(main())


def replace(pair: Pair, fresh: Pair) -> None:
    for new, old in ((fresh.cert, pair.cert), (fresh.key, pair.key)):
        shutil.copy(new, old + ".new")
        os.chmod(old + ".new", 0o600)
        os.replace(old + ".new", old)


def test_a_new_certificate_is_used_without_a_restart_and_open_streams_go_on(ca: Authority, other_ca: Authority) -> None:
    async def main() -> None:
        pair, ours = ca.sign("server"), Access(tls_ca=ca.path)
        async with service(FakeEngine(step_seconds=0.01), security=tls(pair), access=ours) as s:
            stream = s.client.stream([[3]], stopping={"max_new_tokens": 100})
            await anext(stream)
            replace(pair, other_ca.sign("fresh"))
            assert not await enters(s, ours)
            assert await enters(s, Access(tls_ca=other_ca.path))
            assert sum([len(chunk.token_ids) async for chunk in stream]) > 0

    run(main())


def test_a_new_authority_for_clients_is_used_without_a_restart(
    ca: Authority, other_ca: Authority, tmp_path: Path
) -> None:
    async def main() -> None:
        trusted = tmp_path / "clients.pem"
        shutil.copy(ca.path, trusted)
        alice, bob = ca.sign("alice"), other_ca.sign("bob")
        before = Access(tls_ca=ca.path, tls_cert=alice.cert, tls_key=alice.key)
        after = Access(tls_ca=ca.path, tls_cert=bob.cert, tls_key=bob.key)
        async with service(security=tls(ca.sign("server"), str(trusted)), access=before) as s:
            assert await enters(s, before) and not await enters(s, after)
            shutil.copy(other_ca.path, trusted)
            assert await enters(s, after) and not await enters(s, before)

    run(main())


def test_files_that_do_not_fit_each_other_leave_the_certificate_as_it_was_until_they_do(
    ca: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        pair, ours = ca.sign("server"), Access(tls_ca=ca.path)
        async with service(security=tls(pair), access=ours) as s:
            fresh = ca.sign("fresh", host="elsewhere")
            shutil.copy(fresh.cert, pair.cert)
            assert await enters(s, ours)
            assert "the server's certificate stays as it was" in caplog.text
            shutil.copy(fresh.key, pair.key)
            assert not await enters(s, ours)
            assert await enters(s, Access(tls_ca=ca.path, tls_server_name="elsewhere"))

    with caplog.at_level(logging.ERROR):
        run(main())


def test_files_that_cannot_work_are_refused_at_once(ca: Authority, tmp_path: Path) -> None:
    one, two = ca.sign("one"), ca.sign("two")
    loose = ca.sign("loose")
    os.chmod(loose.key, 0o644)
    (tmp_path / "empty").write_text("")
    for config, words in (
        (TlsConfig(cert=one.cert, key=two.key), "are no certificate and its key: KEY_VALUES_MISMATCH"),
        (TlsConfig(cert="nowhere", key=one.key), "nowhere cannot be read: No such file"),
        (TlsConfig(cert=loose.cert, key=loose.key), r"can be read or changed by others \(mode 644\); run chmod 600"),
        (TlsConfig(cert=one.cert, key=one.key, client_ca=str(tmp_path / "empty")), "holds no certificate in PEM"),
    ):
        with pytest.raises(ConfigError, match=words):
            ServerCertificates(config)


def test_what_a_client_brings_must_go_together(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="go together"):
        Access(tls_ca="ca", tls_cert="cert")
    with pytest.raises(SettingsError, match="need TLS"):
        Access(tls_cert="cert", tls_key="key")
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("a-token-of-some-length\n")

    async def main() -> None:
        with pytest.raises(SettingsError, match="the token would go to 192.0.2.1:50051 in plain text") as caught:
            AsyncClient("192.0.2.1:50051", Access(token_file=str(token)))
        assert "a-token" not in str(caught.value)
        await AsyncClient("127.0.0.1:1", Access(token_file=str(token))).close()
        await AsyncClient("192.0.2.1:50051", Access(token_file=str(token), plain_token=True)).close()
        await AsyncClient("192.0.2.1:50051", Access(token_file=str(token), tls=True)).close()

    run(main())

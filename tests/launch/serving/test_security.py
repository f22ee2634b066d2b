"""What the command line refuses to open, and a client's way into a closed server: flags, files, `tp-decoders token`."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import stat
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.access.access_config import Security, TlsConfig, check_exposure, is_loopback
from cluster.access.token_file import Role, read_grants
from launch.main import main
from launch.serving.serve_config import ServerConfig
from parallel.errors import ConfigError
from tests.cluster.access.token_files import TOKENS, security
from tests.cluster.rpc.certificates import Authority
from tests.cluster.rpc.harness import service

TLS = TlsConfig(cert="c", key="k")
MUTUAL = TlsConfig(cert="c", key="k", client_ca="a")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.7", "no.such.host.invalid"])
def test_an_address_that_others_reach_needs_tls_and_a_way_to_know_who_calls(host: str) -> None:
    for protection, missing in (
        (Security(), "no TLS .* and neither tokens"),
        (Security(tls=TLS), "there is neither tokens"),
        (Security(token_file="t"), "no TLS"),
    ):
        with pytest.raises(ConfigError, match=missing) as refused:
            check_exposure(host, protection, insecure=False)
        assert "--insecure-listen-anywhere" in str(refused.value)
        check_exposure(host, protection, insecure=True)
    check_exposure(host, Security(tls=TLS, token_file="t"), insecure=False)
    check_exposure(host, Security(tls=MUTUAL), insecure=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_alone_needs_nothing(host: str) -> None:
    check_exposure(host, Security(), insecure=False)
    assert is_loopback(host)


def test_a_name_of_which_one_address_is_outside_is_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(*args: object, **kwargs: object) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        return [(2, 1, 6, "", ("127.0.0.1", 0)), (2, 1, 6, "", ("192.0.2.7", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    assert not is_loopback("two-homes")


@pytest.mark.parametrize(
    "way", [["--host", "0.0.0.0"], ["server.host=0.0.0.0"], ["--host", "::", "--tls-cert", "c", "--tls-key", "k"]]
)
def test_serve_refuses_an_open_port_in_one_line(way: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model", "m", *way]) == 2
    error = capsys.readouterr().err
    assert "which other machines can reach" in error and error.count("\n") == 1


def test_serve_refuses_a_preset_that_opens_a_port(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "open.yaml").write_text("server: {host: 0.0.0.0}\n")
    assert main(["serve", "--model", "m", "--cluster", str(tmp_path / "open.yaml")]) == 2
    assert "which other machines can reach" in capsys.readouterr().err


def test_files_are_looked_at_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Path(__file__).resolve().parents[2] / "data" / "gpt-nano-sort"
    loose = tmp_path / "tokens.toml"
    loose.write_text("")
    loose.chmod(0o644)
    for flags, words in (
        (["--token-file", str(loose)], "can be read or changed by others (mode 644)"),
        (["--tls-cert", "nowhere.pem", "--tls-key", "nowhere.key"], "the key nowhere.key cannot be read"),
        (["--tls-cert", "nowhere.pem"], "TlsConfig needs ['server.tls.key']"),
    ):
        assert main(["serve", "--model", str(model), "--port", "0", *flags]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_paths_of_the_home_folder_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    found = ServerConfig(tls=TlsConfig(cert="~/c", key="~/k"), token_file="~/t").security
    assert found == Security(
        tls=TlsConfig(cert="/home/somebody/c", key="/home/somebody/k"), token_file="/home/somebody/t"
    )


def test_token_makes_a_token_that_only_its_owner_reads_and_a_digest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, alice, bob = (tmp_path / name for name in ("tokens.toml", "alice.token", "bob.token"))
    limits = ["--requests-per-second", "2.5", "--tokens-in-flight", "1000", "--calls", "3"]
    assert main(["token", "alice", "--roles", "generate", "--add-to", str(file), "--out", str(alice), *limits]) == 0
    assert main(["token", "bob", "--roles", "train,control", "--add-to", str(file), "--out", str(bob)]) == 0
    first, second = read_grants(str(file))
    assert (first.requests_per_second, first.tokens_in_flight, first.calls) == (2.5, 1000, 3)
    assert [first.roles, second.roles] == [frozenset({Role.GENERATE}), frozenset({Role.TRAIN, Role.CONTROL})]
    shown = "".join(capsys.readouterr())
    for path, name in ((alice, "alice"), (bob, "bob")):
        token = path.read_text().strip()
        assert tomllib.loads(file.read_text())[name]["sha256"] == hashlib.sha256(token.encode()).hexdigest()
        assert token not in file.read_text() and token not in shown and len(token) >= 43
    assert {stat.S_IMODE(os.stat(path).st_mode) for path in (file, alice, bob)} == {0o600}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["alice", "--roles", "generate"], "has a token named 'alice'"),
        (["bob", "--roles", "admin"], "roles is ['admin']; give a list of"),
        (["bob", "--roles", "train", "--calls", "0"], "calls is 0; give a number above 0"),
        (["b/b", "--roles", "train"], "the name is 'b/b'"),
        (["bob", "--roles", "train", "--out", "alice.token"], "--out alice.token cannot be written: File exists"),
    ],
)
def test_a_token_that_cannot_be_made_changes_nothing(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["token", "alice", "--roles", "generate", "--add-to", "tokens.toml"]) == 0
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert main(["token", *arguments, "--add-to", "tokens.toml"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


@contextmanager
def closed_server(protection: Security) -> Iterator[str]:
    """A server in a thread, for commands that have an event loop of their own."""
    found: list[str] = []
    up, done = threading.Event(), threading.Event()

    async def serve() -> None:
        async with service(security=protection, ready=False) as s:
            found.append(s.address)
            up.set()
            await asyncio.to_thread(done.wait, 30)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    try:
        assert up.wait(20)
        yield found[0]
    finally:
        done.set()
        thread.join(20)


def test_generate_comes_in_with_certificate_and_token_and_not_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ca = Authority(tmp_path, "ours")
    server, client = ca.sign("server"), ca.sign("client")
    tls = TlsConfig(cert=server.cert, key=server.key, client_ca=ca.path)
    token = tmp_path / "mine"
    token.touch(0o600)
    token.write_text(TOKENS[Role.GENERATE] + "\n")
    shown = ["--tls-ca", ca.path, "--tls-cert", client.cert, "--tls-key", client.key]
    with closed_server(Security(tls=tls, token_file=security(tmp_path).token_file)) as address:
        ask = ["generate", "ab", "--address", address, "--max-new-tokens", "3"]
        assert main([*ask, *shown, "--token-file", str(token)]) == 0
        assert capsys.readouterr().out.strip()
        assert main([*ask, *shown]) == 1
        assert "UNAUTHENTICATED: this server asks for one token" in capsys.readouterr().err
        assert main([*ask, "--tls-ca", ca.path, "--token-file", str(token)]) == 1
        assert main([*ask, "--token-file", str(token)]) == 1
        assert TOKENS[Role.GENERATE] not in "".join(capsys.readouterr())

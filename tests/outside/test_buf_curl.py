"""`buf curl`, a gRPC client that is not ours, where it is installed: plain on loopback, and over TLS with a token."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from cluster.access.access_config import Security, TlsConfig
from cluster.access.token_file import Role
from cluster.rpc.services.connection_limits import ServerLimits
from tests.cluster.access.token_files import TOKENS, entry, secret_file
from tests.cluster.rpc.certificates import Authority
from tests.cluster.rpc.harness import service

SCRIPT = Path(__file__).with_name("buf_curl.sh")
BUF = os.environ.get("BUF") or shutil.which("buf")
pytestmark = pytest.mark.skipif(BUF is None, reason="buf is not installed: npm install @bufbuild/buf, then BUF=.../buf")
SERVICES = ["grpc.health.v1.Health", *(f"tp_decoders.v1.{name}" for name in ("Control", "Inference", "Training"))]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script, in a place where buf finds no settings."""
    environment = {**os.environ, "BUF": str(BUF)}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count('"status": "SERVING"') == 2
    assert [name for name in done.stdout.splitlines() if name in SERVICES] == SERVICES
    assert '"requestId": "outside"' in done.stdout and '"requestId": "outside-2"' in done.stdout
    assert done.stdout.count("FINISH_REASON_LENGTH") == 2


def test_it_asks_a_server_on_loopback_by_reflection_alone() -> None:
    async def main() -> subprocess.CompletedProcess[str]:
        async with service() as s:
            return await asyncio.to_thread(run, s.address)

    check(asyncio.run(main()))


def test_it_asks_a_closed_server_with_a_certificate_and_a_token_and_not_without(tmp_path: Path) -> None:
    ca = Authority(tmp_path, "ours")
    pair = ca.sign("server")
    token = TOKENS[Role.CONTROL]
    tokens = secret_file(tmp_path / "tokens.toml", entry("outside", token, ["generate", "control"]))
    good = secret_file(tmp_path / "headers", f"authorization: Bearer {token}\n")
    bad = secret_file(tmp_path / "wrong", "authorization: Bearer a-token-that-nobody-knows-0123\n")
    closed = Security(tls=TlsConfig(cert=pair.cert, key=pair.key), token_file=tokens)

    async def main() -> list[subprocess.CompletedProcess[str]]:
        async with service(security=closed, limits=ServerLimits(reflection=True), ready=False) as s:
            cases = ((ca.path, good), (ca.path, bad), ())
            return [await asyncio.to_thread(run, s.address, *case) for case in cases]

    done, wrong, plain = asyncio.run(main())
    check(done)
    assert token not in done.stdout + done.stderr
    for refused in (wrong, plain):  # its first question already: reflection is for who controls
        assert refused.returncode != 0 and '"status"' not in refused.stdout, refused.stdout + refused.stderr

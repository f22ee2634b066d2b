"""Tokens and roles on a real port: every method's reach, refusals that have no effect, changes without a restart."""

from __future__ import annotations

import hmac
import logging
import re
from collections.abc import Awaitable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import cluster.access.token_file as auth_tokens
from cluster.access.access_config import Security
from cluster.access.roles import ABORT, ANYONE, CONTROL, DROP, GENERATE, ROLES, TRAIN, needed
from cluster.access.token_file import Role, find, read_grants
from cluster.rpc.client.client import AsyncClient
from cluster.rpc.services.connection_limits import ServerLimits
from cluster.rpc.services.interceptor import REQUEST_KINDS
from parallel.errors import ConfigError
from tests.cluster.access.token_files import TOKENS, access, entry, secret_file, security
from tests.cluster.frontend.fakes import FakeEngine
from tests.cluster.frontend.harness import run
from tests.cluster.rpc.codec.test_fuzz import END_HEADERS, END_STREAM, HEADERS, HELLO, connect_and_send, frame, headers
from tests.cluster.rpc.harness import Service, info, refused, service

CODE = grpc.StatusCode
Metadata = Sequence[tuple[str, str]]


def bearer(token: str) -> Metadata:
    return (("authorization", f"Bearer {token}"),)


async def code_of(s: Service, method: str, metadata: Metadata, data: bytes = b"") -> grpc.StatusCode:
    """What becomes of raw bytes sent to a method; an empty message is enough to get past the gate or not."""
    channel: Any = s.client.channel
    try:
        await channel.unary_unary(method)(data, timeout=60, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return CODE.OK


def test_every_method_of_the_protocol_has_its_roles_and_no_other_is_named() -> None:
    assert set(ROLES) == set(REQUEST_KINDS)
    assert all(ROLES.values())
    for method, roles in ROLES.items():
        expected = {"Inference": (GENERATE,), "Training": (TRAIN, DROP), "Control": (CONTROL, ABORT, ANYONE)}
        assert roles in expected[method.split("/")[1].rpartition(".")[2]], method
    assert {m.rpartition("/")[2] for m, roles in ROLES.items() if roles == CONTROL} == {"Drain", "Restart"}


def test_a_method_that_is_not_in_the_table_is_nobodys() -> None:
    assert needed("/tp_decoders.v1.Control/Format") == frozenset()
    assert needed("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo") == CONTROL


@pytest.mark.parametrize("role", Role)
def test_each_role_reaches_its_methods_and_no_others(role: Role, tmp_path: Path) -> None:
    async def main() -> None:
        async with service(security=security(tmp_path), access=access(tmp_path, TOKENS[role])) as s:
            for method, roles in sorted(ROLES.items(), key=lambda item: "Drain" in item[0]):
                got = await code_of(s, method, bearer(TOKENS[role]))
                assert (got is CODE.PERMISSION_DENIED) == (role not in roles), (method, got)
                assert got is not CODE.UNAUTHENTICATED

    run(main())


@pytest.mark.parametrize("role", Role)
def test_a_wrong_role_is_told_what_it_lacks_and_has_no_effect(role: Role, tmp_path: Path) -> None:
    async def main() -> None:
        async with service(security=security(tmp_path), access=access(tmp_path, TOKENS[role])) as s:
            call: Awaitable[Any]
            if role is Role.GENERATE:
                call, words = (
                    s.client.drain(0.0),
                    "token 'generate' is for generate; /tp_decoders.v1.Control/Drain needs control",
                )
            else:
                call, words = s.client.generate([[1]]), "/tp_decoders.v1.Inference/Generate needs generate"
            error = await refused(call, CODE.PERMISSION_DENIED, words)
            assert info(error).reason == "NOT_PERMITTED"
            assert s.engine.submitted == 0 and s.frontend.state.value == "serving"

    run(main())


NOBODY: list[Metadata] = [
    (),
    bearer("a-token-that-nobody-knows-0123"),
    bearer(TOKENS[Role.GENERATE][:-1]),
    bearer(TOKENS[Role.GENERATE] + "x"),
    bearer(""),
    (("authorization", TOKENS[Role.GENERATE]),),
    (("authorization", f"Basic {TOKENS[Role.GENERATE]}"),),
    (*bearer(TOKENS[Role.GENERATE]), *bearer(TOKENS[Role.CONTROL])),
]


@pytest.mark.parametrize("metadata", NOBODY)
def test_whoever_has_no_valid_token_reaches_nothing_but_health(metadata: Metadata, tmp_path: Path) -> None:
    async def main() -> None:
        async with service(security=security(tmp_path)) as s:
            for method in ROLES:
                assert await code_of(s, method, metadata) is CODE.UNAUTHENTICATED, method
            assert s.engine.submitted == 0 and s.frontend.state.value == "serving"
            stub = health_pb2_grpc.HealthStub(s.client.channel)
            status = await stub.Check(health_pb2.HealthCheckRequest(), metadata=metadata)
            assert status.status == health_pb2.HealthCheckResponse.SERVING

    run(main())


def test_a_refused_call_is_answered_before_its_message_is_read(tmp_path: Path) -> None:
    async def main() -> None:
        async with service(security=security(tmp_path)) as s:
            channel: Any = s.client.channel
            call = channel.stream_unary(next(iter(ROLES)))(timeout=60)  # sends nothing, and never ends sending
            assert await call.code() is CODE.UNAUTHENTICATED

    run(main())


def test_reflection_with_tokens_is_for_those_who_control(tmp_path: Path) -> None:
    async def main() -> None:
        async with service(security=security(tmp_path), limits=ServerLimits(reflection=True)) as s:
            assert {role: await reflected(s, token) for role, token in TOKENS.items()} == {
                Role.GENERATE: CODE.PERMISSION_DENIED,
                Role.TRAIN: CODE.PERMISSION_DENIED,
                Role.CONTROL: CODE.OK,
                Role.OBSERVE: CODE.PERMISSION_DENIED,
            }

    run(main())


async def reflected(s: Service, token: str) -> grpc.StatusCode:
    stub = reflection_pb2_grpc.ServerReflectionStub(s.client.channel)
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    try:
        answers = [answer async for answer in stub.ServerReflectionInfo(asked, metadata=bearer(token))]
    except grpc.aio.AioRpcError as error:
        return error.code()
    assert "Inference" in str(answers)
    return CODE.OK


def test_reflection_is_on_by_itself_only_where_nobody_else_can_reach_the_server() -> None:
    from cluster.rpc.server import _reflects

    given = {"127.0.0.1:1": True, "[::1]:1": True, "0.0.0.0:1": False, "[::]:1": False, "192.0.2.1:1": False}
    assert {address: _reflects(ServerLimits(), address) for address in given} == given
    assert _reflects(ServerLimits(reflection=True), "0.0.0.0:1") and not _reflects(
        ServerLimits(reflection=False), "[::1]:1"
    )


def test_tokens_come_go_and_change_without_a_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with service(security=security(tmp_path), access=access(tmp_path, TOKENS[Role.GENERATE])) as s:
            file = tmp_path / "tokens.toml"
            await s.client.tokenize(["ab"])
            file.write_text(entry("new", "another-token-of-some-length", ["generate"]))
            await refused(s.client.tokenize(["ab"]), CODE.UNAUTHENTICATED, "unknown here, or has expired")
            async with AsyncClient(s.address, access(tmp_path, "another-token-of-some-length")) as other:
                await other.tokenize(["ab"])
                file.write_text("[new]\nthis is no TOML")
                await other.tokenize(["ab"])
                assert "the tokens stay as they were" in caplog.text and "this is no" not in caplog.text
                file.unlink()
                await other.tokenize(["ab"])
                secret_file(file, entry("new", "another-token-of-some-length", ["train"]))
                await refused(other.tokenize(["ab"]), CODE.PERMISSION_DENIED, "is for train")
                file.chmod(0o644)
                assert await code_of(s, next(iter(ROLES)), bearer(TOKENS[Role.GENERATE])) is CODE.UNAUTHENTICATED
                assert "can be read or changed by others" in caplog.text

    with caplog.at_level(logging.INFO):
        run(main())


def test_an_expired_token_is_unknown(tmp_path: Path) -> None:
    text = entry("a", TOKENS[Role.GENERATE], ["generate"], "expires = 2027-01-01T00:00:00Z")
    grants = read_grants(secret_file(tmp_path / "t", text))
    assert find(grants, TOKENS[Role.GENERATE], datetime(2026, 12, 31, tzinfo=UTC)) is grants[0]
    assert find(grants, TOKENS[Role.GENERATE], datetime(2027, 1, 1, tzinfo=UTC)) is None


def test_every_digest_is_compared_in_constant_time_wherever_the_right_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[bytes] = []

    def compare(given: bytes, known: bytes) -> bool:
        compared.append(known)
        return hmac.compare_digest(given, known)

    class Counting:
        compare_digest = staticmethod(compare)

    monkeypatch.setattr(auth_tokens, "hmac", Counting)
    token_file = security(tmp_path).token_file
    assert token_file is not None
    grants = read_grants(token_file)
    now = datetime.now(UTC)
    for token in [*TOKENS.values(), "nobody's"]:
        compared.clear()
        found = find(grants, token, now)
        assert compared == [grant.digest for grant in grants]
        assert (found is not None) == (token in TOKENS.values())


GOOD = "a-token-of-some-length"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no token; nobody could call"),
        ("x = 1", "begins with a setting of no token"),
        (f'[a]\ntoken = "{GOOD}"', r"\[a\].roles is None; give a list of ['generate', 'train', 'control', 'observe']"),
        (f'[a]\ntoken = "{GOOD}"\nroles = ["admin"]', "roles is ['admin']"),
        ('[a]\nroles = ["train"]', "needs either sha256 (of the token, better) or token"),
        (entry("a", GOOD, ["train"]) + f'token = "{GOOD}"', "needs either sha256"),
        ('[a]\ntoken = "short"\nroles = ["train"]', "token is too short or holds spaces"),
        ('[a]\nsha256 = "abc"\nroles = ["train"]', "is not 64 hexadecimal digits"),
        (entry("a", GOOD, ["train"], "rate = 3"), "has unknown ['rate']"),
        (entry("a", GOOD, ["train"], "calls = 0"), "calls is 0; give a number above 0"),
        (entry("a", GOOD, ["train"], "requests_per_second = inf"), "requests_per_second is inf"),
        (entry("a", GOOD, ["train"], "expires = 2027-01-01"), "write it as 2027-01-01T00:00:00Z"),
        (entry("a", GOOD, ["train"]) + entry("b", GOOD, ["train"]), "holds one token under two names"),
        (f'[a]\ntoken = "{GOOD}', r"is not valid TOML (at"),
    ],
)  # fmt: skip
def test_a_wrong_token_file_is_refused_in_words_that_hold_no_token(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_grants(secret_file(tmp_path / "t", text))
    assert words.replace("\\", "") in str(caught.value)
    assert GOOD not in str(caught.value) and "short" not in re.sub("too short", "", str(caught.value))


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660, 0o602, 0o620])
def test_a_token_file_that_strangers_can_read_or_change_is_refused(mode: int, tmp_path: Path) -> None:
    path = Path(secret_file(tmp_path / "t", entry("a", GOOD, ["train"])))
    path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"by others \(mode {mode:o}\); run chmod 600"):
        read_grants(str(path))
    for good in (0o600, 0o400, 0o440):
        path.chmod(good)
        assert len(read_grants(str(path))) == 1


def test_neither_tokens_nor_prompts_are_logged_at_any_level(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Answered, refused and failed calls; `abcab` is the prompt, `[9, 8, 7, 9]` the one of ids."""
    # a handler that an earlier test left behind may write to a closed file: logging then prints the lines of this test
    monkeypatch.setattr(logging, "raiseExceptions", False)
    wrong = "a-token-that-nobody-knows-0123"

    async def main() -> None:
        engine = FakeEngine(error_on_prompt=(9, 8, 7, 9))
        limited, mine = security(tmp_path, "requests_per_second = 8"), access(tmp_path, TOKENS[Role.GENERATE])
        async with service(engine, security=limited, access=mine) as s:
            await s.client.generate(["abcab" * 3])
            await refused(s.client.generate([[9, 8, 7, 9]]), CODE.INTERNAL, "told to fail")
            await refused(s.client.generate(["abcab" * 9999]), CODE.RESOURCE_EXHAUSTED, "characters")
            await refused(s.client.drain(0.0), CODE.PERMISSION_DENIED, "is for generate")
            assert await code_of(s, next(iter(ROLES)), bearer(wrong)) is CODE.UNAUTHENTICATED
            assert await code_of(s, next(iter(ROLES)), (*bearer(wrong), *bearer(wrong))) is CODE.UNAUTHENTICATED
            for _ in range(9):
                try:
                    await s.client.tokenize(["abcab"])
                except Exception as error:
                    assert "RESOURCE_EXHAUSTED" in str(error)

            field = b"\x10\x0dauthorization\x20Bearer " + wrong[:24].encode() + b"\xff"
            block = headers("/a") + field
            sent = HELLO + frame(HEADERS, END_HEADERS | END_STREAM, 1, block)
            await connect_and_send(s.server.port, sent, None)

    with caplog.at_level(logging.DEBUG):
        run(main())
    written = caplog.text + "".join(map(repr, caplog.records)) + "".join(capfd.readouterr())
    assert "was refused" in written and "a call failed" in written
    for secret in (*TOKENS.values(), wrong[:20], "abcab", "9, 8, 7, 9"):
        assert secret not in written
    for digest in (auth_tokens.digest_of(token).hex() for token in TOKENS.values()):
        assert digest not in written


def test_configurations_and_grants_print_no_secret(tmp_path: Path) -> None:
    config = security(tmp_path)
    assert config.token_file is not None
    shown = repr(config) + repr(read_grants(config.token_file)) + repr(access(tmp_path, GOOD)) + repr(Security())
    assert GOOD not in shown and "digest" not in shown

"""10,000 fuzzed messages and 2,000 fuzzed connections: nothing takes effect that should not, the server stays healthy,
memory and file handles stay where they were.

Messages are valid ones of every method with bytes changed, cut and repeated; connections speak broken HTTP/2 (frames,
header blocks, gRPC's own framing), half of them to a TLS port.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import ssl
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.access.access_config import Access, Security, TlsConfig
from cluster.rpc.services.interceptor import REQUEST_KINDS
from tests.cluster.frontend.fakes import FakeEngine
from tests.cluster.frontend.harness import run, until
from tests.cluster.rpc.certificates import Authority
from tests.cluster.rpc.harness import INFERENCE, Service, service
from tests.cluster.rpc.test_load import resident_kib
from tp_decoders.protocol import control_pb2, inference_pb2, training_pb2

MESSAGES, BATCH = 10_000, 250
CONNECTIONS, MOST_ROUNDS, AT_ONCE = 200, 30, 20
METHODS = sorted(method for method in REQUEST_KINDS if not method.endswith("/Drain"))  # which is meant to end it all
CLEAR = {
    "OK",
    "INVALID_ARGUMENT",
    "UNIMPLEMENTED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "NOT_FOUND",
    "ALREADY_EXISTS",
}
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, END_HEADERS = 1, 4

SEEDS = (
    inference_pb2.GenerateRequest(
        prompts=[{"text": "abc"}, {"token_ids": {"ids": [1, 2, 3]}}],
        sampling={"n": 2, "seed": 3, "temperature": 0.5, "logit_bias": {1: 0.5}, "bad_words": ["x"]},
        stopping={"max_new_tokens": 4, "stop_sequences": ["b"]},
        response={"logprobs": 1, "echo": True},
    ),
    inference_pb2.ScoreRequest(sequences=[{"token_ids": {"ids": [1, 2, 3]}}]),
    inference_pb2.TokenizeRequest(texts=["abc", "a b"]),
    inference_pb2.DetokenizeRequest(sequences=[{"ids": [1, 2]}]),
    training_pb2.TrainStepRequest(sequences=[{"token_ids": [1, 2]}], optimizer={"learning_rate": 0.1}, expected_step=0),
    control_pb2.AbortRequest(request_ids=["a"]),
)


def mutated(rng: random.Random) -> bytes:
    """A valid message with a few things wrong with it, or none."""
    data = bytearray(rng.choice(SEEDS).SerializeToString())
    for _ in range(rng.randint(0, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 1 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randint(1, 8))
        elif kind == 3:
            del data[at : at + rng.randint(1, 8)]
        else:
            data += data[at : at + rng.randint(1, 64)]
    return bytes(data)


async def send(s: Service, method: str, data: bytes) -> str:
    channel: Any = s.client.channel
    call = channel.unary_stream(method)(data, timeout=60)
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


@pytest.mark.slow
def test_ten_thousand_fuzzed_messages_are_each_answered_clearly_and_leave_nothing() -> None:
    async def main() -> Counter[str]:
        rng, seen, figures = random.Random(11), Counter[str](), list[int]()
        async with service() as s:
            while seen.total() < MESSAGES or not settled(figures, 1024):  # half a KiB for each message
                assert len(figures) < 30, f"memory grows with every 1,000 messages: {figures}"
                for _ in range(1000 // BATCH):
                    cases = [(rng.choice(METHODS), mutated(rng)) for _ in range(BATCH)]
                    seen.update(await asyncio.gather(*(send(s, method, data) for method, data in cases)))
                    await until(lambda: s.engine.idle and s.frontend.num_open == 0)
                figures.append(resident_kib())
            await healthy(s)
        return seen

    seen = run(main(), 200)
    assert set(seen) <= CLEAR, seen
    assert seen["OK"] > 300 and seen["INVALID_ARGUMENT"] > 2000, seen


async def healthy(s: Service) -> None:
    answer = await s.client.generate([[1]], stopping={"max_new_tokens": 3})
    assert len(answer.results[0].samples[0].token_ids) == 3


def frame(kind: int, flags: int, stream: int, payload: bytes, length: int | None = None) -> bytes:
    size = len(payload) if length is None else length
    return size.to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def headers(path: str = INFERENCE + "Generate", **more: str) -> bytes:
    """A header block, each field literal and never indexed."""
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers"}
    fields |= {"content-type": "application/grpc", **more}
    out = b""
    for name, value in fields.items():
        for text in (name, value):
            out += (b"\x10" if text is name else b"") + bytes([len(text)]) + text.encode()
    return out


def message(data: bytes, flag: int = 0, length: int | None = None) -> bytes:
    """gRPC's framing."""
    return bytes([flag]) + (len(data) if length is None else length).to_bytes(4, "big") + data


def call(stream: int, body: bytes, **more: str) -> bytes:
    return frame(HEADERS, END_HEADERS, stream, headers(**more)) + frame(DATA, END_STREAM, stream, body)


HELLO = PREFACE + frame(SETTINGS, 0, 0, b"")


def garbage(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randint(1, 3000))


def random_frames(rng: random.Random) -> bytes:
    out = HELLO
    for _ in range(rng.randint(1, 20)):
        payload = rng.randbytes(rng.randint(0, 60))
        out += frame(rng.randrange(12), rng.randrange(256), rng.randrange(8), payload)
    return out


def wrong_lengths(rng: random.Random) -> bytes:
    return HELLO + frame(
        rng.randrange(10), 0, rng.randrange(4), b"abc", length=rng.choice([0, 1, 1 << 14, (1 << 24) - 1])
    )


def broken_header_block(rng: random.Random) -> bytes:
    block = bytearray(headers())
    for _ in range(rng.randint(1, 6)):
        block[rng.randrange(len(block))] = rng.randrange(256)
    return HELLO + frame(HEADERS, END_HEADERS | END_STREAM, 1, bytes(block))


def endless_headers(rng: random.Random) -> bytes:
    more = b"".join(frame(CONTINUATION, 0, 1, b"\x10\x01a\x20" + b"b" * 32) for _ in range(400))
    return HELLO + frame(HEADERS, 0, 1, headers()) + more


def resets(rng: random.Random) -> bytes:
    """Calls that are taken back as soon as they are made."""
    good = SEEDS[0].SerializeToString()
    pairs = (call(i, message(good)) + frame(RST, 0, i, b"\0\0\0\x08") for i in range(1, 200, 2))
    return HELLO + b"".join(pairs)


def broken_grpc_framing(rng: random.Random) -> bytes:
    good = SEEDS[0].SerializeToString()
    bodies = [
        message(good, flag=rng.choice([1, 2, 255])),
        message(good, length=rng.choice([0, 3, 1 << 20, (1 << 32) - 1])),
    ]
    bodies += [message(good) * 3, b"\0\0", b"", message(mutated(rng))]
    return HELLO + b"".join(call(1 + 2 * i, body) for i, body in enumerate(bodies))


def broken_metadata(rng: random.Random) -> bytes:
    bodies = [{"grpc-timeout": rng.choice(["", "-1S", "99999999999999H", "1x"])}, {"grpc-encoding": "gzip"}]
    bodies += [{"authorization": "Bearer " + "a" * 100}, {"content-type": "text/plain"}, {"path": "/x/" + "y" * 100}]
    return HELLO + b"".join(call(1 + 2 * i, message(b""), **more) for i, more in enumerate(bodies))


def windows_and_settings(rng: random.Random) -> bytes:
    odd = [frame(WINDOW, 0, rng.randrange(2), rng.choice([b"\0\0\0\0", b"\x7f\xff\xff\xff"])) for _ in range(3)]
    setting = rng.randrange(8).to_bytes(2, "big") + rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff"])
    odd += [frame(SETTINGS, 0, 0, setting) * 20, frame(PING, 0, 0, b"12345678") * 50, frame(GOAWAY, 0, 0, b"\0" * 8)]
    rng.shuffle(odd)
    return HELLO + b"".join(odd)


def cut_short(rng: random.Random) -> bytes:
    whole = HELLO + call(1, message(SEEDS[0].SerializeToString()))
    return whole[: rng.randrange(len(whole))]


KINDS: tuple[Callable[[random.Random], bytes], ...] = (
    garbage, random_frames, wrong_lengths, broken_header_block, endless_headers, resets, broken_grpc_framing,
    broken_metadata, windows_and_settings, cut_short,
)  # fmt: skip


async def connect_and_send(port: int, data: bytes, context: ssl.SSLContext | None) -> None:
    """Sends it all, reads what comes for a moment, and is gone."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    except OSError:
        return
    try:
        writer.write(data)
        async with asyncio.timeout(0.05):
            while await reader.read(1 << 16):
                pass
    except (OSError, TimeoutError):
        pass
    finally:
        writer.transport.abort()


@pytest.mark.parametrize(
    "path", [b"/a/\xfe", INFERENCE.encode() + b"Generate\xff", b"\xc3", b"", b"/no/such", b"/" * 100]
)
def test_a_call_of_a_broken_name_stops_neither_the_server_nor_open_streams(path: bytes) -> None:
    async def main() -> None:
        async with service(FakeEngine(step_seconds=0.01)) as s:
            stream = s.client.stream([[3]], stopping={"max_new_tokens": 60})
            first = await anext(stream)
            block = headers("@").replace(b"\x01@", bytes([len(path)]) + path)
            for _ in range(3):
                data = HELLO + frame(HEADERS, END_HEADERS | END_STREAM, 1, block)
                await connect_and_send(s.server.port, data, None)
            await healthy(s)
            assert len(first.token_ids) + sum([len(chunk.token_ids) async for chunk in stream]) == 60

    run(main())


def settled(figures: list[int], kib: int) -> bool:
    """Whether two rounds took no more than this; buffers and caches may take some rounds to fill, a leak goes on."""
    return len(figures) >= 4 and min(figures[-2:]) - min(figures[-4:-2]) < kib


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
@pytest.mark.parametrize("encrypted", [False, True])
def test_fuzzed_connections_leave_the_server_healthy_and_nothing_open(
    encrypted: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL + 1)  # what pytest keeps of a log is memory too
    context = None
    security, access = Security(), Access()
    if encrypted:
        authority = Authority(tmp_path, "ours")
        pair = authority.sign("server")
        security = Security(tls=TlsConfig(cert=pair.cert, key=pair.key))
        access = Access(tls_ca=authority.path)
        context = ssl.create_default_context(cafile=authority.path)
        context.check_hostname = False
        context.set_alpn_protocols(["h2"])

    async def main() -> None:
        rng = random.Random(7)
        async with service(security=security, access=access) as s:

            async def some(count: int) -> None:
                for _ in range(count // AT_ONCE):
                    made = (KINDS[rng.randrange(len(KINDS))](rng) for _ in range(AT_ONCE))
                    await asyncio.gather(*(connect_and_send(s.server.port, data, context) for data in made))
                await until(lambda: s.engine.idle and s.frontend.num_open == 0)

            figures: list[int] = []
            await some(CONNECTIONS)
            before = handles()
            while not settled(figures, 2 * CONNECTIONS * 4):  # 4 KiB for each
                assert len(figures) < MOST_ROUNDS, f"memory grows with every {CONNECTIONS} connections: {figures}"
                await some(CONNECTIONS)
                await asyncio.sleep(0.2)
                figures.append(resident_kib())
            await healthy(s)
            await until(lambda: handles() <= before + 4)  # the server's ends of what is gone

    run(main(), 250)

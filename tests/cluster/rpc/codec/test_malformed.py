"""1,000 malformed requests: each a clear status, the server healthy and answering afterwards, memory where it was."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.rpc.status_pb2 import Status

from cluster.request_errors import InvalidRequest
from cluster.rpc.codec.strict_parsing import MAX_FIELDS, parse
from tests.cluster.frontend.fakes import tokens_of
from tests.cluster.frontend.harness import run, until
from tests.cluster.rpc.harness import CONTROL, INFERENCE, Service, service
from tests.cluster.rpc.test_load import resident_kib, stays_flat
from tp_decoders.protocol import inference_pb2 as pb

NAN, INF = float("nan"), float("inf")
POSITIVE = ("temperature", "top_p", "min_p", "repetition_penalty")
PENALTIES = ("presence_penalty", "frequency_penalty")
CLEAR = {"INVALID_ARGUMENT", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION"}

Case = tuple[str, bytes]


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, wire: int, payload: bytes) -> bytes:
    size = varint(len(payload)) if wire == 2 else b""
    return varint(number << 3 | wire) + size + payload


GOOD = pb.GenerateRequest(prompts=[pb.Prompt(token_ids=pb.TokenIds(ids=[1]))])


def generate(**fields: object) -> bytes:
    message = pb.GenerateRequest(**fields)  # type: ignore[arg-type]
    if "prompts" not in fields:
        message.prompts.extend(GOOD.prompts)
    return message.SerializeToString()


def random_bytes(rng: random.Random) -> Case:
    """Garbage that is no message: an unfinished tag or length at the end makes sure of it."""
    method = rng.choice(["Generate", "Score", "Tokenize"])
    return INFERENCE + method, rng.randbytes(rng.randint(1, 400)) + b"\x12\xff\xff\xff\x7f"


def cut_short(rng: random.Random) -> Case:
    data = generate(prompts=[{"text": "ab" * 50}])
    return INFERENCE + "Generate", data[: rng.randint(2, len(data) - 1)]


def unknown_field(rng: random.Random) -> Case:
    extra = field(
        rng.choice([99, 500, 18999, 200000]), *rng.choice([(0, b"\x01"), (2, b"abc"), (5, b"abcd"), (1, b"abcdefgh")])
    )
    inside = rng.choice([3, 4, 5])  # sampling, stopping, response
    return INFERENCE + "Generate", generate() + (extra if rng.random() < 0.5 else field(inside, 2, extra))


def wrong_type(rng: random.Random) -> Case:
    wrong = rng.choice(
        [
            field(3, 0, b"\x05"),  # sampling as a number
            field(3, 2, field(1, 2, b"warm")),  # temperature as text
            field(3, 2, field(6, 5, b"abcd")),  # n as a float
            field(2, 0, b"\x01"),  # a prompt as a number
            field(4, 2, field(1, 1, b"abcdefgh")),  # max_new_tokens as a double
            field(6, 2, b"high"),  # priority as text
        ]
    )
    return INFERENCE + "Generate", generate() + wrong


def invalid_utf8(rng: random.Random) -> Case:
    bad = rng.choice([b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"ab\x80", b"\xf8\x88\x80\x80\x80"])
    return rng.choice(
        [
            (INFERENCE + "Generate", field(2, 2, field(1, 2, bad))),
            (INFERENCE + "Generate", generate() + field(1, 2, bad)),
            (INFERENCE + "Generate", generate() + field(4, 2, field(3, 2, bad))),
            (INFERENCE + "Tokenize", field(1, 2, bad)),
            (CONTROL + "Abort", field(1, 2, bad)),
        ]
    )


def bad_number(rng: random.Random) -> Case:
    sampling = rng.choice(
        [
            *({name: value} for name in POSITIVE for value in (NAN, INF, -INF, -1.0)),
            *({name: value} for name in PENALTIES for value in (NAN, INF, -1e300)),
            {"seed": -1}, {"seed": -(2**63)}, {"n": 0}, {"n": 2**32 - 1}, {"top_k": 0}, {"top_p": 1.5}, {"top_p": 0.0},
            {"temperature": 1e-30}, {"temperature": 1e30},
            {"logit_bias": {0: NAN}}, {"logit_bias": {4_000_000_000: 1.0}},
            {"allowed_token_ids": [2**32 - 1]}, {"bad_word_ids": [{"ids": []}]}, {"bad_words": [""]},
        ]
    )  # fmt: skip
    return INFERENCE + "Generate", generate(sampling=sampling)


def bad_stopping(rng: random.Random) -> Case:
    stopping = rng.choice(
        [
            {"max_new_tokens": 0}, {"min_new_tokens": 2**32 - 1}, {"max_new_tokens": 3, "min_new_tokens": 4},
            {"stop_sequences": [""]}, {"stop_sequences": ["x"] * 1000}, {"stop_sequences": ["x" * 5000]},
            {"stop_token_ids": [2**32 - 1]},
        ]
    )  # fmt: skip
    return INFERENCE + "Generate", generate(stopping=stopping)


def bad_response(rng: random.Random) -> Case:
    response = rng.choice(
        [{"logprobs": 14}, {"prompt_logprobs": 2**32 - 1}, {"logprobs_temperature": 0.0}, {"logprobs_temperature": NAN}]
    )
    return INFERENCE + "Generate", generate(response=response)


def empty(rng: random.Random) -> Case:
    return rng.choice(
        [
            (INFERENCE + "Generate", b""),
            (INFERENCE + "Score", b""),
            (INFERENCE + "Tokenize", b""),
            (INFERENCE + "Detokenize", b""),
            (INFERENCE + "Generate", generate(prompts=[{}])),
            (INFERENCE + "Generate", generate(prompts=[{"text": ""}])),
            (INFERENCE + "Generate", generate(prompts=[{"token_ids": {}}])),
            (INFERENCE + "Score", pb.ScoreRequest(sequences=[{"token_ids": {"ids": [1]}}]).SerializeToString()),
        ]
    )


def too_long(rng: random.Random) -> Case:
    size = rng.choice([257, 5_000, 100_000])
    return rng.choice(
        [
            (INFERENCE + "Generate", generate(prompts=[{"token_ids": {"ids": [1] * size}}])),
            (INFERENCE + "Generate", generate(prompts=[{"text": "a" * size}])),
            (INFERENCE + "Generate", generate(prompts=[{"token_ids": {"ids": [1]}}] * 1025)),
            (INFERENCE + "Generate", generate(request_id="x" * size)),
            (INFERENCE + "Score", pb.ScoreRequest(sequences=[{"token_ids": {"ids": [1] * size}}]).SerializeToString()),
            (INFERENCE + "Tokenize", pb.TokenizeRequest(texts=["a" * 40_000]).SerializeToString()),
        ]
    )


def bad_ids(rng: random.Random) -> Case:
    ids = [1, rng.choice([13, 10**6, 2**32 - 1])]
    packed = varint(2**63) + varint(2**40)  # wider than uint32: protobuf cuts them, what is left must still be refused
    return rng.choice(
        [
            (INFERENCE + "Generate", generate(prompts=[{"token_ids": {"ids": ids}}])),
            (INFERENCE + "Generate", field(2, 2, field(2, 2, field(1, 2, packed + varint(77))))),
            (INFERENCE + "Score", pb.ScoreRequest(sequences=[{"token_ids": {"ids": ids}}]).SerializeToString()),
        ]
    )


def not_served(rng: random.Random) -> Case:
    return rng.choice(
        [
            (INFERENCE + "Generate", generate(sampling={"beam": {"width": 1}})),
            (INFERENCE + "Generate", generate(adapter="x")),
            (INFERENCE + "Generate", generate(prompts=[{"fim": {"prefix": "a"}}])),
            (INFERENCE + "Embed", generate()),
            (CONTROL + "Nothing", b""),
            ("/tp_decoders.v9.Inference/Generate", generate()),
        ]
    )


KINDS: tuple[Callable[[random.Random], Case], ...] = (
    random_bytes, cut_short, unknown_field, wrong_type, invalid_utf8, bad_number, bad_stopping, bad_response, empty,
    too_long, bad_ids, not_served,
)  # fmt: skip


async def outcome(s: Service, method: str, data: bytes) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        answer = await s.raw(method, data)
        raise AssertionError(f"{method} {data[:60]!r} was answered with {answer[:60]!r}")
    return caught.value


def check_clear(error: grpc.aio.AioRpcError, method: str, data: bytes) -> None:
    code, details = error.code().name, error.details() or ""
    assert code in CLEAR, (code, details, method, data[:80])
    assert len(details) > 10 and "Unexpected" not in details and "Exception" not in details, details
    trailers: Any = error.trailing_metadata() or ()
    packed = dict(trailers).get("grpc-status-details-bin")
    if packed is not None:
        assert Status.FromString(packed).message == details


def test_1000_malformed_requests_each_get_a_clear_status_and_the_server_stays_well() -> None:
    async def main() -> None:
        rng = random.Random(11)
        async with service() as s:
            cases = [KINDS[i % len(KINDS)](rng) for i in range(1000)]
            codes: Counter[str] = Counter()

            async def ask(index: int) -> None:
                codes.clear()
                for at in range(0, 1000, 50):
                    errors = await asyncio.gather(*(outcome(s, *case) for case in cases[at : at + 50]))
                    for error, case in zip(errors, cases[at : at + 50], strict=True):
                        check_clear(error, *case)
                        codes[error.code().name] += 1

            await stays_flat(ask, 4096)
            assert sum(codes.values()) == 1000 and codes["INVALID_ARGUMENT"] > 800, codes
            assert s.frontend.num_open == 0 and s.engine.submitted == 0, "none of it reached the engine"
            answer = await s.client.generate([[1]], sampling={"seed": 1}, stopping={"max_new_tokens": 5})
            assert list(answer.results[0].samples[0].token_ids) == tokens_of([1], 1, 0, 5)

    run(main())


def test_mutated_good_requests_never_hurt_the_server() -> None:
    async def main() -> None:
        rng = random.Random(12)
        data = generate(
            request_id="x",
            prompts=[{"text": "ab"}, {"token_ids": {"ids": [1, 2]}}],
            sampling={"temperature": 0.5, "seed": 3, "n": 2, "logit_bias": {1: 2.0}},
            stopping={"max_new_tokens": 3, "stop_sequences": ["b"]},
        )
        async with service() as s:
            seen: Counter[str] = Counter()
            for _ in range(400):
                mutated = bytearray(data)
                for _ in range(rng.randint(1, 4)):
                    mutated[rng.randrange(len(mutated))] = rng.randrange(256)
                try:
                    await s.raw(INFERENCE + "Generate", bytes(mutated))
                    seen["OK"] += 1
                except grpc.aio.AioRpcError as error:
                    seen[error.code().name] += 1
            assert set(seen) <= CLEAR | {"OK"} and seen["INVALID_ARGUMENT"] > 100, seen
            await until(lambda: s.engine.idle and s.frontend.num_open == 0)
            await s.client.generate([[1]], stopping={"max_new_tokens": 5})

    run(main())


def test_a_message_over_the_limit_is_refused_and_one_just_below_is_read() -> None:
    async def main() -> None:
        async with service() as s:
            channel: Any = grpc.aio.insecure_channel(s.address, options=[("grpc.max_send_message_length", -1)])
            send = channel.unary_unary(INFERENCE + "Tokenize")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await send(b"\x0a" + varint(65 << 20) + b"a" * (65 << 20))
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            below = pb.TokenizeRequest(texts=["a" * (63 << 20)]).SerializeToString()
            error = await outcome(s, INFERENCE + "Tokenize", below)
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "66060288 characters" in str(error.details())
            await channel.close()

    run(main())


def test_very_many_tiny_fields_are_refused_before_they_cost_memory() -> None:
    for data in (b"\x12\x00" * (2 * MAX_FIELDS), field(3, 2, b"\x72\x00" * (2 * MAX_FIELDS))):
        grown = []
        for _ in range(3):  # the heap may have to grow once
            before = resident_kib()
            with pytest.raises(InvalidRequest, match="more than 100000 fields"):
                parse(pb.GenerateRequest, data)
            grown.append(resident_kib() - before)
        assert min(grown) < 4096, grown
    large = pb.GenerateRequest(prompts=[{"token_ids": {"ids": list(range(300_000))}}]).SerializeToString()
    assert parse(pb.GenerateRequest, large) == pb.GenerateRequest.FromString(large)


@pytest.mark.parametrize(
    ("data", "path"),
    [
        (field(99, 0, b"\x01"), "field number 99"),
        (field(3, 2, field(77, 0, b"\x01")), "sampling.field number 77"),
        (field(2, 2, b"") + field(2, 2, field(2, 2, field(9, 0, b"\x01"))), "prompts[1].token_ids.field number 9"),
        (field(3, 2, field(13, 2, field(9, 0, b"\x01"))), "sampling.beam.field number 9"),
        (field(6, 2, b"abc"), "field number 6"),
    ],
)
def test_an_unknown_field_is_named_by_path_and_number(data: bytes, path: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(pb.GenerateRequest, data)
    assert caught.value.violations[0].field == path

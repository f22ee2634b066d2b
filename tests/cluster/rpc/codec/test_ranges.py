"""Every field of every request at, inside and outside the ends of its range, and at what floats can also be: always an
answer, never a dead engine, and weights only an accepted step changes. The table is complete and its page current.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from cluster.frontend.requests.call import FrontendConfig
from cluster.frontend.requests.field_ranges import FIELDS, Range
from cluster.request_errors import InvalidRequest
from cluster.rpc.client.client import AsyncClient
from cluster.rpc.codec.range_check import RangeCheck, is_map
from cluster.rpc.limits_page import needs_row, page, request_messages
from tests.cluster.frontend.harness import run
from tests.cluster.rpc.services.training_service import training_service
from tp_decoders.protocol import control_pb2 as control
from tp_decoders.protocol import inference_pb2 as inference
from tp_decoders.protocol import training_pb2 as training

ROOT = Path(__file__).parents[4]
NANO = ROOT / "tests/data/gpt-nano-sort"
CLEAR = {
    "OK", "INVALID_ARGUMENT", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "NOT_FOUND",
}  # fmt: skip
CHANGING = {"OK", "ABORTED"}
"""Aborted: the gradients were not finite, and those that waited are gone with them."""
NUMBERS = (
    math.nan, math.inf, -math.inf, 1e39, -1e39, 1e300, -1e300, 5e-324, -0.0, 0.0, 0, -1, -100, 2**31, 2**32 - 1,
    2**63 - 1, 2**64 - 1, -(2**63),
)  # fmt: skip
CHECK = RangeCheck(FrontendConfig())
FLOATS = (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT)

PROMPT = {"token_ids": {"ids": [0, 1]}}
SAMPLING = {"logit_bias": {1: 0.5}, "allowed_token_ids": [0, 1, 2], "bad_word_ids": [{"ids": [2, 2]}]}
GENERATE: dict[str, Any] = {
    "prompts": [PROMPT],
    "sampling": SAMPLING,
    "stopping": {"max_new_tokens": 2, "stop_token_ids": [2]},
}
LANGUAGE = {"token_ids": [0, 1, 2], "loss_weights": [1.0, 1.0], "labels": [0, 1, 2]}
SAMPLED = {"token_ids": [0, 1, 2], "old_logprobs": [-1.0, -1.0], "advantages": [1.0, -1.0]}
PAIRED = {"token_ids": [0, 1, 2], "reference_logprobs": [-1.0, -1.0]}
KEY: dict[str, Any] = {"idempotency_key": "k"}
BASES: tuple[tuple[str, Message], ...] = (
    ("Inference/Generate", inference.GenerateRequest(**GENERATE)),
    ("Inference/Generate", inference.GenerateRequest(prompts=[PROMPT], sampling={"beam": {"width": 2}})),
    ("Inference/Score", inference.ScoreRequest(sequences=[PROMPT])),
    ("Inference/Classify", inference.ClassifyRequest(sequences=[PROMPT])),
    ("Inference/Embed", inference.EmbedRequest(sequences=[PROMPT])),
    ("Inference/Tokenize", inference.TokenizeRequest(texts=["a"])),
    ("Inference/Detokenize", inference.DetokenizeRequest(sequences=[{"ids": [1]}])),
    ("Control/Abort", control.AbortRequest(request_ids=["a"])),
    ("Training/TrainStep", training.TrainStepRequest(sequences=[LANGUAGE], **KEY)),
    ("Training/TrainStep", training.TrainStepRequest(sequences=[SAMPLED], loss="ppo", **KEY)),
    ("Training/TrainStep", training.TrainStepRequest(sequences=[SAMPLED], loss="importance_sampling", **KEY)),
    ("Training/TrainStep", training.TrainStepRequest(sequences=[PAIRED, PAIRED], loss="dpo", **KEY)),
    ("Training/ForwardBackward", training.ForwardBackwardRequest(sequences=[LANGUAGE], **KEY)),
    ("Training/OptimStep", training.OptimStepRequest(**KEY)),
    ("Training/Evaluate", training.EvaluateRequest(sequences=[LANGUAGE])),
    ("Training/SaveState", training.SaveStateRequest(name="a", **KEY)),
    ("Training/LoadState", training.LoadStateRequest(name="a", **KEY)),
    ("Training/Export", training.ExportRequest(name="b", **KEY)),
)  # fmt: skip


def test_every_number_list_and_text_of_the_protocol_has_a_row_and_every_row_a_field() -> None:
    wanted = {
        (message.name, field.name) for message in request_messages() for field in message.fields if needs_row(field)
    }
    assert wanted == {(message, field) for message, rows in FIELDS.items() for field in rows}


def test_every_bound_is_finite_and_a_range_holds_something() -> None:
    settings = {name: value for name, value in vars(FrontendConfig()).items() if isinstance(value, int | float)}
    for rows in FIELDS.values():
        for row in (row.within(settings) for row in rows.values()):
            for low, high in ((row.low, row.high), row.entries or (0, 0)):
                assert not isinstance(low, str) and not isinstance(high, str)
                assert math.isfinite(low) and math.isfinite(high) and low <= high


def test_the_page_of_limits_is_printed_from_the_table() -> None:
    assert (ROOT / "docs/limits.md").read_text() == page(), "python -m cluster.rpc.limits_page > docs/limits.md"


@pytest.mark.parametrize(
    ("message", "field", "words"),
    [
        (training.TrainStepRequest(loss_options={"clip_high": 1e39}), "loss_options.clip_high",
         "1e+39 is not allowed; give 0 to 10000"),
        (training.OptimStepRequest(optimizer={"epsilon": 0.0}), "optimizer.epsilon",
         "0.0 is not allowed; give 1e-20 to 1"),
        (training.TrainStepRequest(normaliser=math.nan), "normaliser", "nan is not allowed"),
        (training.TrainStepRequest(sequences=[PAIRED, {"token_ids": [1], "advantages": [1, math.inf]}]),
         "sequences[1].advantages[1]", "inf"),
        (inference.GenerateRequest(sampling={"logit_bias": {7: math.inf}}), "sampling.logit_bias[7]",
         "give -10000 to 10000"),
        (inference.GenerateRequest(sampling={"temperature": -1e-5}), "sampling.temperature",
         "give 0, or 0.0001 to 10000"),
        (inference.GenerateRequest(stopping={"stop_sequences": ["a", ""]}), "stopping.stop_sequences[1]",
         "0 characters; give 1 to 1024"),
        (inference.ScoreRequest(), "sequences", "none given; give 1 to 1024 entries"),
        (control.AbortRequest(request_ids=["x"] * 4097), "request_ids", "4097 entries; at most 4096 are allowed"),
        (control.DrainRequest(grace_seconds=math.inf), "grace_seconds", "inf is not allowed; give 0 to 86400"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_field_what_was_given_and_what_may_be(message: Message, field: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        CHECK.check(message)
    assert words in {violation.field: violation.rule for violation in caught.value.violations}[field]


def paths(message: Message, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldDescriptor]]:
    """Every number, list and text that can be set in a message; of a list of messages in its first one."""
    fields: Any = message.DESCRIPTOR.fields
    for field in fields:
        if needs_row(field):
            yield (*before, field.name), field
        if field.message_type is not None and not is_map(field):
            inner = getattr(message, field.name)
            if not field.is_repeated or inner:
                yield from paths(inner[0] if field.is_repeated else inner, (*before, field.name))


def holder(message: Message, path: tuple[str, ...]) -> Any:
    at: Any = message
    for name in path[:-1]:
        at = getattr(at, name)
        at = at[0] if hasattr(at, "append") or hasattr(at, "add") else at
    return at


def changed(base: Message, path: tuple[str, ...], field: FieldDescriptor) -> Iterator[Message]:
    """The message with the field at each odd value that its type can hold."""
    kind: Any = field.containing_type
    row = CHECK._rows[kind.name][field.name]
    for value in values_of(field, row):
        message = type(base)()
        message.CopyFrom(base)
        at = holder(message, path)
        try:
            if is_map(field):
                at.logit_bias.clear()
                at.logit_bias.update(value)
            elif field.is_repeated:
                del getattr(at, field.name)[:]
                getattr(at, field.name).extend(value)
            else:
                setattr(at, field.name, value)
        except (ValueError, TypeError):  # no such number in this type
            continue
        yield message


def values_of(field: FieldDescriptor, row: Range) -> Iterator[Any]:
    singles = list(single_values(field, row)) if field.message_type is None or row.keys else []
    if row.entries is None:
        yield from singles
        return
    most = row.entries[1]
    assert not isinstance(most, str)
    counts = {0, 1, most + 1, *([most] if most <= 65536 else [])}
    if row.keys is not None:
        yield from ({1: value} for value in singles)
        yield from ({key: 1.0} for key in (0, 3, 2**32 - 1))
        yield from (dict.fromkeys(range(int(count)), 1.0) for count in counts)
    elif field.message_type is not None:
        yield from ([{}] * int(count) for count in counts)
    else:
        yield from ([value] for value in singles)
        yield from ([singles[0], value] for value in singles)
        yield from ([singles[0]] * int(count) for count in counts)


def single_values(field: FieldDescriptor, row: Range) -> Iterator[Any]:
    low, high = row.low, row.high
    assert not isinstance(low, str) and not isinstance(high, str)
    if field.type == FieldDescriptor.TYPE_STRING:
        yield from ("x" * int(size) for size in (low, low + 1, min(high, 4096), min(high, 65536) + 1))
    elif field.type in FLOATS:
        yield from (low, high, math.nextafter(low, -math.inf), math.nextafter(high, math.inf), 2 * high + 1, *NUMBERS)
    else:
        yield from (int(low), int(high), int(low) - 1, int(high) + 1, *(n for n in NUMBERS if isinstance(n, int)))


class Server:
    """What the weights are known to be, from one case to the next."""

    def __init__(self, client: AsyncClient) -> None:
        self.client = client
        self.answers: dict[str, int] = {}

    async def weights(self) -> tuple[Any, ...]:
        state = await self.client.train_state()
        scored = (await self.client.score([[0, 1, 2, 0, 1]])).results[0].logprobs
        return (state.step, state.weight_version, state.waiting_calls, *scored)

    async def ask(self, method: str, message: Message) -> str:
        channel: Any = self.client.channel
        call = channel.unary_unary(f"/tp_decoders.v1.{method}")
        try:
            await call(message.SerializeToString(), timeout=60.0)
        except grpc.aio.AioRpcError as error:
            assert error.details(), "a refusal has words"
            return str(error.code().name)
        return "OK"


@pytest.mark.parametrize(("method", "base"), BASES, ids=[f"{i}-{name}" for i, (name, _) in enumerate(BASES)])
def test_each_field_at_every_odd_value_is_answered_and_a_refused_call_changes_nothing(
    method: str, base: Message, tmp_path: Path
) -> None:
    async def main() -> None:
        async with training_service(NANO, root=tmp_path / "states") as client:
            server = Server(client)
            before, count = await server.weights(), 0
            for path, field in paths(base):
                codes = set()
                for message in changed(base, path, field):
                    if method.startswith("Training/"):
                        unique(message, count, path)
                    count += 1
                    codes.add(await server.ask(method, message))
                    assert codes <= CLEAR, (path, str(message)[:300], codes)
                after = await server.weights()
                assert all(map(math.isfinite, after)), path
                if not codes & CHANGING:
                    assert after == before, path
                before = after
            assert count > 5

    run(main())


def unique(message: Any, count: int, path: tuple[str, ...]) -> None:
    """So that no call is a repetition of the one before."""
    if hasattr(message, "idempotency_key") and path != ("idempotency_key",):
        message.idempotency_key = f"key {count}"
    if hasattr(message, "name") and path != ("name",) and not isinstance(message, training.LoadStateRequest):
        message.name = f"state-{count}"

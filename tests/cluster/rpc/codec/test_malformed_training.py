"""1,000 malformed training requests: each a clear status, no file written, the trained model where it was."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.rpc.client.client import AsyncClient
from tests.cluster.engine.tiny_models import save_tiny
from tests.cluster.frontend.harness import run
from tests.cluster.rpc.codec.test_malformed import check_clear, field
from tests.cluster.rpc.services.test_train_states import BAD_NAMES
from tests.cluster.rpc.services.training_service import DOCUMENTS, STEP, scores, training_service
from tests.cluster.rpc.test_load import stays_flat
from tp_decoders.protocol import training_pb2 as pb

TRAINING = "/tp_decoders.v1.Training/"
NAN, INF = float("nan"), float("inf")
NAMED: dict[str, Any] = {"SaveState": pb.SaveStateRequest, "LoadState": pb.LoadStateRequest, "Export": pb.ExportRequest}
WITH_SEQUENCES: dict[str, Any] = {
    "TrainStep": pb.TrainStepRequest, "ForwardBackward": pb.ForwardBackwardRequest, "Evaluate": pb.EvaluateRequest,
}  # fmt: skip
METHODS = (*NAMED, *WITH_SEQUENCES, "OptimStep", "GetTrainState")
Case = tuple[str, bytes]


def passing(method: str, **fields: Any) -> Case:
    """A request of a forward pass that is right but for the fields given."""
    given: dict[str, Any] = {"sequences": [{"token_ids": [1, 2, 3]}]}
    given |= {"expected_step": 0} if method == "Evaluate" else {"expected_step": 0, "idempotency_key": "k"}
    return TRAINING + method, WITH_SEQUENCES[method](**{**given, **fields}).SerializeToString()


def bad_name(rng: random.Random) -> Case:
    method = rng.choice(list(NAMED))
    return TRAINING + method, NAMED[method](name=rng.choice(BAD_NAMES), idempotency_key="k").SerializeToString()


def random_name(rng: random.Random) -> Case:
    """Any characters, at least one of which no name has."""
    alphabet = "abc019._-/\\\0 \n~éЖ日\u202e\u200b\uff0e\U0001f600"
    letters = [rng.choice(alphabet) for _ in range(rng.randint(0, 40))] + [rng.choice("/\\\0 \u200b")]
    rng.shuffle(letters)
    method = rng.choice(list(NAMED))
    return TRAINING + method, NAMED[method](name="".join(letters), idempotency_key="k").SerializeToString()


def name_that_is_no_text(rng: random.Random) -> Case:
    bad = rng.choice([b"\xff\xfe", b"\xc0\xae\xc0\xae\xc0\xaf", b"\xed\xa0\x80", b"a\x80", b"..\xc0\xafx"])
    return TRAINING + rng.choice(list(NAMED)), field(1, 2, bad)


def absent_name(rng: random.Random) -> Case:
    name = f"absent-{rng.randrange(10**6)}"
    return TRAINING + "LoadState", pb.LoadStateRequest(name=name, idempotency_key="k").SerializeToString()


def random_bytes(rng: random.Random) -> Case:
    return TRAINING + rng.choice(METHODS), rng.randbytes(rng.randint(1, 300)) + b"\x12\xff\xff\xff\x7f"


def unknown_field(rng: random.Random) -> Case:
    extra = field(rng.choice([99, 500, 200000]), *rng.choice([(0, b"\x01"), (2, b"abc"), (5, b"abcd")]))
    return TRAINING + rng.choice(METHODS), extra


def wrong_type(rng: random.Random) -> Case:
    return rng.choice(
        [
            (TRAINING + rng.choice(list(NAMED)), field(1, 0, b"\x05")),  # a name as a number
            (TRAINING + "LoadState", field(1, 2, b"a") + field(5, 2, b"one")),  # a step as text
            (TRAINING + "TrainStep", field(1, 0, b"\x01")),  # a sequence as a number
            (TRAINING + "TrainStep", field(1, 2, field(2, 0, b"\x01"))),  # a loss weight as a whole number
            (TRAINING + "TrainStep", field(8, 2, b"seed")),  # a dropout seed as text
        ]
    )


def bad_sequence(rng: random.Random) -> Case:
    ids = [1, 2, 3]
    sequence = rng.choice(
        [
            {}, {"token_ids": [1]}, {"token_ids": [1] * 129}, {"token_ids": [1, 97]}, {"token_ids": [1, 2**32 - 1]},
            {"token_ids": ids, "loss_weights": [1.0]}, {"token_ids": ids, "loss_weights": [NAN, 1.0]},
            {"token_ids": ids, "loss_weights": [0.0, 0.0]}, {"token_ids": ids, "loss_weights": [-1.0, 1.0]},
            {"token_ids": ids, "labels": [1, 2]}, {"token_ids": ids, "labels": [1, 2, -1]},
            {"token_ids": ids, "labels": [1, 2, 97]}, {"token_ids": ids, "labels": [-100] * 3},
            {"token_ids": ids, "labels": [1, -(2**31), 2**31 - 1]}, {"token_ids": ids, "advantages": [INF, 0.0]},
        ]
    )  # fmt: skip
    return passing(rng.choice(list(WITH_SEQUENCES)), sequences=[sequence])


def bad_number(rng: random.Random) -> Case:
    fields: dict[str, Any] = rng.choice(
        [
            {"loss": "mse"}, {"loss": "ppo"}, {"loss": "dpo"}, {"normaliser": 0.0}, {"normaliser": NAN},
            {"loss_options": {"clip_low": INF}}, {"loss_options": {"beta": 0.0}},
            {"loss_options": {"label_smoothing": 1.0}}, {"sequences": []}, {"expected_step": 2**64 - 1},
        ]
    )  # fmt: skip
    return passing(rng.choice(list(WITH_SEQUENCES)), **fields)


def bad_step(rng: random.Random) -> Case:
    optimizer = rng.choice([{"learning_rate": NAN}, {"learning_rate": -1.0}, {"beta1": 1.0}, {"max_grad_norm": INF}])
    data = pb.OptimStepRequest(optimizer=optimizer, expected_step=0).SerializeToString()
    return rng.choice(
        [
            (TRAINING + "OptimStep", data), (TRAINING + "OptimStep", b""), passing("TrainStep", optimizer=optimizer),
            (TRAINING + "OptimStep", pb.OptimStepRequest(expected_step=0).SerializeToString()),
            passing("TrainStep", idempotency_key="x" * 5000), (TRAINING + "LoadState", field(1, 2, b"good")),
        ]
    )  # fmt: skip


KINDS: tuple[Callable[[random.Random], Case], ...] = (
    bad_name, random_name, name_that_is_no_text, absent_name, random_bytes, unknown_field, wrong_type, bad_sequence,
    bad_number, bad_step,
)  # fmt: skip


async def outcome(client: AsyncClient, method: str, data: bytes) -> grpc.aio.AioRpcError:
    channel: Any = client.channel
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        answer = await channel.unary_unary(method)(data, timeout=120.0)
        raise AssertionError(f"{method} {data[:60]!r} was answered with {answer[:60]!r}")
    return caught.value


def test_1000_malformed_training_requests_change_nothing(tmp_path: Path) -> None:
    root = tmp_path / "root"
    folder = save_tiny("gpt_neox", tmp_path / "model")

    async def main() -> None:
        rng = random.Random(13)
        async with training_service(folder, root=root) as client:
            await client.evaluate(DOCUMENTS)  # makes the trainer
            before, files = await scores(client), sorted(tmp_path.rglob("*"))
            cases = [KINDS[i % len(KINDS)](rng) for i in range(1000)]
            codes: Counter[str] = Counter()

            async def ask(index: int) -> None:
                codes.clear()
                for at in range(0, 1000, 50):
                    errors = await asyncio.gather(*(outcome(client, *case) for case in cases[at : at + 50]))
                    for error, case in zip(errors, cases[at : at + 50], strict=True):
                        codes[error.code().name] += 1
                        if error.code() is not grpc.StatusCode.NOT_FOUND:  # of a name that could be one
                            check_clear(error, *case)

            await stays_flat(ask, 4096)
            assert codes["INVALID_ARGUMENT"] > 700 and codes["NOT_FOUND"] == 100, codes
            assert sorted(tmp_path.rglob("*")) == files, "no file was made"
            state = await client.train_state()
            assert (state.step, state.weight_version, state.waiting_calls) == (0, 0, 0)
            assert await scores(client) == before
            assert (await client.train_step(DOCUMENTS, expected_step=0, **STEP)).step == 1
            assert (await client.save_state("good")).step == 1

    run(main())

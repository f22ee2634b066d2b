"""Names that callers give belong to their callers: request ids, what may be aborted by them, keys of training calls."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from cluster.access.access_config import Security
from cluster.rpc.client.client import AsyncClient
from cluster.training.service.idempotency import CALLER_KEYS, CALLERS, IdempotencyCache
from cluster.training.train_calls import Kind, StepConflict, TrainAnswer, TrainCall
from tests.cluster.access.token_files import access, entry, secret_file
from tests.cluster.engine.tiny_models import save_tiny
from tests.cluster.frontend.fakes import ENDLESS, LASTING, FakeEngine
from tests.cluster.frontend.harness import run, until
from tests.cluster.rpc.harness import refused, service
from tests.cluster.rpc.services.training_service import DOCUMENTS, training_service
from tp_decoders.protocol import training_pb2 as pb
from tp_decoders.protocol.training_pb2_grpc import TrainingStub

LONG = {"max_new_tokens": LASTING, "ignore_eos": True}
NAMES = {"alice": ["generate", "train"], "bob": ["generate", "train"], "warden": ["control"], "watcher": ["observe"]}


def token(name: str) -> str:
    return f"the-secret-token-of-{name}"


def several(folder: Path) -> Security:
    text = "".join(entry(name, token(name), roles) for name, roles in NAMES.items())
    return Security(token_file=secret_file(folder / "tokens.toml", text))


def test_a_caller_aborts_its_own_requests_and_who_controls_anybodys(tmp_path: Path) -> None:
    async def main() -> None:
        engine = FakeEngine(limits=ENDLESS)
        alice, bob, warden, watcher = (access(folder_of(tmp_path, name), token(name)) for name in NAMES)
        async with service(engine, security=several(tmp_path), access=alice) as s:
            async with AsyncClient(s.address, bob) as second, AsyncClient(s.address, warden) as third:
                streams = [client.stream([[1]], request_id="mine", stopping=LONG) for client in (s.client, second)]
                only_alices = s.client.stream([[2]], request_id="hers", stopping=LONG)
                for stream in (*streams, only_alices):
                    await anext(stream)
                assert s.frontend.num_open == 3, "one name, two callers"
                assert await second.abort(["hers"]) == 0
                assert await second.abort(["mine", "mine"]) == 1, "its own of that name"
                assert s.frontend.num_open == 2 and len(engine.live) >= 2
                assert await third.abort(["hers", "mine"]) == 2
                await until(lambda: engine.idle and s.frontend.num_open == 0)
                async with AsyncClient(s.address, watcher) as fourth:
                    await refused(fourth.abort(["hers"]), grpc.StatusCode.PERMISSION_DENIED, "is for observe")
                    assert (await fourth.load()).open_requests == 0

    run(main())


def folder_of(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def test_a_training_call_of_one_caller_is_not_anothers_of_the_same_key(tmp_path: Path) -> None:
    async def main() -> None:
        async with training_service(save_tiny("gpt2", tmp_path / "model"), security=several(tmp_path)) as client:

            async def step(name: str, documents: list[list[int]]) -> pb.TrainStepResponse:
                sequences = [pb.TrainSequence(token_ids=ids) for ids in documents]
                request = pb.TrainStepRequest(sequences=sequences, idempotency_key="the first")
                metadata = (("authorization", f"Bearer {token(name)}"),)
                stub = TrainingStub(client.channel)
                return await stub.TrainStep(request, metadata=metadata, timeout=120)

            mine, his = await step("alice", DOCUMENTS), await step("bob", DOCUMENTS[:1])
            assert [mine.step, his.step, his.replayed] == [1, 2, False]
            again, his_again = await step("alice", DOCUMENTS), await step("bob", DOCUMENTS[:1])
            assert [again.replayed, again.loss] == [True, mine.loss]
            assert [his_again.replayed, his_again.loss] == [True, his.loss]
            with pytest.raises(grpc.aio.AioRpcError, match="was used for another call"):
                await step("bob", DOCUMENTS)

    run(main())


def call(caller: str, key: str, name: str = "") -> TrainCall:
    return TrainCall(kind=Kind.TRAIN_STEP, caller=caller, idempotency_key=key, name=name)


def answer(step: int) -> TrainAnswer:
    return TrainAnswer(step=step, weight_version=step)


def test_one_callers_many_keys_push_out_none_of_anothers() -> None:
    cache = IdempotencyCache()
    cache.remember(call("alice", "a"), answer(1))
    for number in range(2 * CALLER_KEYS):
        cache.remember(call("bob", str(number)), answer(number))
    found = cache.find(call("alice", "a"))
    assert found is not None and found.step == 1 and found.replayed
    assert cache.find(call("bob", "a")) is None and cache.find(call("bob", "0")) is None
    assert cache.find(call("bob", str(2 * CALLER_KEYS - 1))) is not None


def test_callers_are_bounded_and_those_without_a_key_are_not_remembered() -> None:
    cache = IdempotencyCache()
    for number in range(CALLERS + 1):
        cache.remember(call(f"caller {number}", "a"), answer(number))
        cache.remember(call(f"caller {number}", ""), answer(number))
    assert cache.find(call("caller 0", "a")) is None
    assert cache.find(call(f"caller {CALLERS}", "a")) is not None and cache.find(call("caller 1", "")) is None


def test_what_was_undone_is_forgotten_for_all_callers_but_the_call_that_undid_it() -> None:
    cache = IdempotencyCache()
    for caller in ("alice", "bob"):
        cache.remember(call(caller, "a"), answer(1))
    cache.forget_all_but(call("bob", "a"))
    assert cache.find(call("alice", "a")) is None and cache.find(call("bob", "a")) is not None
    with pytest.raises(StepConflict, match="'a' was used for another call"):
        cache.find(call("bob", "a", name="other"))

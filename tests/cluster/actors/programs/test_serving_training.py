"""The serving program on real ranks takes training steps over gRPC while it generates, and saves what it trained."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest

from cluster.actors.group.placement import PlacementConfig
from cluster.actors.group.worker_group import WorkerGroup
from cluster.actors.programs.serve_program import ServeProgram
from cluster.actors.programs.serve_spec import ParallelConfig, RankFacts, TrainingConfig
from cluster.engine.engine_config import EngineConfig
from cluster.frontend.frontend import Frontend
from cluster.link.socket_link import SocketLink
from cluster.rpc.client.client import AsyncClient
from cluster.rpc.server import build_server
from parallel.errors import ConfigError
from parallel.native.compiled import library
from tests.cluster.engine.tiny_models import save_tiny
from tests.cluster.rpc.harness import refused
from tests.cluster.rpc.services.fifty_steps import Served, check_exports, fifty_steps_beside_eight_streams
from tests.cluster.rpc.services.training_service import logprobs, scores_of

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
T = TypeVar("T")
KEY = b"0123456789abcdef"
DOCUMENTS = [[5, 9, 2, 7, 11, 3, 8], [1, 4, 4, 6, 90]]
STEP: dict[str, Any] = {"optimizer": {"learning_rate": 1e-3}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library.available()
    return save_tiny("gpt_neox", tmp_path_factory.mktemp("neox") / "model")


def spec(model: Path, training: TrainingConfig, kv_blocks: int | None = 96) -> ServeProgram:
    engine = EngineConfig(kv_blocks=kv_blocks, max_sequences=8)
    parallel = ParallelConfig(tp=2, collective_timeout_s=100.0)
    return ServeProgram(model=str(model), authkey=KEY, parallel=parallel, engine=engine, training=training)


@asynccontextmanager
async def client_of(address: tuple[str, int]) -> AsyncIterator[AsyncClient]:
    frontend = Frontend(SocketLink(address, KEY))
    frontend.start()
    server = build_server(frontend, "127.0.0.1:0")
    await server.start()
    try:
        async with AsyncClient(f"127.0.0.1:{server.port}") as client:
            yield client
    finally:
        await server.stop(1.0)
        await frontend.close()


async def scores(client: AsyncClient) -> list[list[float]]:
    return [list(result.logprobs) for result in (await client.score(DOCUMENTS)).results]


async def step_ten(client: AsyncClient) -> tuple[list[list[float]], list[list[float]]]:
    """The log-probabilities of the tenth step's pass, and after it."""
    return logprobs(await client.train_step(DOCUMENTS, expected_step=10, **STEP)), await scores(client)


async def after_a_restart(address: tuple[str, int]) -> tuple[list[list[float]], list[list[float]]]:
    async with client_of(address) as client:
        await client.load_state("ten", expected_step=0)
        return await step_ten(client)


async def steps_beside_streams(address: tuple[str, int]) -> tuple[list[list[float]], Any]:
    async with client_of(address) as client:
        fields: dict[str, Any] = {"stopping": {"max_new_tokens": 100, "ignore_eos": True}}
        running = asyncio.create_task(client.generate([[i, 3, 5] for i in range(8)], **fields))
        for step in range(10):
            taken = await client.train_step(DOCUMENTS, expected_step=step, **STEP)
            assert taken.weight_version == step + 1
        assert (await client.save_state("ten")).step == 10
        assert all(len(result.samples[0].token_ids) == 100 for result in (await running).results)
        served = await scores(client)
        assert served == logprobs(await client.evaluate(DOCUMENTS))
        assert {score.weight_version for score in (await client.score(DOCUMENTS)).results} == {10}
        await client.export("export")
        after = await step_ten(client)
        assert (await client.load_state("ten", expected_step=11)).step == 10 and await scores(client) == served
        assert await step_ten(client) == after
        assert [state.name for state in (await client.train_state()).saved] == ["export", "ten"]
        return served, after


def on_two_ranks(spec: ServeProgram, main: Callable[[tuple[str, int]], Coroutine[Any, Any, T]]) -> tuple[RankFacts, T]:
    """What the coroutine made of a group's engine, and what its first rank said of itself."""
    group = WorkerGroup(spec, size=2, config=PlacementConfig(silence_s=100.0))
    try:
        facts = group.start()[0].facts
        assert facts.engine_address is not None
        return facts, asyncio.run(asyncio.wait_for(main(facts.engine_address), 250))
    finally:
        group.close()


def test_two_ranks_train_generate_and_save_behind_one_port(model: Path, tmp_path: Path) -> None:
    training = TrainingConfig(enabled=True, save_root=str(tmp_path / "states"))
    facts, (served, after) = on_two_ranks(spec(model, training), steps_beside_streams)
    assert facts.training_bytes > 12 * facts.parameters
    assert on_two_ranks(spec(model, training), after_a_restart)[1] == after
    for name in ("ten", "export"):
        assert scores_of(tmp_path / "states" / name, DOCUMENTS) == served, "one rank, bit for bit"


def test_two_ranks_take_fifty_steps_beside_eight_streams_and_serve_what_they_export(
    model: Path, tmp_path: Path
) -> None:
    async def main(address: tuple[str, int]) -> Served:
        async with client_of(address) as client:
            return await fifty_steps_beside_eight_streams(client)

    training = TrainingConfig(enabled=True, save_root=str(tmp_path))
    check_exports(on_two_ranks(spec(model, training), main)[1], tmp_path)


def test_a_server_that_was_not_told_to_train_refuses_and_says_what_to_set(model: Path) -> None:
    async def main(address: tuple[str, int]) -> None:
        async with client_of(address) as client:
            key: dict[str, Any] = {"idempotency_key": "k"}
            calls = (
                client.train_step(DOCUMENTS, **key), client.forward_backward(DOCUMENTS, **key),
                client.optim_step(**key), client.evaluate(DOCUMENTS), client.save_state("a"),
                client.load_state("a", **key), client.export("a"), client.train_state(),
            )  # fmt: skip
            for call in calls:
                await refused(call, grpc.StatusCode.FAILED_PRECONDITION, "--train (training.enabled=true)")
            assert len((await scores(client))[0]) == 6

    assert on_two_ranks(spec(model, TrainingConfig()), main)[0].training_bytes == 0


def test_a_server_whose_memory_training_would_take_does_not_start(model: Path) -> None:
    training = TrainingConfig(enabled=True, micro_batch_tokens=1 << 40)
    with pytest.raises(ConfigError, match="training needs about .* GiB on rank .* GiB are free: use more ranks"):
        WorkerGroup(spec(model, training, kv_blocks=None), size=2).start()

"""Heads trained over gRPC: steps that change what Classify answers, the losses of each task, what labels may not be."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.run.command_stream import Commands
from cluster.engine.run.executors import follow
from cluster.frontend.frontend import Frontend
from cluster.link.local_link import LocalLink
from cluster.rpc.client.client import AsyncClient
from cluster.rpc.server import build_server
from cluster.training.service.train_coordinator import TrainCoordinator
from cluster.training.service.train_worker import SaveConfig, TrainWorker
from parallel.ranks.group import Group
from parallel.ranks.mesh import Groups
from tests.cluster.frontend.harness import run
from tests.cluster.rpc.harness import refused
from tests.cluster.rpc.services.test_classify_embed import reference
from tp_decoders import load
from tp_decoders.model.task_config import CHOICES, SEQUENCES, SPANS, TOKENS

CONFIG = EngineConfig(kv_blocks=24, max_sequences=4)
RATE = {"learning_rate": 3e-3}
TEXTS = [[1 + (7 * i + j) % 40 + 50 * (i % 2) for j in range(5)] for i in range(8)]


def rank_of(folder: str, task: str, group: Group, root: Path | None) -> tuple[Any, TrainWorker]:
    runner = build_runner(load(folder, task=task, group=group), CONFIG, 1 << 28)
    return runner, TrainWorker(runner, Groups(group, Group.single()), saves=SaveConfig(root=root))


@asynccontextmanager
async def training(folder: str, task: str, group: Group, root: Path | None = None) -> AsyncIterator[AsyncClient]:
    runner, side = rank_of(folder, task, group, root)
    commands = Commands(group.comm)
    engine = build_engine(runner, CONFIG, (), commands if group.size > 1 else None)
    frontend = Frontend(LocalLink(engine, TrainCoordinator(side, commands, engine.weights_changed)))
    frontend.start()
    server = build_server(frontend, "127.0.0.1:0")
    await server.start()
    try:
        async with AsyncClient(f"127.0.0.1:{server.port}") as client:
            yield client
    finally:
        await server.stop(1.0)
        await frontend.close()
        engine.close()
        side.close()


def labelled() -> list[dict[str, Any]]:
    return [{"token_ids": text, "labels": [i % 2]} for i, text in enumerate(TEXTS)]


def learns(group: Group, folder: str, root: str) -> list[float]:
    """Steps, then answers: rank 0's client says what it saw."""
    if group.rank:
        runner, side = rank_of(folder, SEQUENCES, group, Path(root))
        follow(runner, Commands(group.comm), side.handlers)
        side.close()
        return []

    async def main() -> list[float]:
        async with training(folder, SEQUENCES, group, Path(root)) as client:
            before = await client.classify(TEXTS)
            seen = []
            for step in range(15):
                done = await client.train_step(labelled(), optimizer=RATE, expected_step=step, dropout_seed=step)
                seen.append(done.loss)
            judged = await client.evaluate(labelled())
            after = await client.classify(TEXTS)
            assert [r.scores.label_id for r in after.results] == [i % 2 for i in range(8)]
            assert {r.weight_version for r in before.results} == {0} and {r.weight_version for r in after.results} == {
                15
            }
            assert judged.metrics["accuracy"] == 1.0 and not done.logprobs
            await client.export("trained")
            await client.save_state("here", expected_step=15)
            again = (await client.train_step(labelled(), optimizer=RATE, expected_step=15)).loss
            await client.load_state("here", expected_step=16)
            assert (await client.train_step(labelled(), optimizer=RATE, expected_step=15)).loss == again
            return [*seen, *after.results[3].scores.logits]

    found: list[float] = run(main())
    return found


def test_steps_teach_a_head_that_classify_serves_alike_on_one_and_two_ranks(ranks: Any, tmp_path: Path) -> None:
    reference(SEQUENCES, tmp_path / "model", num_labels=2)
    (one,) = ranks(1, learns, str(tmp_path / "model"), str(tmp_path / "one"))
    assert ranks(2, learns, str(tmp_path / "model"), str(tmp_path / "two")) == [one, []]
    assert one[14] < 0.5 * one[0]
    load(tmp_path / "two" / "trained", task=SEQUENCES)


def test_each_task_has_its_loss_and_its_rules(tmp_path: Path) -> None:
    invalid, alone = grpc.StatusCode.INVALID_ARGUMENT, Group.single()

    def bad(client: AsyncClient, words: str, *sequences: dict[str, Any], **fields: Any) -> Any:
        return refused(client.train_step(list(sequences), expected_step=0, **fields), invalid, words)

    async def numbers() -> None:
        async with training(str(tmp_path / "multi"), SEQUENCES, alone) as client:
            right = {"token_ids": [1, 2], "values": [1.0, 0.0, 1.0]}
            await bad(client, "give 3 finite numbers", {"token_ids": [1, 2], "values": [1.0]})
            await bad(client, "from 0 to 1", {"token_ids": [1, 2], "values": [1.0, 0.0, 2.0]})
            await bad(client, "sequences[1].values: ", right, {"token_ids": [1, 2]})
            await bad(client, "is unknown; choose one of ['task']", right, loss="cross_entropy")
            assert (await client.train_step([right], expected_step=0, optimizer=RATE)).step == 1

    async def tokens() -> None:
        async with training(str(tmp_path / "tokens"), TOKENS, alone) as client:
            await bad(client, "1 labels; give 2", {"token_ids": [1, 2], "labels": [1]})
            await bad(client, "labels[1]: 5 is neither", {"token_ids": [1, 2], "labels": [1, 5]})
            await bad(client, "nothing would be learned", {"token_ids": [1, 2], "labels": [-100, -100]})
            half = {"token_ids": [1, 2, 3], "labels": [1, 0, 4], "loss_weights": [1.0, 0.0, 1.0]}
            whole = await client.evaluate([half])
            ignored = await client.evaluate([{"token_ids": [1, 2, 3], "labels": [1, -100, 4]}])
            assert whole.loss == pytest.approx(ignored.loss, rel=1e-6)

    async def spans() -> None:
        async with training(str(tmp_path / "spans"), SPANS, alone) as client:
            await bad(client, "1 numbers; give 2", {"token_ids": [1, 2], "labels": [1]})
            await bad(client, "nothing would be learned", {"token_ids": [1, 2], "labels": [2, 3]})
            both = [{"token_ids": [1, 2, 3], "labels": [0, 1]}, {"token_ids": [4, 5], "labels": [1, 1]}]
            assert (await client.train_step(both, expected_step=0, optimizer=RATE)).loss > 0

    async def choices() -> None:
        async with training(str(tmp_path / "choices"), CHOICES, alone) as client:
            pair = [{"token_ids": [1, 2, 3], "chosen": True}, {"token_ids": [1, 4], "mark": 0}]
            await bad(client, "0 of sequences 0 to 1 are chosen", {"token_ids": [1, 2]}, {"token_ids": [1, 4]})
            await bad(client, "3 is outside", {"token_ids": [1, 2, 3], "chosen": True, "mark": 3})
            whole = await client.evaluate(pair)
            parts = [
                await client.evaluate(pair, loss_options={"language_weight": a, "choice_weight": b})
                for a, b in ((1.0, 0.0), (0.0, 1.0))
            ]
            assert whole.loss == pytest.approx(sum(part.loss for part in parts), rel=1e-6)
            spoken = await client.evaluate([[1, 2, 3], [1, 4]], loss="cross_entropy")
            assert spoken.loss == pytest.approx(parts[0].loss, rel=1e-6)
            assert (await client.train_step(pair, expected_step=0, optimizer=RATE)).step == 1

    reference(SEQUENCES, tmp_path / "multi", num_labels=3, problem_type="multi_label_classification")
    reference(TOKENS, tmp_path / "tokens", num_labels=5)
    reference(SPANS, tmp_path / "spans")
    reference(CHOICES, tmp_path / "choices")
    for main in (numbers, tokens, spans, choices):
        run(main())

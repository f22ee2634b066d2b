"""Training over gRPC beside generation, with a real model in this process: the served weights are the trained ones."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.cluster.engine.tiny_models import save_tiny
from tests.cluster.frontend.harness import run
from tests.cluster.rpc.harness import info, refused
from tests.cluster.rpc.services.fifty_steps import Served, check_exports, fifty_steps_beside_eight_streams
from tests.cluster.rpc.services.training_service import DOCUMENTS, STEP, logprobs, scores, training_service


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("gpt_neox", tmp_path_factory.mktemp("neox"))


def test_eight_streams_run_on_while_fifty_steps_are_taken_and_what_is_served_is_what_is_exported(
    tiny: Path, tmp_path: Path
) -> None:
    async def main() -> Served:
        async with training_service(tiny, root=tmp_path) as client:
            served = await fifty_steps_beside_eight_streams(client)
            assert (await client.load()).kv_blocks_free == 96
            return served

    check_exports(run(main()), tmp_path)


def test_served_log_probabilities_are_the_training_forwards_bit_for_bit_after_every_step(tiny: Path) -> None:
    async def main() -> None:
        async with training_service(tiny) as client:
            before = await scores(client)
            for step in range(4):
                scored = await scores(client)
                assert scored == logprobs(await client.evaluate(DOCUMENTS))
                taken = await client.train_step(DOCUMENTS, expected_step=step, **STEP)
                assert scored == logprobs(taken) != await scores(client)
            asked: dict[str, Any] = {"stopping": {"max_new_tokens": 12}, "response": {"logprobs": 0}}
            (result,) = (await client.generate([DOCUMENTS[0]], **asked)).results
            sample, whole = result.samples[0], [*DOCUMENTS[0], *result.samples[0].token_ids]
            trained = logprobs(await client.evaluate([whole]))[0]
            assert sample.weight_version == 4 and trained[len(DOCUMENTS[0]) - 1 :] == list(sample.logprobs)
            assert (await scores(client)) != before

    run(main())


def test_nothing_cached_under_old_weights_is_used_again(tiny: Path) -> None:
    """Also by a stream that runs: from the next token on it is as if the new weights had read all of it."""

    async def main() -> None:
        async with training_service(tiny) as client:
            prompt = [(7 * i) % 89 + 1 for i in range(50)]
            first, tokens = asyncio.Event(), list(prompt)
            values: list[float] = []
            versions: list[int] = []

            async def read() -> None:
                fields: dict[str, Any] = {"stopping": {"max_new_tokens": 70, "ignore_eos": True}}
                async for chunk in client.stream([prompt], response={"logprobs": 0}, **fields):
                    tokens.extend(chunk.token_ids)
                    values.extend(chunk.logprobs)
                    versions.extend([chunk.weight_version] * len(chunk.token_ids))
                    first.set()

            reader = asyncio.create_task(read())
            await first.wait()
            await client.train_step(DOCUMENTS, expected_step=0, optimizer={"learning_rate": 0.01})
            await reader
            late = versions.index(1) + 1  # a chunk may hold tokens of both
            assert 0 < late < 70
            trained = logprobs(await client.evaluate([tokens]))[0]
            assert values[late:] == trained[len(prompt) - 1 + late :]
            asked: dict[str, Any] = {"stopping": {"max_new_tokens": 5}, "response": {"logprobs": 0}}
            sample = (await client.generate([prompt], **asked)).results[0].samples[0]
            again = logprobs(await client.evaluate([[*prompt, *sample.token_ids]]))[0]
            assert list(sample.logprobs) == again[len(prompt) - 1 :]

    run(main())


def test_a_step_in_two_halves_and_in_two_parts_is_the_same_step(tiny: Path) -> None:
    async def main() -> None:
        async with training_service(tiny) as one, training_service(tiny) as two:
            whole = await one.train_step(DOCUMENTS, expected_step=0, **STEP)
            total = float(sum(len(document) - 1 for document in DOCUMENTS))
            for index in range(2):
                part = DOCUMENTS[:2] if index == 0 else DOCUMENTS[2:]
                await two.forward_backward(part, idempotency_key=f"part {index}", normaliser=total)
            assert (await two.train_state()).waiting_calls == 2
            halves = await two.optim_step(expected_step=0, **STEP)
            assert halves.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
            ours, theirs = (await scores(one))[0], (await scores(two))[0]
            assert theirs == pytest.approx(ours, rel=1e-3)
            assert (await two.train_state()).waiting_calls == 0

    run(main())


def test_a_repeated_step_is_answered_and_a_stale_one_refused_never_applied_twice(tiny: Path) -> None:
    async def main() -> None:
        async with training_service(tiny) as client:
            first = await client.train_step(DOCUMENTS, expected_step=0, idempotency_key="a", **STEP)
            after = await scores(client)
            again = await client.train_step(DOCUMENTS, expected_step=0, idempotency_key="a", **STEP)
            assert again.replayed and not first.replayed
            assert (again.loss, again.step, logprobs(again)) == (first.loss, 1, logprobs(first))
            words = "expected_step is 0, but 1 steps have been applied"
            stale = client.train_step(DOCUMENTS, expected_step=0, **STEP)
            error = await refused(stale, grpc.StatusCode.FAILED_PRECONDITION, words)
            assert info(error).reason == "STEP_CONFLICT"
            other = client.train_step(DOCUMENTS[:1], expected_step=0, idempotency_key="a", **STEP)
            await refused(other, grpc.StatusCode.FAILED_PRECONDITION, "was used for another call")
            early = client.optim_step(expected_step=1)
            await refused(early, grpc.StatusCode.FAILED_PRECONDITION, "no gradients are waiting")
            state = await client.train_state()
            assert (state.step, state.weight_version) == (1, 1) and await scores(client) == after

    run(main())


def test_a_seed_drops_activations_and_none_does_not(tmp_path: Path) -> None:
    async def main() -> None:
        async with training_service(save_tiny("gpt2", tmp_path / "gpt2")) as client:
            still: dict[str, Any] = {"optimizer": {"learning_rate": 0.0}}

            async def values(step: int, seed: int | None) -> list[list[float]]:
                call = client.train_step(DOCUMENTS, expected_step=step, dropout_seed=seed, **still)
                return logprobs(await call)

            plain, seven, again = await values(0, None), await values(1, 7), await values(2, 7)
            assert plain == await scores(client) and seven == again != plain
            assert await values(3, 2**64 - 1) not in (plain, seven)
            key: dict[str, Any] = {"idempotency_key": "k", "dropout_seed": 7}
            assert logprobs(await client.forward_backward(DOCUMENTS, **key)) == seven
            other = client.forward_backward(DOCUMENTS, idempotency_key="k", dropout_seed=8)
            await refused(other, grpc.StatusCode.FAILED_PRECONDITION, "was used for another call")

    run(main())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"sequences": []}, "sequences: none given"),
    ({"sequences": [[]]}, "sequences[0].token_ids: 0 tokens"),
    ({"sequences": [[1, 2], [3]]}, "sequences[1].token_ids: 1 tokens"),
    ({"sequences": [[1, 97]]}, "sequences[0].token_ids[1]: 97 is not a token"),
    ({"sequences": [[1] * 129]}, "sequences[0].token_ids: 129 tokens; give 2 to 128"),
    ({"sequences": [{"token_ids": [1, 2, 3], "loss_weights": [1.0] * 3}]}, "sequences[0].loss_weights: 3 numbers"),
    ({"sequences": [{"token_ids": [1, 2], "loss_weights": [float("nan")]}]}, "sequences[0].loss_weights[0]: nan"),
    ({"sequences": [{"token_ids": [1, 2], "loss_weights": [-1.0]}]}, "sequences[0].loss_weights[0]: -1.0"),
    ({"sequences": [{"token_ids": [1, 2], "loss_weights": [0.0]}]}, "every loss weight is 0"),
    ({"loss": "mse"}, "loss: 'mse' is unknown"),
    ({"loss": "ppo"}, "sequences[0].old_logprobs: missing"),
    ({"loss": "dpo", "sequences": [[1, 2]]}, "dpo takes pairs"),
    ({"optimizer": {"learning_rate": float("inf")}}, "optimizer.learning_rate: inf"),
    ({"optimizer": {"beta1": 1.0}}, "optimizer.beta1: 1.0"),
    ({"loss_options": {"beta": 0.0}}, "loss_options.beta: 0.0"),
    ({"normaliser": 0.0}, "normaliser: 0.0"),
]


def test_malformed_steps_name_the_field_and_change_nothing(tiny: Path) -> None:
    async def main() -> None:
        async with training_service(tiny) as client:
            before = await scores(client)
            for fields, words in BAD:
                given: dict[str, Any] = {"sequences": DOCUMENTS, "expected_step": 0, **fields}
                await refused(client.train_step(**given), grpc.StatusCode.INVALID_ARGUMENT, words)
            unsafe = client.train_step(DOCUMENTS)
            await refused(unsafe, grpc.StatusCode.INVALID_ARGUMENT, "expected_step: missing")
            keyless = client.forward_backward(DOCUMENTS, expected_step=0)
            await refused(keyless, grpc.StatusCode.INVALID_ARGUMENT, "idempotency_key: missing")
            exploding = [{"token_ids": [1, 2], "advantages": [1.0], "old_logprobs": [-1000.0]}]
            call = client.train_step(exploding, loss="importance_sampling", expected_step=0)
            await refused(call, grpc.StatusCode.ABORTED, "was not applied")
            assert (await client.train_state()).step == 0 and await scores(client) == before
            assert (await client.train_step(DOCUMENTS, expected_step=0, **STEP)).grad_norm < 1e6, "nothing was left"

    run(main())


def test_a_server_without_a_trainer_says_so(tiny: Path) -> None:
    async def main() -> None:
        async with training_service(tiny, trains=False) as client:
            call = client.train_step(DOCUMENTS, expected_step=0)
            await refused(call, grpc.StatusCode.FAILED_PRECONDITION, "start it with --train")

    run(main())


def test_sessions_are_seen_and_dropped_over_the_wire_and_answers_name_the_ranks_memory(tiny: Path) -> None:
    async def main() -> None:
        async with training_service(tiny) as client:
            added = await client.forward_backward(DOCUMENTS, idempotency_key="a", session="one")
            other = client.train_step(DOCUMENTS, expected_step=0, session="two", **STEP)
            error = await refused(
                other, grpc.StatusCode.RESOURCE_EXHAUSTED, "session 'one' holds the gradients of 1 calls"
            )
            assert info(error).reason == "SESSION_OPEN" and info(error).metadata["retryable"] == "true"
            state = await client.train_state()
            assert [(session.name, session.calls) for session in state.sessions] == [("one", 1)]
            assert added.waiting_calls == 1 and added.incarnation == state.incarnation > 0
            assert (await client.drop_gradients(session="one")).dropped_calls == 1
            again = client.forward_backward(DOCUMENTS, idempotency_key="a", session="one")
            await refused(again, grpc.StatusCode.ABORTED, "its gradient was dropped since, by its owner")
            assert (await client.train_step(DOCUMENTS, expected_step=0, session="two", **STEP)).step == 1

    run(main())

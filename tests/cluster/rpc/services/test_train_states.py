"""Saving, loading and exporting over gRPC: exact, beside streams, by names that lead nowhere else."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
import transformers

from cluster.rpc.client.client import AsyncClient
from tests.cluster.engine.tiny_models import save_tiny
from tests.cluster.frontend.harness import run
from tests.cluster.rpc.harness import info, refused
from tests.cluster.rpc.services.training_service import DOCUMENTS, STEP, logprobs, scores, scores_of, training_service
from tp_decoders.checkpoint.slice_writer import SliceFiles

Code = grpc.StatusCode
BAD_NAMES = (
    "", ".", "..", "../x", "..\\x", "/etc/passwd", "a/b", "a\\b", "a/../../b", ".hidden", "-rf", "_x", "a b", "\0",
    "a\0b", "x" * 101, "x" * 100_000, "é", "a\u202eb", "\uff0e\uff0e\uff0fx", "a\u2215b", "\u0430bc", "a\u0301", "~",
    "%2e%2e%2fx", "$HOME", "a\n", "a:b", "a*", "latest",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("gpt_neox", tmp_path_factory.mktemp("neox"))


async def take(client: AsyncClient, first: int, count: int) -> list[Any]:
    """Steps over batches that differ from step to step: (loss, norm, log-probabilities) of each."""
    seen = []
    for step in range(first, first + count):
        batch = [*DOCUMENTS, [step + 1, 2, 3, step + 4]]
        fields: dict[str, Any] = {"expected_step": step, "idempotency_key": f"step {step}", **STEP}
        done = await client.train_step(batch, **fields)
        assert not done.replayed, "an undone step is taken again, not answered from memory"
        seen.append((done.loss, done.grad_norm, logprobs(done)))
    return seen


async def continued(client: AsyncClient) -> tuple[list[int], list[float]]:
    """How a prompt of several cached blocks goes on."""
    fields: dict[str, Any] = {"sampling": {"seed": 1}, "stopping": {"max_new_tokens": 8}, "response": {"logprobs": 0}}
    sample = (await client.generate([[(7 * i) % 89 + 1 for i in range(50)]], **fields)).results[0].samples[0]
    return list(sample.token_ids), list(sample.logprobs)


def test_three_steps_after_a_load_have_the_bits_of_the_three_steps_after_the_save(tiny: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with training_service(tiny, root=tmp_path) as client:
            await take(client, 0, 3)
            saved = await client.save_state("three")
            assert (saved.step, saved.weight_version, saved.name) == (3, 3, "three") and saved.bytes > 1000
            at_three, went_on = await scores(client), await continued(client)
            first, at_six = await take(client, 3, 3), await scores(client)
            assert await continued(client) != went_on
            loaded = await client.load_state("three", expected_step=6)
            assert (loaded.step, loaded.weight_version) == (3, 7), "the version rises although the step goes back"
            assert await scores(client) == at_three and await continued(client) == went_on
            assert await take(client, 3, 3) == first and await scores(client) == at_six
        async with training_service(tiny, root=tmp_path) as other:  # as after a restart
            await other.load_state("three", expected_step=0)
            assert await take(other, 3, 3) == first and await scores(other) == at_six

    run(main())


def test_a_bfloat16_states_masters_come_back_too(tiny: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with training_service(tiny, root=tmp_path / "root", dtype=torch.bfloat16) as client:
            await take(client, 0, 2)
            await client.save_state("two")
            first = await take(client, 2, 3)
            await client.load_state("two", idempotency_key="back")
            assert await take(client, 2, 3) == first

    run(main())


def test_transformers_opens_a_saved_state_and_an_export(tiny: Path, tmp_path: Path) -> None:
    async def main() -> list[list[float]]:
        async with training_service(tiny, root=tmp_path) as client:
            await take(client, 0, 2)
            await client.save_state("state")
            await client.export("export")
            plain, state = (await client.train_state()).saved
            assert (plain.name, plain.HasField("step")) == ("export", False)
            assert (state.name, state.step) == ("state", 2) and state.bytes > plain.bytes > 1000
            call = client.load_state("export", expected_step=2)
            await refused(call, Code.NOT_FOUND, "it is an export")
            return await scores(client)

    served = run(main())
    plain = sorted(path.name for path in (tmp_path / "export").iterdir())
    assert plain == ["config.json", "generation_config.json", "model.safetensors"]
    for name in ("state", "export"):
        assert scores_of(tmp_path / name) == served
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            rows = model(torch.tensor([DOCUMENTS[0]])).logits[0, :-1].log_softmax(-1)
        wanted = rows.gather(1, torch.tensor(DOCUMENTS[0][1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(served[0]), wanted, rtol=1e-4, atol=1e-4)


def test_streams_go_on_while_a_state_is_written_and_it_holds_the_weights_of_its_turn(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, write = threading.Event(), SliceFiles.write

    def held(*args: Any) -> None:
        assert go.wait(60), "the test ended early"
        write(*args)

    monkeypatch.setattr(SliceFiles, "write", held)

    async def main() -> None:
        async with training_service(tiny, root=tmp_path) as client:
            await take(client, 0, 1)
            saving = asyncio.create_task(client.save_state("one", idempotency_key="save"))
            while (await client.train_state()).saving != "one":
                await asyncio.sleep(0.01)
            before, answer = await scores(client), client.generate([[1, 2]], stopping={"max_new_tokens": 30})
            assert len((await answer).results[0].samples[0].token_ids) == 30
            error = await refused(client.export("two"), Code.RESOURCE_EXHAUSTED, "'one' is still being written")
            assert info(error).metadata["retryable"] == "true"
            again = asyncio.create_task(client.save_state("one", idempotency_key="save"))
            step = asyncio.create_task(take(client, 1, 2))  # its update waits for what is written from live weights
            await asyncio.sleep(0.2)
            assert not any(task.done() for task in (saving, again, step)) and not (tmp_path / "one").exists()
            assert await scores(client) == before
            go.set()
            assert (await saving).step == (await again).step == 1
            first = await step
            await client.load_state("one", expected_step=3)
            assert await scores(client) == before and await take(client, 1, 2) == first

    run(main())


def test_a_save_whose_client_has_gone_is_completed(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, write = threading.Event(), SliceFiles.write

    def held(*args: Any) -> None:
        assert go.wait(60), "the test ended early"
        write(*args)

    monkeypatch.setattr(SliceFiles, "write", held)

    async def main() -> None:
        async with training_service(tiny, root=tmp_path) as client:
            leaving = asyncio.create_task(client.save_state("left", timeout=3.0))
            while (await client.train_state()).saving != "left":
                assert not leaving.done(), "it never began"
                await asyncio.sleep(0.01)
            await refused(leaving, Code.DEADLINE_EXCEEDED, "")
            assert (await client.train_state()).saving == "left"
            go.set()
            while (await client.train_state()).saving:
                await asyncio.sleep(0.01)
            assert [state.name for state in (await client.train_state()).saved] == ["left"]
            assert (await client.load_state("left", expected_step=0)).step == 0

    run(main())


def test_no_name_leads_out_of_the_folder_or_over_what_is_there(tiny: Path, tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"

    async def main() -> None:
        async with training_service(tiny, root=root) as client:
            await client.save_state("good")
            (root / "good").rename(outside)
            (root / "link").symlink_to(outside)
            (root / "nowhere").symlink_to(tmp_path / "absent")
            await client.save_state("inner")
            weights = root / "inner" / "model.safetensors"
            weights.rename(tmp_path / "stolen")
            weights.symlink_to(tmp_path / "stolen")
            (root / "empty").mkdir()
            before = sorted(tmp_path.rglob("*"))
            key: dict[str, Any] = {"idempotency_key": "k"}
            for name in BAD_NAMES:
                for call in (client.save_state(name), client.export(name), client.load_state(name, **key)):
                    await refused(call, Code.INVALID_ARGUMENT, "name: ")
            for name in ("link", "inner"):
                await refused(client.load_state(name, **key), Code.NOT_FOUND, "leads out of the server's folder")
            for name in ("link", "nowhere", "inner", "empty"):
                error = await refused(client.save_state(name), Code.ALREADY_EXISTS, "exists already")
                assert info(error).reason == "STATE_EXISTS"
                await refused(client.export(name), Code.ALREADY_EXISTS, "exists already")
            for name in ("absent", "nowhere", "empty"):
                await refused(client.load_state(name, **key), Code.NOT_FOUND, repr(name))
            await refused(client.load_state("inner"), Code.INVALID_ARGUMENT, "expected_step: missing")
            assert sorted(tmp_path.rglob("*")) == before, "nothing was written anywhere"
            assert (await client.train_state()).weight_version == 0

    run(main())


def test_without_a_folder_a_save_says_what_to_set(tiny: Path) -> None:
    async def main() -> None:
        async with training_service(tiny) as client:
            for call in (client.save_state("a"), client.export("a"), client.load_state("a", expected_step=0)):
                error = await refused(call, Code.FAILED_PRECONDITION, "training.save_root=FOLDER")
                assert info(error).reason == "NO_SAVE_ROOT"
            assert (await client.train_state()).step == 0

    run(main())


def test_a_full_disk_is_the_calls_error_and_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def main() -> None:
        async with training_service(tiny, root=tmp_path) as client:
            await take(client, 0, 1)
            with monkeypatch.context() as patch:
                patch.setattr(os, "posix_fallocate", full)
                for call in (client.save_state("a"), client.export("a")):
                    error = await refused(call, Code.FAILED_PRECONDITION, "No space left on device")
                    assert info(error).reason == "CHECKPOINT_FAILED"
            assert not [p for p in tmp_path.iterdir() if p.is_dir()]
            await take(client, 1, 1)
            assert (await client.save_state("a")).step == 2 and [p.name for p in tmp_path.iterdir()] == ["a"]

    run(main())


def test_a_damaged_state_is_named_by_file_and_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with training_service(tiny, root=tmp_path) as client:
            await client.save_state("zero")
            await take(client, 0, 1)
            before = await scores(client)
            for name in ("model.safetensors", "training/optimizer.safetensors"):
                path = tmp_path / "zero" / name
                whole = path.read_bytes()
                path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
                await refused(client.load_state("zero", expected_step=1), Code.FAILED_PRECONDITION, name)
                path.write_bytes(whole)
            state = tmp_path / "zero" / "training" / "state.json"
            text = state.read_text()
            state.write_text("{")
            await refused(client.load_state("zero", expected_step=1), Code.FAILED_PRECONDITION, "state.json")
            state.write_text(json.dumps({**json.loads(text), "step": 7}))
            assert await scores(client) == before and (await client.train_state()).step == 1
            await take(client, 1, 1)

    run(main())


def test_another_models_state_is_refused(tiny: Path, tmp_path: Path) -> None:
    async def main() -> None:
        other = save_tiny("gpt_neox", tmp_path / "other", intermediate_size=80)
        async with training_service(other, root=tmp_path / "root") as client:
            await client.save_state("small")
        async with training_service(tiny, root=tmp_path / "root") as client:
            before = await scores(client)
            call = client.load_state("small", expected_step=0)
            await refused(call, Code.FAILED_PRECONDITION, "it belongs to another model")
            assert await scores(client) == before and (await client.train_state()).weight_version == 0

    run(main())


def test_labels_are_what_transformers_makes_of_them(tiny: Path) -> None:
    ids, labels = [5, 9, 2, 7, 11, 3], [5, -100, 4, 7, -100, 90]
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny).eval()
    with torch.no_grad():
        wanted = float(model(torch.tensor([ids]), labels=torch.tensor([labels])).loss)

    async def main() -> None:
        async with training_service(tiny) as client:
            answer = await client.evaluate([{"token_ids": ids, "labels": labels}])
            assert answer.loss == pytest.approx(wanted, rel=1e-5)
            assert [value == 0.0 for value in answer.logprobs[0].values] == [True, False, False, True, False]
            for bad, words in (([1], "labels: 1 labels for 6 tokens"), ([-1] * 6, "labels[0]: -1"), ([97] * 6, "97")):
                call = client.train_step([{"token_ids": ids, "labels": bad}], expected_step=0)
                await refused(call, Code.INVALID_ARGUMENT, words)
            nothing = client.train_step([{"token_ids": ids, "labels": [-100] * 6}], expected_step=0)
            await refused(nothing, Code.INVALID_ARGUMENT, "every label -100")

    run(main())


def test_drain_waits_for_training_calls_under_way(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, write = threading.Event(), SliceFiles.write

    def held(*args: Any) -> None:
        assert go.wait(60), "the test ended early"
        write(*args)

    monkeypatch.setattr(SliceFiles, "write", held)

    async def main() -> None:
        async with training_service(tiny, root=tmp_path) as client:
            saving = asyncio.create_task(client.save_state("last"))
            while (await client.train_state()).saving != "last":
                await asyncio.sleep(0.01)
            draining = asyncio.create_task(client.drain(100.0))
            await asyncio.sleep(0.2)
            assert not draining.done()
            call = client.train_step(DOCUMENTS, expected_step=0)
            await refused(call, Code.UNAVAILABLE, "shutting down")
            go.set()
            assert await draining == 0 and (await saving).name == "last"
        assert (tmp_path / "last" / "training" / "state.json").is_file()

    run(main())


def test_a_drain_that_runs_out_of_time_ends_training_calls_with_the_reason(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    monkeypatch.setattr(SliceFiles, "write", lambda *args: go.wait(30))

    async def main() -> None:
        async with training_service(tiny, root=tmp_path) as client:
            saving = asyncio.create_task(client.save_state("never"))
            while (await client.train_state()).saving != "never":
                await asyncio.sleep(0.01)
            await client.drain(0.1)
            await refused(saving, Code.UNAVAILABLE, "the server stopped before")
            go.set()

    run(main())

"""Classify and Embed over gRPC: answers equal transformers', on two ranks; what cannot be is a status."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
import transformers

from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.run.command_stream import Commands
from cluster.engine.run.executors import follow
from cluster.frontend.frontend import Frontend, State
from cluster.frontend.requests.call import FrontendConfig
from cluster.link.local_link import LocalLink
from cluster.rpc.client.client import AsyncClient
from cluster.rpc.server import build_server
from parallel.ranks.group import Group
from tests.cluster.frontend.harness import run, until
from tests.cluster.rpc.harness import info, refused
from tests.cluster.rpc.services.test_real_model import MortalEngine, serving_model
from tp_decoders import load
from tp_decoders.model.task_config import CAUSAL, CHOICES, SEQUENCES, SPANS, TOKENS
from tp_decoders.protocol import inference_pb2 as pb

CONFIG = EngineConfig(kv_blocks=24, max_sequences=4, max_step_tokens=16)
GPT2: dict[str, Any] = {"vocab_size": 97, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 6}
PROMPTS = [[5, 9, 2], [7], [3 + i % 50 for i in range(40)], [11, 4, 8, 8, 1, 6]]
CLASSES = {
    CAUSAL: "LMHeadModel",
    SEQUENCES: "ForSequenceClassification",
    TOKENS: "ForTokenClassification",
    SPANS: "ForQuestionAnswering",
    CHOICES: "DoubleHeadsModel",
}


def reference(task: str, folder: Path, **options: Any) -> Any:
    """A tiny GPT-2 of transformers with larger weights than fresh ones; saved."""
    torch.manual_seed(7)
    config = transformers.GPT2Config(**GPT2, bos_token_id=0, eos_token_id=0, pad_token_id=0, **options)
    model = getattr(transformers, f"GPT2{CLASSES[task]}")(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


@asynccontextmanager
async def serving(folder: str, task: str, group: Group | None = None, **config: Any) -> AsyncIterator[AsyncClient]:
    runner = build_runner(load(folder, task=task, group=group), CONFIG, 1 << 28)
    engine = build_engine(runner, CONFIG, (), Commands(group.comm) if group is not None and group.size > 1 else None)
    frontend = Frontend(LocalLink(engine), config=FrontendConfig(**config))
    frontend.start()
    server = build_server(frontend, "127.0.0.1:0")
    await server.start()
    try:
        async with AsyncClient(f"127.0.0.1:{server.port}") as client:
            yield client
            load_now = await client.load()
            assert load_now.kv_blocks_free == load_now.kv_blocks_total and load_now.open_requests == 0
    finally:
        await server.stop(1.0)
        await frontend.close()
        engine.close()


def answers(group: Group, folder: str, task: str) -> list[bytes]:
    """One call on each rank's group: what rank 0's client was answered."""
    if group.rank:
        follow(build_runner(load(folder, task=task, group=group), CONFIG, 1 << 28), Commands(group.comm))
        return []

    async def main() -> list[bytes]:
        async with serving(folder, task, group) as client:
            embedded = await client.embed(PROMPTS, request_id="e", pooling=pb.POOLING_MEAN, normalize=True)
            made = [] if task == CAUSAL else [await client.classify(PROMPTS, request_id="c")]
            return [answer.SerializeToString() for answer in [*made, embedded]]

    found: list[bytes] = run(main())
    return found


def both(ranks: Any, folder: Path, task: str) -> tuple[pb.ClassifyResponse, pb.EmbedResponse]:
    """The answers, the same bytes on one rank and on two."""
    (one,) = ranks(1, answers, str(folder), task)
    assert ranks(2, answers, str(folder), task) == [one, []]
    return pb.ClassifyResponse.FromString(one[0]), pb.EmbedResponse.FromString(one[-1])


def close(found: Any, expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(list(found)), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_classes_of_sequences_and_embeddings_equal_transformers(ranks: Any, tmp_path: Path) -> None:
    names = {0: "bad", 1: "good", 2: "unsure"}
    model = reference(SEQUENCES, tmp_path, id2label=names, label2id={name: i for i, name in names.items()})
    found, embedded = both(ranks, tmp_path, SEQUENCES)
    assert list(found.labels) == ["bad", "good", "unsure"] and found.task == SEQUENCES
    for prompt, result, vector in zip(PROMPTS, found.results, embedded.results, strict=True):
        out = model(torch.tensor([prompt]), output_hidden_states=True)
        close(result.scores.logits, out.logits[0])
        close(result.scores.probabilities, out.logits[0].softmax(0))
        assert result.scores.label_id == int(out.logits[0].argmax())
        assert result.scores.label == names[result.scores.label_id]
        mean = out.hidden_states[-1][0].mean(0)
        close(vector.values, mean / mean.norm())
        assert vector.tokens == len(prompt) and result.status.code == vector.status.code == 0


@torch.no_grad()
def test_labels_of_tokens_equal_transformers(ranks: Any, tmp_path: Path) -> None:
    model = reference(TOKENS, tmp_path, num_labels=5)
    found, _ = both(ranks, tmp_path, TOKENS)
    for prompt, result in zip(PROMPTS, found.results, strict=True):
        logits = model(torch.tensor([prompt])).logits[0]
        assert list(result.token_ids) == prompt
        for token, expected in zip(result.tokens, logits, strict=True):
            close(token.logits, expected)
            assert token.label == f"LABEL_{int(expected.argmax())}"


@torch.no_grad()
def test_answers_in_a_text_equal_transformers(ranks: Any, tmp_path: Path) -> None:
    model = reference(SPANS, tmp_path)
    found, _ = both(ranks, tmp_path, SPANS)
    for prompt, result in zip(PROMPTS, found.results, strict=True):
        out = model(torch.tensor([prompt]))
        close(result.start_logits, out.start_logits[0])
        close(result.end_logits, out.end_logits[0])
        likely = torch.triu(torch.outer(out.start_logits[0].softmax(0), out.end_logits[0].softmax(0))).tril(29)
        best = int(likely.argmax())
        (span,) = result.spans
        assert (span.start, span.end) == divmod(best, len(prompt))
        assert span.score == pytest.approx(float(likely.max()), rel=1e-4)


@torch.no_grad()
def test_choices_equal_transformers(ranks: Any, tmp_path: Path) -> None:
    model = reference(CHOICES, tmp_path)
    found, _ = both(ranks, tmp_path, CHOICES)
    logits = torch.cat([model(torch.tensor([prompt])).mc_logits for prompt in PROMPTS])
    close([result.scores.logits[0] for result in found.results], logits)
    (choice,) = found.choices
    close(choice.probabilities, logits.softmax(0))
    assert choice.best == int(logits.argmax()) and choice.first_sequence == 0


def test_what_was_asked_of_an_engine_that_died_is_answered_by_the_next(tmp_path: Path) -> None:
    reference(TOKENS, tmp_path, num_labels=5)

    def engine_of() -> MortalEngine:
        engine = build_engine(build_runner(load(tmp_path, task=TOKENS), CONFIG, 1 << 28), CONFIG)
        engine.__class__ = MortalEngine
        assert isinstance(engine, MortalEngine)
        return engine

    async def main() -> None:
        async with serving_model(engine_of()) as (client, _):
            quiet = (await client.classify(PROMPTS, request_id="c")).SerializeToString()
        first = engine_of()
        first.steps_left = 2  # the longest prompt takes three steps
        async with serving_model(first) as (client, frontend):
            asked = asyncio.create_task(client.classify(PROMPTS, request_id="c"))
            await until(lambda: frontend.state is State.RECOVERING)
            await frontend.reattach(LocalLink(engine_of()))
            assert (await asked).SerializeToString() == quiet

    run(main())


def test_options_of_each_task_and_what_is_refused(tmp_path: Path) -> None:
    invalid, wrong = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION

    async def sequences() -> None:
        async with serving(str(tmp_path / "s"), SEQUENCES, max_prompts_per_call=6) as client:
            model = await client.model_info()
            assert model.task == SEQUENCES and list(model.labels) == ["LABEL_0", "LABEL_1", "LABEL_2"]
            padded = await client.classify([[5, 9, 2], [5, 9, 2, 0, 0], [0, 5, 9, 2], [0]])
            rows = [list(result.scores.logits) for result in padded.results]
            assert rows[0] == rows[1] and rows[0] != rows[2], "what follows the last token that is no padding is cut"
            assert not padded.results[0].scores.HasField("label_id"), "labels that do not exclude each other"
            some = await client.classify([[5, 200], [5]])
            assert some.results[0].status.code == invalid.value[0] and some.results[1].status.code == 0
            await refused(client.classify([[5, 200]]), invalid, "200 is not a token id")
            await refused(client.classify([[5]] * 7), invalid, "at most 6")
            await refused(client.classify([[5]], marks=[0]), invalid, "belong to double-heads")
            await refused(client.classify([[5] * 65]), grpc.StatusCode.RESOURCE_EXHAUSTED, "too long")
            error = await refused(client.generate([[5]]), wrong, "started for sequence-classification")
            assert info(error).reason == "WRONG_TASK"
            await refused(client.score([[5, 6]]), wrong, "call Classify or Embed")
            await refused(client.embed([[5]], pooling=7), invalid, "POOLING_LAST")
            await refused(client.embed(["text"]), wrong, "no tokenizer")
            last, mean = [await client.embed([[5, 9]], pooling=kind) for kind in (0, pb.POOLING_MEAN)]
            assert list(last.results[0].values) != list(mean.results[0].values)

    async def choices() -> None:
        async with serving(str(tmp_path / "c"), CHOICES) as client:
            pairs = await client.classify(PROMPTS, num_choices=2, marks=[0, 0, 5, 5])
            assert [choice.first_sequence for choice in pairs.choices] == [0, 2]
            cut = await client.classify([PROMPTS[2][:6]])
            assert list(cut.results[0].scores.logits) == list(pairs.results[2].scores.logits)
            await refused(client.classify(PROMPTS, num_choices=3), invalid, "3 does not divide the 4")
            await refused(client.classify([[5]], marks=[1]), invalid, "1 is outside a sequence of 1")
            assert (await client.generate([[5]], stopping={"max_new_tokens": 2})).results[0].samples

    async def language() -> None:
        async with serving(str(tmp_path / "l"), CAUSAL) as client:
            await refused(client.classify([[5]]), wrong, "start it with --task")
            assert (await client.model_info()).task == CAUSAL
            assert len((await client.embed([[5]])).results[0].values) == 48

    reference(SEQUENCES, tmp_path / "s", num_labels=3, problem_type="multi_label_classification")
    reference(CHOICES, tmp_path / "c")
    reference(CAUSAL, tmp_path / "l")
    for main in (sequences, choices, language):
        run(main())

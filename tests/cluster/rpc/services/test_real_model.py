"""The whole way with real models in one process: gRPC, front-end, engine, paged cache, tokenizer."""

from __future__ import annotations

import asyncio
import itertools
import random
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cluster.engine.engine import Engine
from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.request import TokenEvent
from cluster.frontend.frontend import Frontend, State
from cluster.frontend.output.output_text import TextCodec, codec_of
from cluster.frontend.requests.call import FrontendConfig
from cluster.link.local_link import LocalLink
from cluster.rpc.client.client import AsyncClient
from cluster.rpc.server import build_server
from tests.cluster.frontend.harness import run, until
from tests.cluster.frontend.output.test_stop_strings import brute_force
from tp_decoders import load
from tp_decoders.protocol import inference_pb2 as pb
from tp_decoders.text.tokenizer import Tokenizer, load_tokenizer

DATA = Path(__file__).resolve().parents[3] / "data"
SORTER = DATA / "gpt-nano-sort"
TEXT = "Einen schönen Tag, 日本 and the rest of 2 sentences. "


class MortalEngine(Engine):
    """An engine whose process dies, as far as its front-end can tell, in its n-th step."""

    steps_left: int | None = None

    def step(self) -> list[TokenEvent]:
        if self.steps_left is not None:
            self.steps_left -= 1
            if self.steps_left < 0:
                raise RuntimeError("killed")
        return super().step()


def engine_of(folder: Path, **config: Any) -> Engine:
    engine = build_engine(build_runner(load(folder), EngineConfig(**config), 1 << 28), EngineConfig(**config))
    engine.__class__ = MortalEngine
    return engine


@asynccontextmanager
async def serving_model(engine: Engine, codec: TextCodec | None = None) -> AsyncIterator[tuple[AsyncClient, Frontend]]:
    frontend = Frontend(LocalLink(engine), codec=codec, config=FrontendConfig(recovery_seconds=20.0))
    frontend.start()
    server = build_server(frontend, "127.0.0.1:0")
    await server.start()
    try:
        async with AsyncClient(f"127.0.0.1:{server.port}") as client:
            yield client, frontend
    finally:
        await server.stop(1.0)
        await frontend.close()


@pytest.fixture(scope="module", autouse=True)
def kernels_built() -> None:
    """Compiling the native kernels for the first time takes longer than any test's limit."""
    engine_of(SORTER)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random GPT-2 with the real GPT-2 tokenizer."""
    folder = tmp_path_factory.mktemp("gpt2")
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, tie_word_embeddings=False)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    shutil.copy(DATA / "tokenizers" / "gpt2" / "tokenizer.json", folder)
    return folder


def tokenizer_of(folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


def test_the_sorter_sorts_all_729_inputs_of_one_call() -> None:
    async def main() -> None:
        prompts = [list(digits) for digits in itertools.product(range(3), repeat=6)]
        async with serving_model(engine_of(SORTER, kv_blocks=64)) as (client, _):
            answer = await client.generate(prompts, sampling={"temperature": 0.0}, stopping={"max_new_tokens": 6})
            assert [list(r.samples[0].token_ids) for r in answer.results] == [sorted(prompt) for prompt in prompts]

    run(main())


def test_text_in_text_out_streamed_and_whole_with_stop_strings(gpt2: Path) -> None:
    async def main() -> None:
        tokenizer = tokenizer_of(gpt2)
        async with serving_model(engine_of(gpt2), codec_of(tokenizer)) as (client, _):
            fields: dict[str, Any] = {"sampling": {"seed": 4, "n": 3}, "stopping": {"max_new_tokens": 60}}
            free = await client.generate([TEXT], **fields)
            assert free.results[0].prompt_tokens == len(tokenizer.encode(TEXT))
            texts = [sample.text for sample in free.results[0].samples]
            assert texts == [tokenizer.decode(sample.token_ids) for sample in free.results[0].samples]
            stops = [texts[0][30:33], texts[1][17:21], texts[2][50]]
            fields["stopping"] = {"max_new_tokens": 60, "stop_sequences": stops}
            (stopped,) = (await client.generate([TEXT], **fields)).results
            assert [(s.text, s.stop_sequence) for s in stopped.samples] == [brute_force(t, stops, False) for t in texts]
            streamed = {0: "", 1: "", 2: ""}
            async for chunk in client.stream([TEXT], **fields):
                streamed[chunk.sample_index] += chunk.text
            assert list(streamed.values()) == [sample.text for sample in stopped.samples]

    run(main())


def test_scores_of_an_answer_are_bit_for_bit_the_log_probabilities_it_was_sampled_with(gpt2: Path) -> None:
    async def main() -> None:
        async with serving_model(engine_of(gpt2)) as (client, _):
            fields: dict[str, Any] = {"stopping": {"max_new_tokens": 20}, "response": {"logprobs": 0}}
            (result,) = (await client.generate([[5, 6, 7]], **fields)).results
            sample = result.samples[0]
            (score,) = (await client.score([[5, 6, 7, *sample.token_ids]])).results
            assert list(score.logprobs[2:]) == list(sample.logprobs)

    run(main())


def test_half_of_the_clients_leave_and_every_block_of_the_cache_is_free_again(gpt2: Path) -> None:
    async def main() -> None:
        rng = random.Random(6)
        engine = engine_of(gpt2, kv_blocks=12, max_sequences=16)
        async with serving_model(engine) as (client, frontend):
            tasks = [asyncio.create_task(one_client(client, rng.randrange(1000), i % 2 == 0)) for i in range(60)]
            kept = [await task for task in tasks]
            assert all(tokens == 16 for index, tokens in enumerate(kept) if index % 2)
            await until(lambda: frontend.num_open == 0 and engine.idle)
            load = await client.load()
            assert load.preemptions > 0, "the cache was too small for all at once"
            assert load.kv_blocks_free == load.kv_blocks_total and load.running == load.waiting == 0

    run(main())


async def one_client(client: AsyncClient, seed: int, leaves: bool) -> int:
    chunks = client.stream([[seed] * (1 + seed % 20)], sampling={"seed": seed}, stopping={"max_new_tokens": 16})
    count = 0
    async for chunk in chunks:
        count += len(chunk.token_ids)
        if leaves and count > seed % 8:
            break
    await chunks.aclose()
    return count


def test_answers_over_engines_that_die_are_bit_for_bit_those_of_one_that_lives(gpt2: Path) -> None:
    async def main() -> None:
        codec = codec_of(tokenizer_of(gpt2))
        prompts = [TEXT[: 10 + i] for i in range(12)]
        async with serving_model(engine_of(gpt2), codec) as (client, _):
            quiet = await ask(client, prompts)
        first = engine_of(gpt2)
        first.steps_left = 9  # type: ignore[attr-defined]
        async with serving_model(first, codec) as (client, frontend):
            asked = asyncio.create_task(ask(client, prompts))
            for steps in (1, 6, None):
                await until(lambda: frontend.state is State.RECOVERING)
                engine = engine_of(gpt2, max_step_tokens=64)
                engine.steps_left = steps  # type: ignore[attr-defined]
                await frontend.reattach(LocalLink(engine))
            assert await asked == quiet

    run(main())


async def ask(client: AsyncClient, prompts: Sequence[str]) -> list[list[pb.Sample]]:
    fields: dict[str, Any] = {
        "sampling": {"seed": 4, "n": 2, "top_p": 0.9, "presence_penalty": 0.5},
        "stopping": {"max_new_tokens": 30, "ignore_eos": True},
        "response": {"logprobs": 2},
    }
    return [list(result.samples) for result in (await client.generate(prompts, **fields)).results]

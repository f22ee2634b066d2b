"""tp_decoders.client, asynchronous: streams, cancellation, a lost server, TLS and tokens, forks, training."""

from __future__ import annotations

import asyncio
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cluster.access.access_config import Security, TlsConfig
from cluster.rpc.client.client import AsyncClient as Messages
from tests.cluster.access.token_files import entry, secret_file
from tests.cluster.engine.tiny_models import save_tiny
from tests.cluster.frontend.fakes import CODEC, ENDLESS, LASTING, FakeEngine, tokens_of
from tests.cluster.frontend.harness import run
from tests.cluster.rpc.certificates import Authority
from tests.cluster.rpc.client.test_retries import Place
from tests.cluster.rpc.harness import service
from tests.cluster.rpc.services.training_service import DOCUMENTS, training_service
from tp_decoders import client as library
from tp_decoders.client import Access, AsyncClient, FinishReason, TrainSequence

TOKEN = "a-token-of-sufficient-length-0123"


async def none_open(frontend: Any) -> None:
    async with asyncio.timeout(20):
        while frontend.num_open:
            await asyncio.sleep(0.005)


def test_it_streams_answers_and_scores_side_by_side() -> None:
    async def main() -> None:
        async with service() as s, AsyncClient(s.address) as client:
            await client.ready()

            async def streamed(seed: int) -> bool:
                async with client.stream("ab", seed=seed, max_new_tokens=20) as stream:
                    chunks = [chunk async for chunk in stream]
                tokens = [token for chunk in chunks for token in chunk.token_ids]
                assert chunks[-1].finish_reason is FinishReason.LENGTH
                return tokens == tokens_of(CODEC.tokenizer.encode("ab"), seed, 0, 20)

            assert all(await asyncio.gather(*map(streamed, range(20))))
            answers = await client.generate_batch([[1], [99]], seed=1, max_new_tokens=2)
            assert answers[0].token_ids and isinstance(answers[1].error, library.InvalidArgument)
            assert len((await client.score([[1, 2, 3]]))[0].logprobs) == 2

    run(main())


def test_what_is_left_or_cancelled_is_cancelled_at_the_server() -> None:
    async def main() -> None:
        engine = FakeEngine(limits=ENDLESS)
        async with service(engine) as s, AsyncClient(s.address) as client:

            async def read() -> None:
                async for _ in client.stream([1], max_new_tokens=LASTING):
                    pass

            for call in (read, partial(client.generate, [1], max_new_tokens=LASTING // 16)):
                wait: asyncio.Task[Any] = asyncio.create_task(call())
                while not s.frontend.num_open:
                    assert not wait.done(), wait
                    await asyncio.sleep(0.002)
                wait.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await wait
                await none_open(s.frontend)
            async for _ in client.stream([1], max_new_tokens=LASTING):
                break
            await none_open(s.frontend)
            stream = client.stream([1], max_new_tokens=LASTING)
            assert (await anext(stream)).prompt is not None
            await stream.aclose()
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            await none_open(s.frontend)
            aborted = client.stream([1], max_new_tokens=LASTING)
            await anext(aborted)
            assert await client.abort([aborted.request_id]) == 1
            assert [chunk async for chunk in aborted][-1].finish_reason is FinishReason.ABORTED

    run(main())


def test_a_stream_goes_on_at_the_next_server() -> None:
    async def main() -> None:
        where = Place()
        await where.serve()
        async with AsyncClient(f"127.0.0.1:{where.port}") as client:
            tokens: list[int] = []
            async for chunk in client.stream([1, 2], max_new_tokens=60, seed=4):
                tokens += chunk.token_ids
                if len(tokens) in (10, 30):
                    await where.stop()
                    await where.serve()
            assert tokens == tokens_of([1, 2], 4, 0, 60)
        await where.stop()

    run(main())


def test_tls_a_certificate_of_its_own_and_a_token_or_nothing(tmp_path: Path) -> None:
    ca = Authority(tmp_path, "ours")
    pair, mine = ca.sign("server"), ca.sign("alice")
    tokens = secret_file(tmp_path / "tokens.toml", entry("us", TOKEN, ["generate"]))
    closed = Security(tls=TlsConfig(cert=pair.cert, key=pair.key, client_ca=ca.path), token_file=tokens)

    async def main() -> None:
        async with service(security=closed, ready=False) as s:
            cert: dict[str, Any] = {"tls_ca": ca.path, "tls_cert": mine.cert, "tls_key": mine.key}
            async with AsyncClient(f"grpcs://{s.address}", Access(token=TOKEN, **cert)) as client:
                assert (await client.generate([1], max_new_tokens=1)).token_ids
            for access, error in (
                (Access(**cert), library.Unauthenticated),
                (Access(token=TOKEN, tls_ca=ca.path), library.Unavailable),
                (Access(token=TOKEN), library.Unavailable),
            ):
                async with AsyncClient(s.address, access) as client:
                    with pytest.raises(error):
                        await client.generate([1], max_new_tokens=1, timeout=20)

    run(main())


def test_after_a_fork_it_says_that_it_does_not_go_on() -> None:
    async def main() -> None:
        async with service() as s, AsyncClient(s.address) as client:
            await client.generate([1], max_new_tokens=1)
            there, here = os.pipe()
            if (child := os.fork()) == 0:
                try:
                    client.generate([1], max_new_tokens=1).send(None)
                except library.SettingsError as error:
                    os.write(here, str(error).encode())
                finally:
                    os._exit(0)
            assert b"make a client after the fork" in await asyncio.to_thread(os.read, there, 1000)
            os.waitpid(child, 0)

    run(main())


def test_it_trains_and_a_step_that_was_lost_is_never_applied_twice(tmp_path: Path) -> None:
    async def main() -> None:
        folder = save_tiny("gpt_neox", tmp_path / "model")
        async with training_service(folder, root=tmp_path / "states") as messages:
            async with AsyncClient(address_of(messages)) as client:
                waiting = await client.forward_backward(DOCUMENTS, normaliser=10)
                assert waiting.waiting_calls == 1 and len(waiting.logprobs) == len(DOCUMENTS)
                stepped = await client.optim_step(optimizer={"learning_rate": 1e-3})
                assert stepped.step == 1 and stepped.weight_version > waiting.weight_version
                answer = await client.generate(DOCUMENTS[0], max_new_tokens=4, seed=1, logprobs=0)
                sequence = TrainSequence.of_sample(DOCUMENTS[0], answer.sample, advantage=1.0)
                judged = await client.evaluate([sequence], loss="importance_sampling")
                assert judged.logprobs[0][-4:] == answer.logprobs
                assert (await client.score([sequence.token_ids]))[0].logprobs == judged.logprobs[0]
                key: dict[str, Any] = {"idempotency_key": "once", "optimizer": {"learning_rate": 1e-3}}
                first, again = [await client.train_step(DOCUMENTS, **key) for _ in range(2)]
                assert again.replayed and again.step == first.step == 2 and not first.replayed
                saved = await client.save_state("one")
                assert saved.size > 0 and (await client.train_state()).saved[0].name == "one"
                with pytest.raises(library.AlreadyExists):
                    await client.save_state("one")
                assert (await client.load_state("one")).step == 2
                with pytest.raises(library.SettingsError, match=r"sequences\[0\].token_id is no field"):
                    await client.train_step([{"token_id": [1]}])
                with pytest.raises(library.FailedPrecondition):
                    await client.optim_step(expected_step=7)

    run(main())


def address_of(messages: Messages) -> str:
    return messages._link.address.target

"""A worker group on Ray that serves a head: two ranks, a front-end over TCP, classes and embeddings."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
import transformers

from cluster.actors.group.worker import Ready
from cluster.actors.group.worker_group import WorkerGroup
from cluster.actors.programs.serve_program import ServeProgram
from cluster.actors.programs.serve_spec import ParallelConfig
from cluster.engine.engine_config import EngineConfig
from cluster.engine.request import Pooling
from cluster.frontend.frontend import Frontend
from cluster.frontend.output.streams import collect
from cluster.frontend.requests.call import Call, Prompt
from cluster.frontend.requests.classify_embed import Reading
from cluster.link.socket_link import SocketLink
from cluster.request_errors import WrongTask
from parallel.native.compiled import library

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
KEY = b"0123456789abcdef"
PROMPTS = ((5, 9, 2), (7, 8, 8, 1, 30))


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    """Compiled here if need be, outside the limits below."""
    library.available()


async def read(ready: list[Ready], reading: Reading) -> list[tuple[float, ...]]:
    """The first row of each prompt's answer."""
    address = ready[0].facts.engine_address
    assert address is not None
    frontend = Frontend(SocketLink(address, KEY))
    frontend.start()
    prompts = tuple(Prompt(token_ids=ids) for ids in PROMPTS)
    try:
        with pytest.raises(WrongTask, match="call Classify or Embed"):
            await frontend.open(Call(prompts=prompts))
        results = await collect(await frontend.open(Call(prompts=prompts, reading=reading)), len(prompts))
        return [(result.samples[0].pooled or ())[0] for result in results]
    finally:
        await frontend.close()


def test_two_ranks_serve_a_classifier(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=31, n_positions=32, n_embd=24, n_layer=2, n_head=3, num_labels=3, pad_token_id=0
    )
    torch.manual_seed(1)
    model = transformers.GPT2ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    spec = ServeProgram(
        model=str(tmp_path), authkey=KEY, task="sequence-classification",
        parallel=ParallelConfig(tp=2, collective_timeout_s=100.0),
        engine=EngineConfig(kv_blocks=16, max_sequences=4),
    )  # fmt: skip
    group = WorkerGroup(spec, size=2)
    try:
        ready = group.start()
        limits = ready[0].facts.limits
        assert limits is not None and limits.task is not None and limits.task.num_labels == 3
        with torch.no_grad():
            expected = [model(torch.tensor([ids]), output_hidden_states=True) for ids in PROMPTS]
        classes = asyncio.run(read(ready, Reading()))
        torch.testing.assert_close(torch.tensor(classes), torch.cat([out.logits for out in expected]))
        states = asyncio.run(read(ready, Reading(pooling=Pooling(head=False))))
        last = torch.stack([out.hidden_states[-1][0, -1] for out in expected])
        torch.testing.assert_close(torch.tensor(states), last, rtol=1e-4, atol=1e-4)
    finally:
        group.close()

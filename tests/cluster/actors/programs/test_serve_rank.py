"""The serving program on real ranks: what it says when it is ready, and why it could not start."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cluster.actors.group.worker import Ready
from cluster.actors.group.worker_group import WorkerGroup
from cluster.actors.programs.serve_program import ServeProgram
from cluster.actors.programs.serve_spec import ParallelConfig
from cluster.engine.engine_config import EngineConfig
from cluster.engine.request import SamplingParams, StoppingCriteria
from cluster.frontend.frontend import Frontend
from cluster.frontend.output.streams import collect
from cluster.frontend.requests.call import Call, Prompt
from cluster.link.socket_link import SocketLink
from parallel.errors import CheckpointError, ConfigError, TpError
from parallel.native.compiled import library

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
SORTER = Path(__file__).resolve().parents[3] / "data" / "gpt-nano-sort"
KEY = b"0123456789abcdef"
SMALL = EngineConfig(kv_blocks=32, max_sequences=4)


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    """Compiled here if need be, outside the limits below."""
    library.available()


def spec(model: Path = SORTER, engine: EngineConfig = SMALL, **parallel: object) -> ServeProgram:
    settings: dict[str, Any] = {"collective_timeout_s": 100.0, **parallel}
    return ServeProgram(model=str(model), authkey=KEY, parallel=ParallelConfig(tp=2, **settings), engine=engine)


async def sort(ready: list[Ready], prompt: tuple[int, ...]) -> list[int]:
    address = ready[0].facts.engine_address
    assert address is not None
    frontend = Frontend(SocketLink(address, KEY))
    frontend.start()
    call = Call(
        prompts=(Prompt(token_ids=prompt),),
        sampling=SamplingParams(temperature=0.0),
        stopping=StoppingCriteria(max_new_tokens=6),
    )
    try:
        (result,) = await collect(await frontend.open(call), 1)
        return list(result.samples[0].token_ids)
    finally:
        await frontend.close()


def test_two_ranks_share_a_model_and_answer_a_front_end() -> None:
    group = WorkerGroup(spec(), size=2)
    try:
        ready = group.start()
        first, second = (rank.facts for rank in ready)
        assert (first.family, first.dtype, first.kv_blocks, first.block_size) == ("gpt2", "float32", 32, 16)
        assert first.limits is not None and first.limits.kv_capacity_tokens == 512 and second.limits is None
        assert first.parameters > second.parameters, "three heads on two ranks: the first has two"
        assert {"imports", "reading weights", "warming up"} <= set(ready[0].seconds)
        assert asyncio.run(sort(ready, (2, 0, 1, 1, 0, 2))) == [0, 0, 1, 1, 2, 2]
        assert asyncio.run(sort(ready, (1, 1, 0, 0, 2, 2))) == [0, 0, 1, 1, 2, 2], "the next front-end may connect"
    finally:
        group.close()


def failure(spec: ServeProgram) -> TpError:
    with pytest.raises(TpError) as failed:
        WorkerGroup(spec, size=2).start()
    return failed.value


def test_a_missing_checkpoint_is_named_with_the_rank_and_node(tmp_path: Path) -> None:
    error = failure(spec(model=tmp_path / "nothing"))
    assert isinstance(error, CheckpointError)
    assert "rank 0 on " in str(error) and "did not start: " in str(error) and "nothing has no config.json" in str(error)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((SORTER / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((SORTER / "model.safetensors").read_bytes()[:1000])
    assert isinstance(failure(spec(model=tmp_path)), CheckpointError)


def test_an_impossible_setting_is_refused_by_name() -> None:
    error = failure(spec(engine=EngineConfig(kv_blocks=8, attention_backend="flash")))
    assert isinstance(error, ConfigError)
    assert "attention backend flash was asked for, but it needs a CUDA device" in str(error)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tp": 0}, "parallel.tp is 0"),
        ({"dp": 0}, "parallel.dp is 0; it must be at least 1"),
        ({"dtype": "int8"}, "parallel.dtype is 'int8'; choose one of"),
        ({"device": "tpu"}, "parallel.device is 'tpu'; choose one of"),
        ({"threads": 0}, "parallel.threads is 0"),
        ({"collective_timeout_s": 0.0}, "parallel.collective_timeout_s is 0.0"),
    ],
)
def test_a_layout_that_cannot_work_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**values)
